"""DiMR inside ComfyUI, on the tiny model of the recordings."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.goldens import golden_path

HEADS = {"dimr.heads": "4"}


@pytest.fixture(scope="session")
def dimr(comfy):
    """Load tiny_2r by the loader node."""
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(golden_path("dimr/tiny_2r.safetensors")), folder / "2r.safetensors", HEADS)

    def load(dtype="fp32", name="2r.safetensors"):
        return comfy.nodes["DiMRLoader"].execute(name, dtype).args[0]

    return load


@pytest.fixture
def classes(comfy):
    """The two CONDITIONING of DiMR Class."""

    def run(text):
        return comfy.nodes["DiMRClass"].execute("0 tench", str(text)).args

    return run


@pytest.fixture
def custom(comfy, classes, monkeypatch):
    """The result of SamplerCustom with DiMR Sampler, from given noise (B, 4, 32, 32)."""

    def run(model, noise, asked, evaluations=10, cfg=1.4, sigmas=None, latent=None):
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        sampler, uniform = comfy.nodes["DiMRSampler"].execute(evaluations).args
        with monkeypatch.context() as patch:
            sample = importlib.import_module("comfy.sample")
            patch.setattr(sample, "prepare_noise", lambda *args: noise)
            return SamplerCustom.execute(
                model, True, 0, cfg, *classes(asked), sampler,
                uniform if sigmas is None else sigmas,
                {"samples": torch.zeros_like(noise) if latent is None else latent},
            ).args[0]["samples"]  # fmt: skip

    return run
