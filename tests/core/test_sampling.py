"""Noise levels and solvers."""

import itertools
import math

import pytest
import torch

from infdit_core import bands, sampling
from infdit_core.edm import (
    SIGMA_MAX,
    SIGMA_MIN,
    edm_sigmas,
    partial_sigmas,
    preconditioning,
)
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.sampling import (
    PRESETS,
    SOLVER_PICTURES,
    SOLVERS,
    Preset,
    Step,
    check_sigmas,
    gaussian,
    sample,
)
from tests.goldens import golden, golden_cases, golden_condition, golden_model, random_condition


def kept(step: Step) -> Step:
    """A step whose pictures the solver does not write over."""
    return step._replace(x=step.x.clone(), denoised=step.denoised.clone())


@pytest.mark.parametrize("name", golden_cases("*/c_sampler_*.safetensors"))
def test_the_sampler_equals_the_release(name):
    tensors = golden(name)
    steps = []
    x = sample(
        golden_model(name.split("/")[0]),
        golden_condition(tensors),
        tensors["sigmas"],
        noise=tensors["noise"],
        callback=lambda step: steps.append(kept(step)),
    )
    torch.testing.assert_close(x, tensors["final"], atol=1e-4, rtol=0)
    torch.testing.assert_close(steps[0].x, tensors["x_init"])
    torch.testing.assert_close(steps[0].denoised, tensors["denoised_first"], atol=1e-5, rtol=0)
    assert [s.index for s in steps] == list(range(len(tensors["sigmas"]) - 1))


@pytest.mark.parametrize("name", golden_cases("*/c_sampler_*.safetensors"))
def test_sigmas_equal_the_release(name):
    expected = golden(name)["sigmas"]
    torch.testing.assert_close(edm_sigmas(len(expected) - 1), expected, rtol=1e-5, atol=1e-7)


def test_partial_sigmas_are_the_lower_end_of_the_schedule():
    assert torch.equal(partial_sigmas(20, 1.0), edm_sigmas(20))
    half = partial_sigmas(20, 0.5)
    assert len(half) == 11
    assert half[0] == pytest.approx(edm_sigmas(21)[10].item())
    assert half[-2:].tolist() == pytest.approx([SIGMA_MIN, 0])
    assert partial_sigmas(20, 0.5, math.inf)[0] == half[0]
    assert partial_sigmas(20, 0.0).tolist() == [0]
    assert len(partial_sigmas(6, 0.01)) == 2
    starts = [float(partial_sigmas(20, share / 10)[0]) for share in range(11)]
    assert starts == sorted(set(starts))
    with pytest.raises(ValueError, match=r"expected denoise in 0\.\.1, got 1\.5"):
        partial_sigmas(20, 1.5)


def test_infinite_rho_is_even_in_log_sigma():
    levels = edm_sigmas(9, rho=math.inf)
    ratios = levels[1:-1] / levels[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand(8))
    assert levels[[0, -2, -1]].tolist() == pytest.approx([SIGMA_MAX, SIGMA_MIN, 0])


def test_preconditioning_is_that_of_the_paper():
    sigma = torch.tensor([0.002, 0.5, 40.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, 0.5 * sigma / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_noise, sigma.log() / 4)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_solvers_reach_the_exact_solution_of_a_gaussian(solver, monkeypatch):
    """For data N(0, s²) the flow is x(sigma) = x0 · sqrt(s² + sigma²) / sqrt(s² + sigma0²)."""
    variance = 0.3**2

    def denoise(x, sigma):
        return x * variance / (variance + sigma**2)

    sigmas = [float(s) for s in edm_sigmas(200)]
    x = torch.tensor([3.0, -20.0])
    exact = x * (variance / (variance + sigmas[0] ** 2)) ** 0.5
    result = SOLVERS[solver](denoise, x, sigmas, lambda step: None)
    tolerance = {"euler": 3e-2}.get(solver, 1e-3)
    torch.testing.assert_close(result, exact, rtol=tolerance, atol=0)


def test_fast_is_nearer_to_the_solution_than_exact():
    """For data N(0, 0.3²), each with its own noise levels."""
    x = torch.linspace(-40, 40, 41, dtype=torch.float64)

    def denoise(x, sigma):
        return x * 0.3**2 / (0.3**2 + sigma**2)

    def error(preset):
        drawn = SOLVERS[preset.solver](
            denoise, x.clone(), preset.sigmas().tolist(), lambda step: None
        )
        return (drawn - x * 0.3 / (0.3**2 + 40**2) ** 0.5).abs().max()

    assert error(PRESETS["fast"]) < error(PRESETS["exact"])
    assert error(PRESETS["fast"]) < error(Preset("euler", 12)) / 5


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], r"that fall, at least two; got \(0,\): none"),
        ([1.0], r"that fall, at least two; got \(1,\): 1"),
        ([1.0, 2.0, 0.0], "that fall, .* 1, 2, 0"),
        ([1.0, 1.0, 0.0], "that fall"),
        ([2.0, math.nan, 0.0], "that fall, .* 2, nan, 0"),
        ([math.nan, 0.0], "that fall"),
        ([math.inf, 1.0, 0.0], "that fall, .* inf, 1, 0"),
        ([[1.0, 0.0]], r"that fall, .* \(1, 2\)"),
        ([4.0, -1.0], "that end at 0 or above; got -1"),
    ],
)
def test_bad_sigmas_are_refused(sigmas, message):
    with pytest.raises(ValueError, match=f"expected sigmas {message}"):
        check_sigmas(torch.tensor(sigmas))


def test_what_cannot_be_drawn_is_refused():
    model = golden_model("xs")
    noise, cond = random_condition(model, 1, 1)
    with pytest.raises(ValueError, match="that fall"):
        sample(model, cond, torch.tensor([1.0, 2.0]), noise=noise)
    with pytest.raises(ValueError, match="expected one of heun"):
        sample(model, cond, edm_sigmas(2), noise=noise, solver="magic")


@pytest.mark.parametrize("arguments", [(0,), (5, 0.0), (5, 2.0, 1.0)])
def test_bad_noise_levels_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        edm_sigmas(*arguments)


def straightforward(solver, denoise, x, sigmas):
    """The methods in new pictures, as they are written down."""
    history = []
    for sigma, following in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma
        if solver == "multistep":
            if following == 0:
                return denoised
            history = [d, *history][:4]
            for weight, d in zip(ADAMS_BASHFORTH[len(history)], history, strict=True):
                x = x + (following - sigma) * weight * d
            continue
        new = x + (following - sigma) * d
        if solver == "heun" and following > 0:
            d = (d + (new - denoise(new, following)) / following) / 2
            new = x + (following - sigma) * d
        x = new
    return x


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("last", [0.0, 0.1])
def test_solvers_work_in_place_to_the_bit(solver, last, monkeypatch):
    monkeypatch.setattr(bands, "_BAND", 100)

    def denoise(x, sigma):
        return (x / (1 + sigma)).sin()

    sigmas = [9.0, 5.0, 3.0, 2.0, 1.5, 0.7, last]
    x = torch.randn(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    expected, size = straightforward(solver, denoise, x, sigmas), x.nbytes
    for given in (x.clone(), x.clone(memory_format=torch.channels_last)):
        found = SOLVERS[solver](denoise, given, sigmas, lambda step: None)
        assert torch.equal(found, expected)
    x = x.clone()
    with LiveBytes() as live:  # x is not counted, what sin takes is
        SOLVERS[solver](denoise, x, sigmas, lambda step: None)
    assert live.peak <= (SOLVER_PICTURES[solver] - 1 + 1) * size + 4 * 400


@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (2, 3, 8, 24), (1, 3, 33, 7), (1, 3, 1, 5)])
def test_noise_in_pieces_is_that_of_one_call(shape, monkeypatch):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for piece in (16, 48, 2**20):
        monkeypatch.setattr(sampling, "_PIECE", piece)
        for rows in (slice(None), slice(1, 3), slice(3, 4)):
            found = torch.cat([*gaussian(shape, 5, rows), torch.empty(0)])
            assert torch.equal(found, whole[..., rows, :].flatten())
