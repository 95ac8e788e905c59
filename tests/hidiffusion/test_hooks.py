"""The pieces of HiDiffusion's hooks: dilation, windows, residuals, and when each is on."""

import pytest
import torch
import torch.nn.functional as F

from tests.hidiffusion.models import prompts, residuals

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("size", [(16, 16), (15, 9), (13, 14), (1, 2), (17, 19)])
def test_every_second_pixel_is_the_dilated_convolution(size):
    x, w, b = torch.randn(2, 3, *size), torch.randn(5, 3, 3, 3), torch.randn(5)
    dilated = F.conv2d(x, w, b, stride=4, padding=2, dilation=2)
    ours = F.conv2d(x[:, :, ::2, ::2], w, b, stride=2, padding=1)
    torch.testing.assert_close(ours, dilated)


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("size", [(16, 24), (15, 24), (9, 7), (1, 3), (1, 1)])
def test_windows_are_rolled_quarters_and_come_back(hi, size, quarters):
    h, w = size
    windows = hi.shifted_windows(size, quarters, None)
    tokens = torch.randn(2, h * w, 3)
    split = windows.split(tokens)
    assert torch.equal(windows.join(split), tokens)

    wh, ww = -(-h // 2), -(-w // 2)
    grid = tokens.view(2, h, w, 3).movedim(-1, 1)
    grid = F.pad(grid, (0, 2 * ww - w, 0, 2 * wh - h), mode="replicate")
    grid = grid.roll((-(wh // 4) * quarters, -(ww // 4) * quarters), (2, 3))
    quarter = [grid[:, :, a : a + wh, b : b + ww] for a in (0, wh) for b in (0, ww)]
    literal = torch.stack(quarter, 1).flatten(0, 1).flatten(2).transpose(1, 2)
    assert torch.equal(split, literal)


def test_residuals_take_the_size_of_the_features_they_meet(hi, rules):
    changes = hi.Changes(
        rules.SDXL, rules.feature_sizes(rules.SDXL, (33, 47), True, True), True, True
    )
    control = {
        "output": [None, *(torch.zeros(1, 1, 7, 7) for _ in range(8))],
        "middle": [torch.zeros(1, 1, 7, 7)],
        "input": [torch.zeros(1, 1, 7, 7) for _ in range(9)],
    }
    fitted = hi.fit_control(changes, control)
    assert fitted["output"][0] is None
    sizes = changes.sizes
    for i in range(1, 9):
        assert fitted["output"][i].shape[-2:] == sizes.skips[i]
        # T2I adapters' lists are taken from the end as well, but along the input blocks.
        assert fitted["input"][-1 - i].shape[-2:] == sizes.inputs[i]
    assert fitted["middle"][0].shape[-2:] == sizes.middle
    assert control["middle"][0].shape[-1] == 7
    same = torch.zeros(1, 1, *sizes.middle)
    assert hi.fit_control(changes, {"middle": [same]})["middle"][0] is same


def test_core_drops_residuals_of_another_size(hi, rules, unets, caplog):
    """The reason for fitting them."""
    changes = hi.Changes(
        rules.SDXL, rules.feature_sizes(rules.SDXL, (32, 32), True, False), True, False
    )
    positive, _ = prompts()
    control = residuals(1, 32, 32)
    for fitted, dropped in ((control, True), (hi.fit_control(changes, control), False)):
        caplog.clear()
        with torch.no_grad():
            unets["sdxl"](
                torch.zeros(1, 4, 32, 32), torch.tensor([1.0]), context=positive[0][0],
                y=positive[0][1]["pooled_output"], transformer_options=hi.install(changes, {}),
                control={k: list(v) for k, v in fitted.items()},
            )  # fmt: skip
        assert ("control could not be applied" in caplog.text) is dropped


def test_auto_follows_size_model_and_run(hi, rules):
    def phases(size, gentle=False, family=rules.SDXL, mode="AUTO", ratios=None, **run):
        patch = hi.Patch(family, hi.Mode[mode], True, ratios, 0, False, gentle)
        return patch.phases(size, hi.Run(**run))

    def both(rad, pool):
        return rules.Phases(rules.Phase(*rad), rules.Phase(*pool))

    aggressive = both((0, 0.16), (0.16, 0.4))
    assert phases((128, 128)) == rules.Phases()
    assert phases((128, 128), mode="AGGRESSIVE") == aggressive
    assert phases((256, 256)) == aggressive
    assert phases((256, 256), controlnet=True) == both((0, 0.16), (0.16, 0.5))
    assert phases((256, 256), gentle=True) == both((0, 0.0), (0, 0.4))
    assert phases((512, 512)) == both((0, 0.3), (0, 0.7))
    assert phases((512, 512), mode="AGGRESSIVE").rad == rules.Phase(0, 0.16)
    assert phases((256, 256), mode="OFF") == rules.Phases()
    assert phases((256, 256), deep_shrink=True) == rules.Phases()
    assert phases((64, 64), family=rules.SD15) == rules.Phases()
    assert phases((128, 128), family=rules.SD15) == both((0, 0.4), (0, 0.0))
    assert phases((256, 256), family=rules.SD15) == both((0, 0.7), (0, 0.3))
    assert phases((128, 128), family=rules.SDXL_TURBO).pool == rules.Phase(0, 0.5)
    own = rules.Ratios(0.6, 0.2, 0.3)
    assert phases((256, 256), ratios=own) == both((0, 0.3), (0.3, 0.6))
    assert phases((256, 256), ratios=own, mode="NORMAL") == both((0, 0.2), (0, 0.6))
