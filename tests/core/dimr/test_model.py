"""The network against recordings of the authors' code."""

import json
import re

import pytest
import torch

from infdit_core.dimr.config import G_2R, XL_2R, DiMRConfig
from infdit_core.dimr.model import DiMR
from infdit_core.dimr.names import release_shapes
from tests.goldens import golden, golden_dimr, golden_path

MODULES = {
    "stages.0.blocks.0": "stages.0.blocks.0",
    "stages.0.blocks.2": "stages.0.blocks.2",
    "stages.0.blocks.4": "stages.0.blocks.4",
    "stages.0.skip_denses.0": "stages.0.skips.0",
    "stages.1.blocks.0.block1": "stages.1.blocks.0.mixer",
    "stages.1.blocks.4": "stages.1.blocks.4",
    "stages.1.upsample": "stages.1.enlarge",
    "stages.1.upsample.0": "stages.1.enlarge.norm_in",
    "tokens_stages.0.blocks.0.block1.norm": "stages.0.blocks.0.mixer.norm",
}
"""Recorded outputs, and which modules of ours make them."""


def cases(name):
    return json.loads(golden_path(f"dimr/{name}.json").read_text())["cases"]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["tiny_2r", "tiny_3r"])
def test_every_stage_at_every_time_and_class(name):
    model, recorded = golden_dimr(name), golden(f"dimr/{name}_forward.safetensors")
    for case in cases(name):
        x = recorded["x"][: case["batch"]]
        t, classes = torch.tensor(case["t"]), torch.tensor(case["class"])
        outputs = model.outputs(x, t.expand(len(x)), classes)
        for n, eps in enumerate(outputs):
            close(eps, recorded[f"{case['name']}.stage{n}"])
        close(model(x, t.expand(len(x)), classes), outputs[-1])


def test_inside_the_network():
    model, recorded = golden_dimr("tiny_2r"), golden("dimr/tiny_2r_intermediates.safetensors")
    modules, found = dict(model.named_modules()), {}
    for theirs, ours in MODULES.items():

        def keep(module, args, out, name=theirs):
            found[name] = out

        modules[ours].register_forward_hook(keep)
    x = golden("dimr/tiny_2r_forward.safetensors")["x"][:1]
    model(x, torch.tensor([0.75]), torch.tensor([999]))
    for name, out in found.items():
        close(out[:, ::4, ::4] if out.ndim == 4 else out, recorded[name])
    for time in (1, 500, 750, 1000):
        s = torch.tensor([2 * time / 1000 - 1])
        norm = modules["stages.0.blocks.0.mixer.norm"]
        close(norm.scale(s, torch.zeros(1, 48)), recorded[f"scale_t{time:04}"])


@pytest.mark.parametrize(
    ("name", "config", "count"), [("XL", XL_2R, 505_046_408), ("G", G_2R, 1_056_352_904)]
)
def test_the_released_models_have_exactly_these_tensors(name, config, count):
    lines = golden_path(f"dimr/keys_DiMR-{name}_2R.tsv").read_text().splitlines()[1:]
    listed = {key: tuple(map(int, s.split("x"))) for key, s in (line.split() for line in lines)}
    assert release_shapes(config) == listed
    assert sum(torch.Size(shape).numel() for shape in listed.values()) == count
    assert DiMRConfig.from_shapes(listed) == config
    assert sum(p.numel() for p in DiMR(config, device="meta").parameters()) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.0.input_layer.1.weight": (48, 4, 4, 4)}, "image_input_ratio is not supported"),
        ({"stages.0.class_embeds.weight": (11, 48)}, "1000 classes and one for none, got 11"),
        ({"stages.0.blocks.5.block1.norm.scale.param0": (48,)}, "odd number of blocks"),
        ({"stages.9.blocks.0.block1.dense.bias": (48,)}, "stages 0, 1, ...; got [0, 1, 9]"),
        ({"stages.1.input_layer.1.weight": (24, 4)}, "has shape (24, 4), expected 4 dimensions"),
        ({"stages.0.input_layer.1.weight": (50, 4, 2, 2)}, "50 is not a multiple of 4 heads"),
        ({"stages.1.blocks.0.block2.w0.weight": (2**17, 24)}, "expected sizes of 1 to 65536"),
    ],
)
def test_sizes_that_contradict_each_other(change, message):
    shapes = release_shapes(golden_dimr("tiny_2r").config)
    with pytest.raises(ValueError, match=re.escape(message)):
        DiMRConfig.from_shapes(shapes | change, heads=4)
