"""The example "SDXL 2048 with Upsample Guidance, then Inf-DiT to 8K", with tiny models."""

import json
import shutil

import pytest
import torch

from tests.hidiffusion.models import base_model, prompts
from tests.hidiffusion.test_workflow import run, tiny_vae
from tools.comfy_server import ROOT

pytestmark = pytest.mark.comfy

WORKFLOW = (ROOT / "tests" / "workflows" / "sdxl_upsample_guidance_8k.json").read_text()


@torch.inference_mode()
def test_the_graph_runs_from_noise_to_the_large_picture(comfy):
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "models" / "infdit_small.safetensors", folder)
    positive, negative = prompts()
    made = {}
    for scale in ("auto", "2"):  # auto takes this size for a native one
        workflow = json.loads(WORKFLOW)
        workflow["4"]["inputs"] |= {"scale": scale}
        workflow["5"]["inputs"] |= {"width": 128, "height": 96}
        workflow["6"]["inputs"] |= {"steps": 6}
        del workflow["8"], workflow["11"]
        given = {"1": (base_model("sdxl"), None, tiny_vae()), "2": (positive,), "3": (negative,)}
        made[scale] = run(comfy, workflow, given)
    assert not torch.equal(made["auto"]["6"][0]["samples"], made["2"]["6"][0]["samples"])
    picture, drawn = made["2"]["10"][0], made["2"]["7"][0]
    assert drawn.shape == (1, 96, 128, 3)
    assert picture.shape == (1, 384, 512, 3)
    reduced = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 4).movedim(1, -1)
    assert (reduced - drawn).abs().mean() < 0.1, "the same picture, larger"
