"""Models that predict v or EDM's target, by value: the formula from the networks themselves."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.hidiffusion.models import base_model
from tests.hidiffusion.test_beside_others import core_node
from tests.upsample_guidance.models import conditions, evaluate

pytestmark = pytest.mark.comfy

X = (2, 4, 16, 24)
CONDS = conditions("sdxl", 2)


def network(model, x: Tensor, timestep: float) -> Tensor:
    """Output of the UNet alone, in double precision."""
    timesteps = torch.full((len(x),), float(timestep))
    with torch.no_grad():
        unet = model.model.diffusion_model
        return unet(x.float(), timesteps, CONDS["c_crossattn"], CONDS["y"]).double()


def mean(x: Tensor, m: int) -> Tensor:
    return F.avg_pool2d(x, m)


def repeat(x: Tensor, m: int) -> Tensor:
    return x.repeat_interleave(m, 2).repeat_interleave(m, 3)


def paper(model, noises: Tensor, x: Tensor, t: int, m: int, w: float) -> Tensor:
    """x0' by the paper's formula in eps and scales whose squares add up to 1, for a v network."""
    abar = float(1 / (1 + noises[t].double() ** 2))

    def eps(x: Tensor, abar: float, timestep: int) -> Tensor:
        return (1 - abar) ** 0.5 * x + abar**0.5 * network(model, x, timestep)

    ratios = noises.double() ** -2  # signal to noise
    tau = int((ratios.log() - math.log(m**2 * float(ratios[t]))).abs().argmin())
    power = abar + (1 - abar) / m**2
    scaled = abar**0.5 * x.double()
    high = eps(scaled, abar, t)
    low = eps(mean(scaled, m) / power**0.5, abar / power, tau)
    guided = high + w * repeat(low / m - mean(high, m), m)
    return (scaled - (1 - abar) ** 0.5 * guided) / abar**0.5


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize(("t", "m"), [(999, 2), (700, 4), (401, 2)])
def test_v_and_zero_terminal_snr(comfy, apply, zsnr, t, m):
    from comfy.model_base import ModelType

    node = core_node("nodes_model_advanced", "ModelSamplingDiscrete")()
    (model,) = node.patch(base_model("sdxl", model_type=ModelType.V_PREDICTION), "v_prediction", zsnr)
    sampling = model.get_model_object("model_sampling")
    model.model.model_sampling = sampling  # as loading the model does
    noises = sampling.sigmas
    assert float(noises[-1]) > 4000 or not zsnr
    sigma = float(noises[t])
    x = torch.randn(X) + sigma * torch.randn(X)
    found = evaluate(apply(model, scale=str(m), theta=0.8), x, noises[t], CONDS)
    expected = paper(model, noises, x, t, m, 0.8)
    error = float((found - expected).norm() / expected.norm())
    plain = float((found - evaluate(model, x, noises[t], CONDS)).norm() / expected.norm())
    print(f"zsnr {zsnr}, t {t}, m {m}: {error:.1e}, effect {plain:.1e}")
    assert error <= 5e-6
    assert plain > 1e-3


@pytest.mark.parametrize("kind", ["edm", "edm_playground_v2.5"])
def test_edm(comfy, apply, kind):
    from comfy.model_base import ModelType

    node = core_node("nodes_model_advanced", "ModelSamplingContinuousEDM")()
    (model,) = node.patch(base_model("sdxl", model_type=ModelType.EDM), kind, 120.0, 0.002)
    sampling = model.get_model_object("model_sampling")
    model.model.model_sampling = sampling
    data = {"edm": 1.0, "edm_playground_v2.5": 0.5}[kind]

    def denoised(x: Tensor, sigma: float) -> Tensor:
        variance = sigma**2 + data**2
        output = network(model, x / variance**0.5, math.log(sigma) / 4)
        return data**2 / variance * x + sigma * data / variance**0.5 * output

    patched = apply(model, theta=1.2)
    # eta 0.6 ends where Stable Diffusion's timestep 400 is: at a noise of 1.164 times the data's.
    for sigma, w in ((80.0, 1.2), (1.2 * data, 1.2), (1.1 * data, 0.0)):
        x = torch.randn(X) * (sigma**2 + data**2) ** 0.5
        high = denoised(x.double(), sigma)
        low = denoised(mean(x.double(), 2), sigma / 2)
        expected = high + w * repeat(low - mean(high, 2), 2)
        found = evaluate(patched, x, sigma, CONDS)
        error = float((found - expected).norm() / expected.norm())
        print(f"{kind}, sigma {sigma}: {error:.1e}")
        assert error <= 5e-6
        assert torch.equal(found, evaluate(model, x, sigma, CONDS)) == (w == 0)
