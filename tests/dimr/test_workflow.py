"""The example "DiMR class to 1024 with Inf-DiT", with tiny models in its graph."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.hidiffusion.test_workflow import run, tiny_vae
from tools.comfy_server import ROOT

pytestmark = pytest.mark.comfy

WORKFLOW = json.loads((ROOT / "tests" / "workflows" / "dimr_1024.json").read_text())


@torch.inference_mode()
def test_the_graph_runs_from_the_class_to_the_large_picture(comfy, dimr):
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    dimr()
    shutil.copy(ROOT / "models" / "infdit_small.safetensors", comfy.models_dir / "infdit")
    comfy = replace(comfy, nodes=comfy.nodes | {"SamplerCustom": SamplerCustom})
    workflow = json.loads(json.dumps(WORKFLOW))
    workflow["1"]["inputs"]["model_name"] = "2r.safetensors"
    workflow["3"]["inputs"]["evaluations"] = 3
    workflow["10"]["inputs"]["upscale_by"] = 2.0
    del workflow["8"], workflow["11"]
    made = run(comfy, workflow, {"6": (tiny_vae(),)})
    assert made["2"][0][0][1]["dimr_classes"] == (207,)
    drawn, picture = made["7"][0], made["10"][0]
    assert drawn.shape == (1, 256, 256, 3)
    assert picture.shape == (1, 512, 512, 3)
    reduced = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 2).movedim(1, -1)
    assert (reduced - drawn).abs().mean() < 0.1, "the same picture, larger"
