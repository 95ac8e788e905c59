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


def smooth(x: Tensor, timesteps: Tensor, *args, **kwargs) -> Tensor:
    """In the UNet's place: a function of picture and time that enlarges no rounding error."""
    neighbours = F.avg_pool2d(x, 3, stride=1, padding=1)
    return (
        torch.tanh(x - neighbours.roll(1, dims=1)) * (1 + timesteps / 300).view(-1, 1, 1, 1).cos()
    )


def network(x: Tensor, timestep: float) -> Tensor:
    return smooth(x, torch.full((len(x),), float(timestep)))


@pytest.fixture
def model(comfy, monkeypatch):
    """A model of a kind, with the noise levels that one of ComfyUI's nodes gives it."""

    def make(kind, node, *settings):
        model = base_model("sdxl", model_type=kind)
        monkeypatch.setattr(model.model.diffusion_model, "_forward", smooth)
        (model,) = core_node("nodes_model_advanced", node)().patch(model, *settings)
        # As loading the model does.
        model.model.model_sampling = model.get_model_object("model_sampling")
        return model

    return make


def mean(x: Tensor, m: int) -> Tensor:
    return F.avg_pool2d(x, m)


def repeat(x: Tensor, m: int) -> Tensor:
    return x.repeat_interleave(m, 2).repeat_interleave(m, 3)


def paper(noises: Tensor, x: Tensor, t: int, m: int, w: float) -> Tensor:
    """x0' by the paper's formula in eps and scales whose squares add up to 1, for a v network."""
    abar = float(1 / (1 + noises[t].double() ** 2))

    def eps(x: Tensor, abar: float, timestep: int) -> Tensor:
        return (1 - abar) ** 0.5 * x + abar**0.5 * network(x, timestep)

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
def test_v_and_zero_terminal_snr(model, apply, zsnr, t, m):
    from comfy.model_base import ModelType

    plain = model(ModelType.V_PREDICTION, "ModelSamplingDiscrete", "v_prediction", zsnr)
    noises = plain.model.model_sampling.sigmas
    assert float(noises[-1]) > 4000 or not zsnr
    sigma = float(noises[t])
    x = torch.randn(X) + sigma * torch.randn(X)
    found = evaluate(apply(plain, scale=str(m), theta=0.8), x, sigma, conditions("sdxl", 2))
    expected = paper(noises, x, t, m, 0.8)
    error = float((found - expected).norm() / expected.norm())
    print(f"zsnr {zsnr}, t {t}, m {m}: {error:.1e}")
    assert error <= 2e-6


@pytest.mark.parametrize(("target", "data", "sign"), [("edm", 0.5, 1), ("v_prediction", 1.0, -1)])
def test_continuous_noise_levels(model, apply, target, data, sign):
    """EDM's target as in Playground 2.5, v as in CosXL."""
    from comfy.model_base import ModelType

    plain = model(ModelType.EDM, "ModelSamplingContinuousEDM", target, 120.0, 0.002)

    def denoised(x: Tensor, sigma: float) -> Tensor:
        variance = sigma**2 + data**2
        output = network(x / variance**0.5, math.log(sigma) / 4)
        return data**2 / variance * x + sign * sigma * data / variance**0.5 * output

    # eta 0.6 ends where Stable Diffusion's timestep 400 is: at a noise of 1.164 times the data's.
    for sigma, w in ((80.0, 1.2), (1.2 * data, 1.2), (1.1 * data, 0.0)):
        x = torch.randn(X) * (sigma**2 + data**2) ** 0.5
        high = denoised(x.double(), sigma)
        low = denoised(mean(x.double(), 2), sigma / 2)
        expected = high + w * repeat(low - mean(high, 2), 2)
        conds = conditions("sdxl", 2)
        found = evaluate(apply(plain, theta=1.2), x, sigma, conds)
        error = float((found - expected).norm() / expected.norm())
        print(f"{target}, sigma {sigma}: {error:.1e}")
        assert error <= 2e-6
        assert torch.equal(found, evaluate(plain, x, sigma, conds)) == (w == 0)
