"""In float32 no convolution of the network rounds to TF32, and nothing is set for others."""

import pytest
import torch
from torch import nn

from infdit_core.precision import exact_convolutions
from tests.goldens import TINY_PRIOR, random_condition, random_model

CUDNN = torch.backends.cudnn
FP32 = torch.float32


def allowed():
    return CUDNN.allow_tf32, CUDNN.benchmark, CUDNN.deterministic


@pytest.mark.parametrize("default", [True, False], ids=["tf32 allowed", "not allowed"])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=["fp32", "bf16"])
def test_convolutions_of_the_network_use_no_tf32_in_float32(dtype, default, monkeypatch):
    seen, forward = [], nn.Conv2d.forward

    def watched(self, x):
        seen.append((x.dtype, CUDNN.allow_tf32, CUDNN.benchmark, CUDNN.deterministic))
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    monkeypatch.setattr(CUDNN, "allow_tf32", default)
    monkeypatch.setattr(CUDNN, "benchmark", True)
    before = allowed()
    model = random_model(TINY_PRIOR, std=0.05).to(dtype)
    x, cond = random_condition(model, 1, 2)
    model.denoise(x, 0.3, cond)
    patches = len(seen)
    assert model.prior is not None
    model.prior.add_to(cond.concat, cond.lr, "cpu", dtype)
    assert patches == 2  # of the picture and of the LR picture
    assert len(seen) == patches + 2 + 2 * TINY_PRIOR.prior_depth
    assert set(seen) == {(dtype, default and dtype != FP32, True, before[2])}
    assert allowed() == before


def test_what_was_allowed_comes_back_when_the_last_thread_is_out():
    before = allowed()
    first, second = exact_convolutions(FP32), exact_convolutions(FP32)
    first.__enter__()
    with pytest.raises(RuntimeError, match="of the network"), second:
        raise RuntimeError("of the network")
    assert not CUDNN.allow_tf32
    first.__exit__(None, None, None)
    assert allowed() == before


@pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="PyTorch before 2.9 has one name for it")
def test_who_used_the_newer_name_finds_what_was_set(monkeypatch):
    monkeypatch.setattr(CUDNN.rnn, "fp32_precision", "ieee")  # and the older one cannot be read
    with exact_convolutions(FP32):
        assert CUDNN.conv.fp32_precision == "ieee"  # type: ignore[attr-defined] - absent from its stubs
    assert CUDNN.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
