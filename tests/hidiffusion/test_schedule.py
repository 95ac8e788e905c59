"""HiDiffusion's blocks, steps and shifts, against the authors' arithmetic. Needs no ComfyUI."""

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest

from tests.goldens import golden_path
from tools.comfy_server import ROOT

# The package `nodes` around it imports ComfyUI; this module does not.
_SPEC = importlib.util.spec_from_file_location(
    "hidiffusion_rules", ROOT / "nodes" / "hidiffusion" / "rules.py"
)
schedule = sys.modules["hidiffusion_rules"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(schedule)
SDXL, SDXL_TURBO, SD15 = schedule.SDXL, schedule.SDXL_TURBO, schedule.SD15

REGIMES = {
    "sdxl_2048_aggressive": (SDXL, (256, 256), False, True),
    "sdxl_2048_normal": (SDXL, (256, 256), False, False),
    "sdxl_2048_controlnet": (SDXL, (256, 256), True, True),
    "sdxl_4096": (SDXL, (512, 512), False, False),
    "sdxl_turbo": (SDXL_TURBO, (256, 256), False, True),
    "sd15_1024": (SD15, (128, 128), False, True),
    "sd15_2048": (SD15, (256, 256), False, True),
}


def phases_of(regime):
    family, size, controlnet, aggressive = REGIMES[regime]
    ratios = schedule.official_ratios(family, size, controlnet)
    return schedule.phases(family, ratios, aggressive)


@pytest.mark.parametrize("regime", REGIMES)
def test_windows_by_step_are_the_official_ones_for_1_to_150_steps(regime):
    recorded = json.loads(golden_path("hidiffusion/windows.json").read_text())["windows"]
    phases = phases_of(regime)
    assert len(recorded) == 150
    for count, regimes in recorded.items():
        for name in ("rad", "pool"):
            assert getattr(phases, name).steps(int(count)) == range(*regimes[regime][name])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_windows_by_step_are_those_counted_in_the_authors_code(family):
    path = golden_path(f"hidiffusion/{family}/schedule_observed.json")
    observed = json.loads(path.read_text())["observed"]
    for regime, runs in observed.items():
        phases = phases_of(regime.removesuffix("_constants"))
        for count, run in runs.items():
            for name in ("rad", "pool"):
                steps = getattr(phases, name).steps(int(count))
                # The authors count on and start again after the last step.
                assert [i for i in range(run["calls"]) if i % int(count) in steps] == run[name]


@pytest.mark.parametrize("count", [4, 8, 20, 30, 50])
def test_the_aggressive_phases_follow_each_other(count):
    phases = phases_of("sdxl_2048_aggressive")
    rad, pool = phases.rad.steps(count), phases.pool.steps(count)
    assert rad == range(int(8 / 50 * count))
    assert pool == range(rad.stop, int(0.4 * count))


def test_only_one_side_below_the_limit_makes_it_the_smaller_regime():
    assert schedule.official_ratios(SDXL, (512, 504), False).t1 == 0.4
    assert schedule.official_ratios(SD15, (256, 256), False) == schedule.Ratios(0.7, 0.3)
    # ControlNet changes SDXL below 4096 only.
    assert schedule.official_ratios(SDXL, (512, 512), True).t1 == 0.7
    assert schedule.official_ratios(SD15, (128, 128), True).t1 == 0.4


@pytest.mark.parametrize(
    ("family", "size", "native"),
    [
        (SDXL, (128, 128), True),
        (SDXL, (152, 104), True),
        (SDXL, (80, 192), True),  # 640×1536, a size SDXL was trained at
        (SDXL, (128, 160), False),
        (SDXL, (256, 256), False),
        (SDXL_TURBO, (64, 64), True),
        (SDXL_TURBO, (128, 128), False),
        (SD15, (64, 64), True),
        (SD15, (64, 96), False),
    ],
)
def test_native_sizes(family, size, native):
    assert family.is_native(size) is native


def test_shifts_are_uniform_and_keyed_by_everything():
    def draw(seed=1, step=2, block=("input", 4), index=0):
        return [schedule.shift_quarters(seed + i, step, block, index) for i in range(64)]

    assert draw() == draw()
    for other in (draw(seed=100), draw(step=3), draw(block=("output", 4)), draw(index=1)):
        assert other != draw()
    counts = Counter(schedule.shift_quarters(0, step, ("input", 5), 1) for step in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(n - 1000) < 110 for n in counts.values()), "four standard deviations"


@pytest.mark.parametrize(("name", "family"), [("sdxl", SDXL), ("sd15", SD15)])
def test_sizes_of_skips_are_those_recorded(name, family):
    cases = json.loads(golden_path(f"hidiffusion/{name}/small.json").read_text())["cases"]
    for case in cases:
        size = case["H"], case["W"]
        active = case["active"]
        sizes = schedule.feature_sizes(family, size, active["rad"], active["pool"])
        recorded = case["sizes"]
        assert [list(s) for s in sizes.skips] == recorded["skip_sizes"], case["name"]
        assert list(sizes.middle) == recorded["mid_size"]
        outputs = [list(sizes.at(("output", i))) for i in range(family.blocks)]
        assert outputs == recorded["output_block_input_sizes"]
        for call in case["msw_calls"]:
            assert list(sizes.at(tuple(call["block"]))) == call["level_size"]


def test_a_family_without_rad_never_dilates():
    phases = schedule.phases(SDXL_TURBO, schedule.Ratios(0.5, 0.5), aggressive=True)
    assert phases.rad.steps(100) == range(0)
    assert replace(SDXL_TURBO, rad=6, native=128, name="SDXL") == SDXL
