"""DiMR sampled through ComfyUI: what the authors drew, and ComfyUI's own ways to sample."""

import importlib
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from infdit_core.__main__ import main
from infdit_core.dimr.load import load_model
from infdit_core.dimr.sampling import LATENT_SCALE, sample
from tests.goldens import golden, golden_path

pytestmark = pytest.mark.comfy

RUNS = json.loads(golden_path("dimr/tiny_2r_sampler.json").read_text())


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def ksample(classes):
    """The result of KSampler from an empty latent, or from `latent`."""

    def run(model, steps=4, cfg=1.4, sampler="euler", scheduler="normal", latent=None, denoise=1.0,
            asked=207):  # fmt: skip
        from nodes import KSampler

        latent = {"samples": torch.zeros(1, 4, 32, 32) if latent is None else latent}
        return KSampler().sample(
            model, 0, steps, cfg, sampler, scheduler, *classes(asked), latent, denoise
        )[0]["samples"]

    return run


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_the_authors_runs(comfy, dimr, custom, run):
    tensors = golden("dimr/tiny_2r_sampler.safetensors")
    model = dimr()
    if run["cfg_scale_pow"] > 0:
        decay = comfy.nodes["DiMRCFGDecay"]
        model = decay.execute(model, run["cfg_flag"], run["cfg_scale_pow"]).args[0]
    asked = ", ".join(map(str, run["class"]))
    cfg = 1.0 if run["cfg_scale_pow"] > 0 else 1.4  # which the decay does not read
    latent = custom(model, tensors[f"{run['name']}.z"], asked, run["steps"], cfg)
    assert relative(latent * LATENT_SCALE, tensors[f"{run['name']}.final"]) < 1e-5


@pytest.mark.parametrize("free", [0, 2**40])
def test_the_bits_of_the_command_line_however_much_memory_is_free(dimr, custom, monkeypatch, free):
    model, noise = dimr(), torch.randn(2, 4, 32, 32)
    monkeypatch.setattr(type(model), "get_free_memory", lambda *_: free)
    net = load_model(golden_path("dimr/tiny_2r.safetensors"), heads=4)
    expected = sample(net, noise, torch.tensor([3, 207]), evaluations=8)
    assert torch.equal(custom(model, noise, "3, 207", 8), expected / LATENT_SCALE)


def test_the_command_line_draws_the_same(comfy, dimr, custom, tmp_path):
    path = comfy.models_dir / "infdit" / "2r.safetensors"
    model = dimr()  # which writes the file
    asked = ["--class", "3", "--class", "golden retriever", "--count", "3", "--seed", "5"]
    fixed = ["--evaluations", "7", "--device", "cpu", "--model", str(path)]
    noise = torch.randn(3, 4, 32, 32, generator=torch.manual_seed(5))  # as comfy.sample draws it
    decay = comfy.nodes["DiMRCFGDecay"].execute(model, 3.0, 2.0).args[0]
    runs = {"plain": (model, []), "decay": (decay, ["--cfg", "3", "--cfg-exponent", "2"])}
    for name, (drawn_with, options) in runs.items():
        assert main(["generate", *fixed, *asked, "-o", str(tmp_path / name), *options]) == 0
        files = sorted((tmp_path / name).iterdir(), key=lambda file: file.stem.split("_")[-1])
        found = torch.cat([load_file(file)["latent_tensor"] for file in files])
        nodes = custom(drawn_with, noise, "3, golden retriever", 7)
        if name == "plain":
            assert torch.equal(found, nodes)
        assert relative(found, nodes) < 1e-5


def test_pictures_of_a_batch_take_turns(dimr, custom):
    noise = torch.randn(3, 4, 32, 32)
    both = custom(dimr(), noise, "goldfish\n207", 3)
    for picture, number in enumerate([1, 207, 1]):
        alone = custom(dimr(), noise[picture : picture + 1], number, 3)
        assert relative(both[picture : picture + 1], alone) < 1e-5
    assert relative(custom(dimr(), noise[:1], 5, 3), both[:1]) > 1e-4


def test_zeroed_out_conditioning_is_that_of_no_class(dimr, classes, custom):
    from nodes import ConditioningZeroOut

    (zeroed,) = ConditioningZeroOut().zero_out(classes("3")[0])
    conds = dimr().model.extra_conds
    noise = {"noise": torch.zeros(1, 4, 32, 32), "device": "cpu"}
    found = conds(**zeroed[0][1], cross_attn=zeroed[0][0], **noise)
    assert found["classes"].cond.tolist() == [1000]


def test_the_noise_schedule_is_core_sd15s_with_times_between(dimr):
    from comfy.model_sampling import ModelSamplingDiscrete

    ours, core = dimr().get_model_object("model_sampling"), ModelSamplingDiscrete()
    torch.testing.assert_close(ours.sigmas, core.sigmas)
    index = torch.tensor([0.0, 0.5, 499.25, 999.0])
    torch.testing.assert_close(ours.timestep(ours.sigma(index)), index)
    assert ours.timestep(torch.tensor([1e9, 1e-9])).tolist() == [999, 0]
    log_alpha = -torch.log1p(ours.sigma(torch.tensor([10.0, 10.25, 11.0])) ** 2).double() / 2
    between = (log_alpha[0] * 0.75 + log_alpha[2] * 0.25).item()
    assert log_alpha[1].item() == pytest.approx(between, rel=1e-5)
    assert ours.percent_to_sigma(0.5) == pytest.approx(core.percent_to_sigma(0.5), rel=1e-3)


def test_ksampler_with_previews_and_progress(dimr, ksample, monkeypatch):
    import comfy.utils
    import latent_preview

    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **_: told.append(args))
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    method = latent_preview.LatentPreviewMethod.Latent2RGB
    monkeypatch.setattr(latent_preview.args, "preview_method", method)
    latent = ksample(dimr(), steps=3)
    assert latent.shape == (1, 4, 32, 32)
    shown = [preview for _, _, preview in told if preview is not None]
    assert [value for value, total, preview in told if preview is not None] == [1, 2, 3]
    assert shown[0][1].size == (32, 32)


def test_dimr_sampler_reports_every_evaluation_and_can_be_cancelled(dimr, custom, monkeypatch):
    import comfy.utils
    from comfy.model_management import InterruptProcessingException

    told = []

    def hook(value, total, preview, **_):
        told.append((value, total))
        if len(told) > 1 and value == stop:
            raise InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    noise, stop = torch.randn(1, 4, 32, 32), None
    custom(dimr(), noise, 3, 5)
    assert told == [(n, 5) for n in range(1, 6)]
    told.clear()
    stop = 2
    with pytest.raises(InterruptProcessingException):
        custom(dimr(), noise, 3, 5)
    assert len(told) == 2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "uni_pc", "lcm"])
def test_other_samplers_draw_the_same_kind_of_latent(dimr, ksample, sampler):
    latent = ksample(dimr(), steps=6, sampler=sampler, scheduler="karras")
    assert latent.isfinite().all()
    assert 1 < latent.std() * LATENT_SCALE < 60  # of this random network; 21 as recorded


def test_the_solver_with_noise_levels_of_core(dimr, custom):
    """To 0, in two parts and from a picture; only the authors' end is put into their scale."""
    from comfy.samplers import calculate_sigmas

    model, noise = dimr(), torch.randn(1, 4, 32, 32)
    sampling = model.get_model_object("model_sampling")
    sigmas = calculate_sigmas(sampling, "simple", 6)  # steps of 3, 2 and 1 evaluations
    whole = custom(model, noise, 3, sigmas=sigmas)
    assert whole.isfinite().all()
    nothing = torch.zeros_like(noise)
    part = custom(model, noise, 3, sigmas=sigmas[:6])
    assert relative(custom(model, nothing, 3, sigmas=sigmas[5:], latent=part), whole) < 1e-5
    picture = torch.randn(1, 4, 32, 32)
    near = custom(model, noise, 3, sigmas=sigmas[-3:], latent=picture)
    assert (near - picture).norm() < (near - whole).norm()
    untouched = custom(model, nothing, 3, sigmas=sigmas[:1], latent=picture)
    torch.testing.assert_close(untouched, picture)

    ends = calculate_sigmas(sampling, "simple", 7)
    ends[-1] = sampling.sigma_min
    assert all(a > b for a, b in pairwise(ends.tolist()))
    above = ends.clone()
    above[-1] *= 1.001
    scaled, plain = (custom(model, noise, 3, sigmas=levels) for levels in (ends, above))
    assert relative(scaled * (1 + sampling.sigma_min**2).sqrt(), plain) < 1e-4
    assert relative(scaled, plain) > 3e-4


@pytest.mark.parametrize("levels", [[5.0, 5.0, 0.0], [1.0, 2.0], [1.0, float("nan")]])
def test_noise_levels_that_do_not_fall_are_refused(comfy, dimr, custom, levels):
    error = comfy.module("infdit_core.errors").InfDiTError
    with pytest.raises(error, match=r"DiMR Sampler: expected falling noise levels.*; got [15]"):
        custom(dimr(), torch.randn(1, 4, 32, 32), 3, sigmas=torch.tensor(levels))


def test_the_decay_guides_where_sampling_ends_and_not_where_it_starts(comfy, dimr):
    from comfy.samplers import cfg_function

    model = dimr()
    decayed = comfy.nodes["DiMRCFGDecay"].execute(model, 3.0, 2.0).args[0]
    assert "sampler_cfg_function" not in model.model_options
    assert decayed.model_options["disable_cfg1_optimization"]
    cond, uncond, x = (torch.randn(1, 4, 2, 2) for _ in range(3))
    sampling = importlib.import_module("comfy.model_sampling").ModelSamplingDiscrete()
    for sigma, scale in ((sampling.sigma_max, 1.0), (sampling.sigma_min, 3.0)):
        guided = cfg_function(
            model.model, cond, uncond, 1.0, x, sigma.view(1), decayed.model_options
        )
        torch.testing.assert_close(guided, uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-4)
