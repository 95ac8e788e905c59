"""The example "SDXL to 2K with DiffuseHigh, then Inf-DiT to 8K", with tiny models."""

import json
import shutil

import pytest
import torch

from tests.hidiffusion.models import base_model, prompts
from tests.hidiffusion.test_workflow import run
from tools.comfy_server import ROOT

pytestmark = pytest.mark.comfy

WORKFLOW = (ROOT / "tests" / "workflows" / "sdxl_diffusehigh_8k.json").read_text()


@torch.inference_mode()
def test_the_graph_runs_from_noise_to_the_large_picture(comfy, vae):
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "models" / "infdit_small.safetensors", folder)
    positive, negative = prompts()
    workflow = json.loads(WORKFLOW)
    workflow["4"]["inputs"] |= {"width": 64, "height": 48}
    workflow["5"]["inputs"] |= {"steps": 3}
    del workflow["8"], workflow["11"]
    given = {"1": (base_model("sdxl"), None, vae), "2": (positive,), "3": (negative,)}
    results = run(comfy, workflow, given)
    drawn, latent = results["7"]
    assert drawn.shape == (1, 96, 128, 3)
    assert latent["samples"].shape == (1, 4, 12, 16)
    picture = results["10"][0]
    assert picture.shape == (1, 384, 512, 3)
    reduced = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 4).movedim(1, -1)
    assert (reduced - drawn).abs().mean() < 0.1, "the same picture, larger"
