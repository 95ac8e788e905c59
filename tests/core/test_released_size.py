"""The released network's size, with random weights."""

import pytest
import torch

from infdit_core.network.config import RELEASED
from infdit_core.network.model import InfDiT
from tests.goldens import golden, golden_cases, golden_condition, golden_model, random_condition


@pytest.mark.slow
def test_one_evaluation_of_the_released_size():
    model = InfDiT(RELEASED, device="meta").to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator)
    x, cond = random_condition(model, 1, 2)
    denoised = model.denoise(x, 1.0, cond)
    assert denoised.shape == (1, 3, 128, 256)
    assert denoised.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "maximum"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", golden_cases("*/a_full_?x?.safetensors"))
def test_denoised_equals_the_release_on_cuda(name, dtype, maximum):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tensors = {k: v.cuda() for k, v in golden(name).items()}
    model = golden_model(name.split("/")[0], dtype).cuda()
    for key in (k for k in tensors if k.startswith("out_sigma")):
        x, sigma = tensors[key.replace("out", "x")], float(key.removeprefix("out_sigma"))
        denoised = model.denoise(x, sigma, golden_condition(tensors))
        torch.testing.assert_close(denoised, tensors[key], atol=maximum, rtol=0)
