"""8-bit linear layers: small errors, less memory, and where they are used."""

import pytest
import torch
from torch import nn

from infdit_core.blocks.schedules import LayerMajor
from infdit_core.network.fp8 import DTYPE, Fp8Linear, use_fp8
from tests.goldens import golden_model, random_condition


def test_a_rounded_layer_is_near_the_exact_one_at_any_scale():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False)
    linear.weight *= torch.logspace(-4, 2, 48)[:, None]
    x = torch.randn(3, 500, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    linear.bias.zero_()
    expected, result = linear(x), Fp8Linear(linear)(x)
    error = (result - expected).square().mean(1).sqrt() / expected.square().mean(1).sqrt()
    # three bits of mantissa round by 2^-4 at most and evenly: 2^-4 / √3, twice
    assert error.min() > 0.02
    assert error.max() < 0.06


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(16, 16)
    assert torch.equal(Fp8Linear(linear)(torch.zeros(1, 16)), linear.bias.detach()[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_layers_of_a_network_are_rounded_and_nothing_else(dtype):
    exact, rounded = golden_model("xs", dtype), golden_model("xs", dtype)
    use_fp8(rounded)
    linears = [m for m in rounded.layers.modules() if isinstance(m, Fp8Linear)]
    assert len(linears) == 4 * rounded.config.num_layers
    assert all(m.weight.dtype == DTYPE for m in linears)
    assert not any(isinstance(m, Fp8Linear) for m in rounded.cross_attention.modules())
    assert not any(isinstance(m, nn.Linear) for m in rounded.layers.modules())
    x, cond = random_condition(exact, 2, 2)
    expected = exact.denoise(x, 0.5, cond)
    result = rounded.denoise(x, 0.5, cond, LayerMajor(1))
    error = (result - expected).square().mean().sqrt()
    assert 0 < error < 0.05


def test_rounded_layers_can_be_streamed():
    model = golden_model("xs")
    use_fp8(model)
    x, cond = random_condition(model, 2, 2)
    expected = model.denoise(x, 0.5, cond, LayerMajor(1))
    streamed = model.denoise(x, 0.5, cond, LayerMajor(1, stream_weights=True))
    assert torch.equal(streamed, expected)
