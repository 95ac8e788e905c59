"""The example "SDXL 2048 with HiDiffusion, then Inf-DiT to 8K", with tiny models in its graph."""

import json
import shutil

import pytest
import torch

from tests.hidiffusion.models import base_model, prompts, watch
from tools.comfy_server import ROOT

pytestmark = pytest.mark.comfy

WORKFLOW = json.loads((ROOT / "tests" / "workflows" / "sdxl_hidiffusion_8k.json").read_text())


def run(comfy, workflow, results):
    """Run the nodes of an API-format workflow in order; `results` of some are given."""
    from nodes import NODE_CLASS_MAPPINGS

    for key, node in workflow.items():
        if key in results:
            continue
        inputs = {
            name: results[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        if node["class_type"] in comfy.nodes:
            results[key] = comfy.nodes[node["class_type"]].execute(**inputs).args
        else:
            made = NODE_CLASS_MAPPINGS[node["class_type"]]()
            results[key] = getattr(made, made.FUNCTION)(**inputs)
    return results


def tiny_vae():
    """A decoder of the real classes with random weights."""
    from comfy.sd import VAE
    from comfy.taesd.taesd import TAESD

    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(like.shape, generator=generator) * like[0].numel() ** -0.5
        if like.ndim > 1
        else torch.zeros_like(like)
        for key, like in TAESD().state_dict().items()
        if key.startswith("taesd_")
    }
    return VAE(sd=state | {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)})


@torch.inference_mode()
def test_the_graph_runs_from_noise_to_the_large_picture(comfy):
    folder = comfy.models_dir / "infdit"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "models" / "infdit_small.safetensors", folder)
    workflow = json.loads(json.dumps(WORKFLOW))
    workflow["5"]["inputs"] |= {"width": 128, "height": 96}
    workflow["6"]["inputs"] |= {"steps": 13}
    workflow["10"]["inputs"] |= {"preset": "draft"}
    workflow["4"]["inputs"] |= {"rau_net": "aggressive"}  # auto would take it for a native size
    del workflow["8"], workflow["11"]

    positive, negative = prompts()
    model = base_model("sdxl")
    seen = watch(model)
    given = {"1": (model, None, tiny_vae()), "2": (positive,), "3": (negative,)}
    results = run(comfy, workflow, given)
    assert [s[1] for s in seen] == [i < 2 for i in range(13)]
    assert [s[2] for s in seen] == [2 <= i < 5 for i in range(13)]
    assert results["7"][0].shape == (1, 96, 128, 3)
    picture, _ = results["10"]
    assert picture.shape == (1, 384, 512, 3)
    assert 0 <= picture.min() < picture.max() <= 1
    reduced = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 4).movedim(1, -1)
    assert (reduced - results["7"][0]).abs().mean() < 0.1, "the same picture, larger"
