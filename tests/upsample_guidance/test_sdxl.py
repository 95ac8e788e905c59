"""Upsample Guidance on SDXL's own network with random weights, a small latent.

5.1 GB of weights; 103 seconds on a core that other work shared.
"""

import psutil
import pytest
import torch
import torch.nn.functional as F

from tools.sdxl_checkpoint import UNET

MEMORY_GB = 9
pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def network(comfy):
    """SDXL in bf16; weights have the variance 1 / inputs, which keeps activations near one."""
    from comfy import model_base, supported_models
    from comfy.model_patcher import ModelPatcher

    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY_GB:
        pytest.skip(f"Expected {MEMORY_GB} GB of free memory for SDXL in bf16; got {free:.1f} GB.")
    config = supported_models.SDXL(supported_models.SDXL.unet_config | UNET)
    config.set_inference_dtype(torch.bfloat16, torch.float32)
    model = model_base.SDXL(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_a_run_through_ksampler(network, apply, hidiffusion):
    from comfy.patcher_extension import WrappersMP

    from nodes import KSampler

    patched = hidiffusion(apply(network, low_size_cond="low"))
    calls, results = [], []

    def inside(executor, x, t, c_concat, c_crossattn, control, options, **conds):
        x0 = executor(x, t, c_concat, c_crossattn, control, options, **conds)
        calls.append((tuple(x.shape), float(t[0]), conds["y"], x0))
        return x0

    def outside(apply_model, call):
        results.append(apply_model(call["input"], call["timestep"], **call["c"]))
        return results[-1]

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", inside)
    patched.set_model_unet_function_wrapper(outside)
    prompts = [[[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]] for _ in "pn"]
    latent = {"samples": torch.zeros(1, 4, 32, 48)}
    (result,) = KSampler().sample(patched, 0, 2, 5.0, "euler", "normal", *prompts, latent)

    assert result["samples"].shape == (1, 4, 32, 48)
    assert result["samples"].isfinite().all()
    assert [call[0] for call in calls] == [(2, 4, 16, 24), (2, 4, 32, 48), (2, 4, 32, 48)]
    (_, low_sigma, low_y, low), (_, sigma, y, high), (*_, last) = calls
    assert low_sigma == pytest.approx(sigma / 2)
    guided = high + F.interpolate(low - F.avg_pool2d(high, 2), scale_factor=2.0)
    torch.testing.assert_close(results[0], guided)
    assert (guided - high).norm() > 1e-3 * high.norm()
    assert torch.equal(results[1], last)
    # Height, width, crop, target: the first of each 256 numbers is the cosine of the length.
    heights = [float(told[0, 1280].double()) for told in (y, low_y)]
    assert heights == pytest.approx([float(torch.tensor(n).cos()) for n in (256.0, 128.0)])
    assert torch.equal(y[:, :1280], low_y[:, :1280])
