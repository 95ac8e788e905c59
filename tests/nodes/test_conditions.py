"""Two conditions in one sampling, and wrappers that change the noisy picture."""

from functools import partial

import pytest
import torch

from tests.nodes.test_nodes import ksampler

pytestmark = pytest.mark.comfy


@pytest.fixture
def guided(comfy, load):
    """Sample with cfg 2 and other guidance for the two conditions."""

    def run(reuse_layers=0):
        from comfy.sample import prepare_noise, sample

        model, image = load("vector")[0], torch.rand(1, 20, 12, 3, generator=generator(5))
        execute = comfy.nodes["InfDiTSchedule"].execute
        model = execute(model, "auto", 1, False, 0.0, reuse_layers).args[0]
        node = comfy.nodes["InfDiTConditioning"]
        vectors = torch.randn(2, 1, 16, generator=generator(6))
        (positive, latent, _), (negative, *_) = (
            node.execute(model, image, 4.0, vector).args for vector in vectors
        )
        start = latent["samples"]
        return sample(
            model, prepare_noise(start, 1), 2, 2.0, "heun", "karras", positive, negative, start,
            disable_pbar=True, seed=1,
        )  # fmt: skip

    return run


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("reuse_layers", [0, 1])
def test_two_conditions_share_the_plan_and_the_keys_of_the_lr_picture(
    comfy, guided, monkeypatch, reuse_layers
):
    models, planned, made = comfy.module("nodes.infdit.runs"), [], []
    network, adaptive = comfy.module("infdit_core.network.model").InfDiT, models.Adaptive
    lr_keys_values = network.lr_keys_values

    def counted(self, *args, **kwargs):
        made.append(1)
        return lr_keys_values(self, *args, **kwargs)

    monkeypatch.setattr(network, "lr_keys_values", counted)
    monkeypatch.setattr(models, "Adaptive", lambda *args: planned.append(1) or adaptive(*args))
    shared = guided(reuse_layers)
    assert (len(planned), len(made)) == (1, 1)
    monkeypatch.setattr(models.Runs, "are_of", lambda *_: False)
    torch.testing.assert_close(shared, guided(reuse_layers))
    assert (len(planned), len(made)) == (3, 3)


@pytest.mark.parametrize("node", ["InfDiTSampler", "KSampler"])
def test_a_wrapper_that_rolls_the_picture_is_refused(comfy, load, upscale, evaluations, node):
    model, image = load("tiny")[0], torch.rand(1, 10, 12, 3)

    def unet_wrapper(apply_model, args):
        return apply_model(args["input"].roll(8, -1), args["timestep"], **args["c"]).roll(-8, -1)

    def apply_wrapper(executor, x, *args, **kwargs):
        return executor(x.roll(8, -1), *args, **kwargs).roll(-8, -1)

    rolling, beside = model.clone(), model.clone()
    rolling.set_model_unet_function_wrapper(unet_wrapper)
    beside.add_wrapper("apply_model", apply_wrapper)
    run = upscale if node == "InfDiTSampler" else partial(ksampler, Unpatched(comfy, model))
    steps = {"steps": 2, "seed": 0}
    for wrong in (rolling, beside):
        with pytest.raises(ValueError, match=r"Inf-DiT.*: expected .*wrapper"):
            run(wrong, image, **steps)
    assert not evaluations
    harmless = model.clone()
    harmless.add_wrapper("apply_model", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert torch.equal(upscale(harmless, image), upscale(model, image))


class SeamSmoothing:
    def wrap(self, executor, *args, **kwargs):
        raise AssertionError


def test_a_wrapper_that_nothing_calls_is_said(load, upscale, caplog):
    model = load("tiny")[0].clone()
    model.add_wrapper("diffusion_model", SeamSmoothing().wrap)
    assert upscale(model, torch.rand(1, 10, 12, 3)).isfinite().all()
    assert "SeamSmoothing is on the model and has no effect" in caplog.text


class Unpatched:
    """The pack, with Inf-DiT Conditioning of another model than the sampler's."""

    def __init__(self, comfy, model) -> None:
        node = comfy.nodes["InfDiTConditioning"]
        self.nodes = comfy.nodes | {"InfDiTConditioning": self}
        self.execute = lambda _, *args: node.execute(model, *args)
