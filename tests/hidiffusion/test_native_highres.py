"""The arithmetic of benchmarks.native_highres, and the page that shows its result."""

import json
from collections import Counter

import pytest

from benchmarks.common import RESULTS, ROOT
from benchmarks.native_highres import Evaluation, diffusehigh, methods, tables


@pytest.mark.comfy
def test_evaluations_of_a_run_at_2048(hi, rules):
    from comfy.model_sampling import ModelSamplingDiscrete

    calls = {
        name: found
        for name, (found, _) in methods(hi, rules, ModelSamplingDiscrete(), 2048).items()
    }
    assert calls["HiDiffusion"] == {
        Evaluation(2048, rad=True, windows=True): 4,
        Evaluation(2048, pool=True, windows=True): 8,
        Evaluation(2048, windows=True): 18,
    }
    # Thirty timesteps at equal distances; 18 of them are above 400.
    assert calls["Upsample Guidance"] == {Evaluation(2048): 30, Evaluation(1024): 18}
    assert calls["DiffuseHigh"] == {
        Evaluation(1024): 30,
        Evaluation(1536): 15,
        Evaluation(2048): 15,
    }


@pytest.mark.comfy
def test_at_native_size_only_windows_differ(hi, rules):
    from comfy.model_sampling import ModelSamplingDiscrete

    for calls, _ in methods(hi, rules, ModelSamplingDiscrete(), 1024).values():
        assert [call._replace(windows=False) for call in calls] == [Evaluation(1024)]
        assert calls.total() == 30


def test_the_vae_works_once_a_stage_and_once_a_guided_step():
    _, pictures = diffusehigh(1536)
    assert pictures == Counter({("decode", 1024): 1, ("encode", 1536): 6, ("decode", 1536): 6})


def test_the_page_shows_what_was_counted():
    result = json.loads((RESULTS / "native_highres.json").read_text(encoding="utf-8"))
    assert tables(result) in (ROOT / "docs" / "native_highres.md").read_text(encoding="utf-8")
