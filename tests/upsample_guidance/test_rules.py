"""When, where and how strongly Upsample Guidance works. Needs no ComfyUI."""

import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.goldens import golden_path
from tools.comfy_server import ROOT

# The package `nodes` around it imports ComfyUI; this module does not.
_SPEC = importlib.util.spec_from_file_location(
    "upsample_guidance_rules", ROOT / "nodes" / "upsample_guidance" / "rules.py"
)
rules = sys.modules["upsample_guidance_rules"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rules)
Guided, Window = rules.Guided, rules.Window


def test_the_window_is_the_recorded_one():
    cases = json.loads(golden_path("upsample_guidance/guidance.json").read_text())["cases"]
    for case in cases:
        window = Window(case["theta"], case["eta"], 0.0)
        steps = case["steps_info"]
        assert [window.weight(step["t"]) for step in steps] == [step["w"] for step in steps]


def test_its_end_is_not_in_it():
    """Whatever 1 - eta is rounded to."""
    for percent in range(1, 101):
        window, end = Window(1.2, percent / 100, 0.0), 1000 - 10 * percent
        assert [window.weight(t) for t in (end - 1, end, end + 1, 999)] == [0, 0, 1.2, 1.2], percent


def test_a_ramp_falls_to_zero_at_the_end_of_the_window():
    window = Window(2.0, 0.5, 0.4)  # timesteps 500 to 700 of 500 to 1000
    weights = [window.weight(t) for t in (400, 500, 550, 600, 650, 700, 701, 999)]
    assert weights == pytest.approx([0, 0, 0.5, 1, 1.5, 2, 2, 2])
    assert Window(0.0, 0.5, 0.4).closed
    assert Window(1.0, 0.0, 0.4).closed
    assert [Window(1.0, 0.0, 0.4).weight(t) for t in (0, 999)] == [0, 0]


@pytest.mark.parametrize(
    ("pixels", "native", "m"),
    [
        ((1024, 1024), 128, 1), ((768, 1344), 128, 1), ((1408, 1408), 128, 1),
        ((1536, 1536), 128, 2), ((2048, 2048), 128, 2), ((1536, 2688), 128, 2),
        ((2560, 2560), 128, 3), ((3072, 3072), 128, 3), ((4096, 4096), 128, 4),
        ((8192, 8192), 128, 4), ((1024, 1024), 64, 2), ((1536, 1536), 96, 2), ((64, 64), 64, 1),
    ],
)  # fmt: skip
def test_auto_comes_nearest_to_the_native_size(pixels, native, m):
    assert rules.auto_scale((pixels[0] // 8, pixels[1] // 8), native) == m


def test_what_does_not_divide_is_not_guided():
    guided = Guided((25, 38), 3)
    high, low = torch.randn(2, 4, 25, 38), torch.randn(2, 4, 8, 12)
    result = guided.guide(high, low, torch.tensor([1.0, 0.5]).view(2, 1, 1, 1))
    inside = result[:, :, :24, 1:37]
    assert torch.equal(inside, guided._cut(result))
    torch.testing.assert_close(F.avg_pool2d(inside, 3)[0], low[0])
    torch.testing.assert_close(F.avg_pool2d(inside, 3)[1], (low[1] + guided.mean(high)[1]) / 2)
    # Within a cell the picture keeps its detail.
    detail = inside - guided.enlarge(guided.mean(result))[:, :, :24, 1:37]
    plain = (high - guided.enlarge(guided.mean(high)))[:, :, :24, 1:37]
    torch.testing.assert_close(detail, plain, atol=1e-5, rtol=0)
    rest = torch.ones(25, 38, dtype=torch.bool)
    rest[:24, 1:37] = False
    assert torch.equal(result[:, :, rest], high[:, :, rest])


def test_a_mask_stays_a_mask():
    guided = Guided((8, 12), 2)
    mask = (torch.rand(1, 1, 8, 12) > 0.5).float()
    image = torch.randn(1, 4, 8, 12)
    low = guided.concat(torch.cat([mask, image], 1), masks=1)
    assert torch.equal(low[:, :1], mask[:, :, ::2, ::2])
    torch.testing.assert_close(low[:, 1:], F.avg_pool2d(image, 2))
    torch.testing.assert_close(guided.concat(image, masks=0), F.avg_pool2d(image, 2))


def test_residuals_get_the_sizes_of_the_low_features():
    sizes = [(33, 47), (17, 24), (9, 12)]
    residuals = [torch.randn(1, 2, *size) for size in sizes]
    odd = torch.randn(1, 2, 5, 5)
    control = {"output": [*residuals, None], "middle": [residuals[2], odd]}
    low = Guided((33, 47), 2).control(control)
    assert [tuple(r.shape[-2:]) for r in low["output"][:3]] == [(16, 23), (8, 12), (4, 6)]
    expected = F.interpolate(residuals[1], (8, 12), mode="bicubic")
    assert torch.equal(low["output"][1], expected)
    assert low["output"][3] is None
    assert low["middle"][1] is odd
    low["output"].pop()
    assert control["output"][:3] == residuals
    assert len(control["output"]) == 4
    assert Guided((33, 47), 2).control(None) is None
