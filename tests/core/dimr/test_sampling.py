"""The noise schedule, the solver and both forms of guidance against the authors' runs."""

import json
import math

import pytest
import torch

from infdit_core.dimr.sampling import (
    cfg_decay,
    orders,
    sample,
    sigma_of,
    singlestep,
    time_of,
    uniform_sigmas,
)
from infdit_core.errors import InfDiTError
from tests.goldens import golden, golden_dimr, golden_path

RUNS = json.loads(golden_path("dimr/tiny_2r_sampler.json").read_text())
GUIDANCE = {"cfg": {"cfg_scale": 1.4}, "dit": {"cfg_scale": 3, "exponent": 2}}
"""By how the names of the runs begin."""


@pytest.fixture(scope="module")
def recorded():
    return golden("dimr/tiny_2r_sampler.safetensors")


def test_the_noise_schedule(recorded):
    knots = torch.arange(1, 1001, dtype=torch.float64) / 1000
    log_alpha = -torch.log1p(sigma_of(knots) ** 2) / 2
    theirs = recorded["log_alpha_discrete"]  # summed in float32
    torch.testing.assert_close(log_alpha.float(), theirs, rtol=1e-5, atol=2e-8)
    t = recorded["schedule.t"].double()
    torch.testing.assert_close(
        -sigma_of(t).log().float(), recorded["schedule.lambda"], atol=2e-5, rtol=0
    )
    between = torch.linspace(0.001, 1, 777, dtype=torch.float64)
    torch.testing.assert_close(time_of(sigma_of(between)), between, atol=1e-12, rtol=0)
    outside = time_of(torch.tensor([0.0, 0.01, 20.0, 1e9]))
    torch.testing.assert_close(outside, torch.tensor([0.001, 0.001, 1.0, 1.0]))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_a_whole_run(recorded, run):
    name, seen = run["name"], []

    def keep(index, x, denoised):
        seen.append((index, x, denoised))

    found = sample(
        golden_dimr("tiny_2r"),
        recorded[f"{name}.z"],
        torch.tensor(run["class"]),
        evaluations=run["steps"],
        callback=keep,
        **GUIDANCE[name[:3]],
    )
    expected = recorded[f"{name}.final"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert [index for index, _, _ in seen] == list(range(run["steps"]))
    sigmas = uniform_sigmas(run["steps"])
    times = time_of(sigmas[:-1].double())
    torch.testing.assert_close(times.float(), torch.tensor(run["calls_t"]), atol=1e-6, rtol=0)
    for n in range(4 if f"{name}.call_x" in recorded else 0):
        _, x, denoised = seen[n]
        scaled = x[:1] / (1 + sigmas[n] ** 2).sqrt()
        eps = (x[:1] - denoised[:1]) / sigmas[n]
        for ours, key in ((scaled, "call_x"), (eps, "call_eps")):
            theirs = recorded[f"{name}.{key}"][n]
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_the_orders_of_the_steps(run):
    assert orders(run["steps"]) == [update["order"] for update in run["updates"]]


def test_it_is_of_the_third_order():
    """D of a standard normal is x / (1 + sigma²), whose flow scales x by sqrt(1 + sigma²)."""

    def error(evaluations):
        sigmas = 10 * 0.01 ** torch.linspace(0, 1, evaluations + 1, dtype=torch.float64)
        x = torch.full((1, 1, 1, 1), math.sqrt(101), dtype=torch.float64)
        end = singlestep(lambda x, sigma: x / (1 + sigma**2), x, sigmas)
        return abs(end.item() / math.sqrt(1.01) - 1)

    assert error(107) < 2e-6
    assert error(107) / error(215) > 6


def test_sigmas_that_end_in_zero_end_in_the_denoised():
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.0])
    end = singlestep(lambda x, sigma: torch.full_like(x, sigma), torch.ones(1, 1, 2, 2), sigmas)
    assert torch.equal(end, torch.ones(1, 1, 2, 2))


def test_decaying_guidance():
    assert cfg_decay(1.0, 4.0, 2.0) == 1
    assert cfg_decay(0.0, 4.0, 2.0) == pytest.approx(4)
    assert cfg_decay(0.5, 3.0, 1.0) == pytest.approx(2)


@pytest.mark.parametrize("evaluations", [0, 1001])
def test_how_many_evaluations_there_can_be(evaluations):
    with pytest.raises(InfDiTError, match=f"expected 1 to 1000 evaluations, got {evaluations}"):
        uniform_sigmas(evaluations)
