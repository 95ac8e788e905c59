"""HiDiffusion in a real ComfyUI: parity with the authors' code, and behaviour under a KSampler."""

import importlib
import json
import logging
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.goldens import GOLDEN, SHARED, golden, golden_path

pytestmark = pytest.mark.comfy

DEFAULTS = {
    "preset": "auto",
    "rau_net": "auto",
    "window_attention": True,
    "t1": 0.4,
    "t2": 0.0,
    "aggressive_ratio": 0.16,
    "seed": 0,
    "timing": "sampler steps",
}


@pytest.fixture(scope="module")
def hi(comfy):
    """The module with the hooks."""
    return comfy.module("nodes.hidiffusion_patch")


@pytest.fixture(scope="module")
def rules(comfy):
    return comfy.module("nodes.hidiffusion_schedule")


def unet_arguments(name):
    return json.loads(golden_path(f"hidiffusion/{name}/config.json").read_text())[
        "comfy_unet_kwargs"
    ]


def unet_state(name, unet):
    """The recorded weights where they are at hand, else random ones."""
    path = golden_path(f"hidiffusion/{name}/unet_ldm.safetensors")
    if path.exists():
        prefix = "model.diffusion_model."
        return {k.removeprefix(prefix): v.float() for k, v in load_file(path).items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, like in unet.state_dict().items():
        if like.ndim > 1:
            state[key] = torch.randn(like.shape, generator=generator) * like[0].numel() ** -0.5
        else:
            state[key] = torch.full(like.shape, 0.0 if key.endswith("bias") else 1.0)
    return state


@pytest.fixture(scope="module")
def unets(comfy):
    """The tiny UNets that the recordings were made with."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init

    made = {}
    for name in ("sdxl", "sd15"):
        arguments = unet_arguments(name)
        unet = UNetModel(**arguments, dtype=torch.float32, operations=disable_weight_init)
        unet.load_state_dict(unet_state(name, unet))
        made[name] = unet.eval().requires_grad_(False)
    return made


def recorded(*names):
    """(family, file, case) of the recordings whose outputs and weights are at hand."""
    for name in names:
        path = golden_path(f"hidiffusion/{name}.json")
        if not path.exists():
            continue
        family = name.split("/")[0]
        if not golden_path(f"hidiffusion/{family}/unet_ldm.safetensors").exists():
            continue
        outputs = [root / f"hidiffusion/{name}.safetensors" for root in (GOLDEN, SHARED)]
        keys = {key for path in outputs if path.exists() for key in load_file(path)}
        for case in json.loads(path.read_text())["cases"]:
            # At odd sizes the authors resize the tokens where we repeat a row; and the input of
            # the largest case is not among the recordings.
            odd = any(call["odd"] for call in case["msw_calls"])
            if case["name"] in keys and not odd and case["H"] <= 256:
                marks = [pytest.mark.slow] * (case["H"] * case["W"] > 128 * 128)
                yield pytest.param(name, case, id=f"{name}-{case['name']}", marks=marks)


def recorded_output(name, key):
    for root in (GOLDEN, SHARED):
        path = root / f"hidiffusion/{name}.safetensors"
        if path.exists() and key in (outputs := load_file(path)):
            return outputs[key]
    raise KeyError(key)


def patch_of(hi, rules, family, case):
    """The settings under which a case was recorded."""
    name, official = case["name"], case["official"]
    mode, ratios = hi.Mode.AGGRESSIVE, None
    kind = rules.SDXL if family == "sdxl" else rules.SD15
    if name.startswith("both"):
        mode, ratios = hi.Mode.NORMAL, rules.Ratios(0.7, 0.3)
    elif name.startswith("pool") and family == "sd15":
        ratios = rules.Ratios(0.0, 0.3)
    elif name.startswith("normal"):
        mode = hi.Mode.NORMAL
    elif name.startswith("turbo"):
        kind = rules.SDXL_TURBO
    elif name.startswith("cn"):
        ratios = rules.official_ratios(kind, (32, 48), controlnet=True)
    if not official["apply_raunet"]:
        mode = hi.Mode.OFF
    return hi.Patch(kind, mode, official["apply_window_attn"], ratios, 0, False, False)


def evaluate(hi, rules, monkeypatch, unet, family, case, control=None):
    """One evaluation as recorded, with the recorded shifts; checks what was active."""
    shifts = {(*c["block"], c["block_index"]): c["k"] for c in case["msw_calls"]}
    monkeypatch.setattr(hi, "shift_quarters", lambda _, __, block, i: shifts[(*block, i)])
    b, h, w = case["B"], case["H"], case["W"]
    base = golden("hidiffusion/latents.safetensors")["base"].float()
    x = torch.cat([base[:, :, :h, :w], base[:, :, 256 - h :, 256 - w :]][:b])
    cond = golden(f"hidiffusion/{family}/cond.safetensors")

    sigmas = torch.linspace(case["num_steps"], 0, case["num_steps"] + 1)
    patch = patch_of(hi, rules, family, case)
    options = {"sample_sigmas": sigmas}
    plan = patch.plan(x, float(sigmas[case["step_index"]]), options, None)
    assert (plan.rad, plan.pool) == (case["active"]["rad"], case["active"]["pool"])
    assert set(plan.windows) == set(shifts)
    y = {"y": cond["y"][:b]} if "y" in cond else {}
    with torch.no_grad():
        return unet(
            x,
            torch.full((b,), case["timestep"]),
            context=cond["context"][:b],
            control=hi.fit_control(plan, control),
            transformer_options=hi.install(plan, options),
            **y,
        )


def assert_parity(found, expected):
    assert (found - expected).abs().max() <= 5e-4
    assert (found - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize(("name", "case"), list(recorded("sd15/small", "sdxl/small", "sdxl/large")))
def test_parity_with_the_authors(hi, rules, unets, monkeypatch, name, case):
    family = name.split("/")[0]
    found = evaluate(hi, rules, monkeypatch, unets[family], family, case)
    expected = recorded_output(name, case["output"]["key"])
    stride = case["output"]["stride"]
    assert_parity(found[:, :, ::stride, ::stride], expected)


@pytest.mark.parametrize(("name", "case"), list(recorded("sdxl/controlnet")))
def test_parity_with_the_authors_controlnet(hi, rules, unets, monkeypatch, name, case):
    tensors = golden(f"hidiffusion/{name}.safetensors")
    control = {
        "output": [tensors[f"residual_input_{i}"] for i in range(9)],
        "middle": [tensors["residual_middle"]],
    }
    before = {k: list(v) for k, v in control.items()}
    found = evaluate(hi, rules, monkeypatch, unets["sdxl"], "sdxl", case, control)
    assert_parity(found, tensors[case["output"]["key"]])
    for key, residuals in before.items():
        assert len(control[key]) == len(residuals), "the lists themselves were consumed"
        assert all(a is b for a, b in zip(control[key], residuals, strict=True))


# ---- the pieces


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
    plan = hi.Plan(rules.SDXL, rules.feature_sizes(rules.SDXL, (33, 47), True, True), True, True)
    control = {
        "output": [None, *(torch.zeros(1, 1, 7, 7) for _ in range(8))],
        "middle": [torch.zeros(1, 1, 7, 7)],
        "input": [torch.zeros(1, 1, 7, 7) for _ in range(9)],
    }
    fitted = hi.fit_control(plan, control)
    assert fitted["output"][0] is None
    sizes = plan.sizes
    for i in range(1, 9):
        assert fitted["output"][i].shape[-2:] == sizes.skips[i]
        # T2I adapters' lists are taken from the end as well, but along the input blocks.
        assert fitted["input"][-1 - i].shape[-2:] == sizes.inputs[i]
    assert fitted["middle"][0].shape[-2:] == sizes.middle
    assert control["middle"][0].shape[-1] == 7
    same = torch.zeros(1, 1, *sizes.middle)
    assert hi.fit_control(plan, {"middle": [same]})["middle"][0] is same


def test_auto_follows_size_model_and_run(hi, rules):
    def phases(size, inpainting=False, family=rules.SDXL, mode="AUTO", ratios=None, **run):
        patch = hi.Patch(family, hi.Mode[mode], True, ratios, 0, False, inpainting)
        return patch.phases(size, hi.Run(**run))

    def both(rad, pool):
        return rules.Phases(rules.Phase(*rad), rules.Phase(*pool))

    aggressive = both((0, 0.16), (0.16, 0.4))
    assert phases((128, 128)) == rules.Phases()
    assert phases((128, 128), mode="AGGRESSIVE") == aggressive
    assert phases((256, 256)) == aggressive
    assert phases((256, 256), controlnet=True) == both((0, 0.16), (0.16, 0.5))
    assert phases((256, 256), inpainting=True) == both((0, 0.0), (0, 0.4))
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


# ---- the node in a real KSampler


def base_model(name, dtype=torch.float32, manual_cast=None, **arguments):
    """A comfy BaseModel around the tiny UNet, in a ModelPatcher."""
    from comfy import latent_formats
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import BASE

    class Tiny(BaseModel):
        def encode_adm(self, **kwargs):
            return kwargs["pooled_output"] if self.adm_channels else None

    config = BASE({})
    config.unet_config = unet_arguments(name) | arguments
    config.latent_format = latent_formats.SDXL() if name == "sdxl" else latent_formats.SD15()
    config.set_inference_dtype(dtype, manual_cast)
    model = Tiny(config)
    if not arguments:
        state = unet_state(name, model.diffusion_model)
        model.diffusion_model.load_state_dict({k: v.to(dtype) for k, v in state.items()})
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(params=["sdxl", "sd15"])
def tiny(comfy, request):
    return base_model(request.param)


@pytest.fixture
def sdxl(comfy):
    return base_model("sdxl")


@pytest.fixture
def apply(comfy):
    def run(model, **settings):
        return (
            comfy.module("nodes.hidiffusion")
            .HiDiffusion.execute(model, **DEFAULTS | settings)
            .args[0]
        )

    return run


def prompts(control=None):
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 1, 7, 32, generator=generator)
    y = torch.randn(2, 1, 64, generator=generator)
    extra = {} if control is None else {"control": control, "control_apply_to_uncond": True}
    return [[[context[i], {"pooled_output": y[i], **extra}]] for i in (0, 1)]


def sample(
    model, steps=10, sampler="euler", scheduler="normal", size=(32, 40), cfg=4.0, seed=3,
    control=None, latent=None, **advanced,
):  # fmt: skip
    """What core's KSampler and KSamplerAdvanced nodes call."""
    from comfy.sample import prepare_noise, sample

    start = torch.zeros(1, 4, *size) if latent is None else latent
    noise = torch.zeros_like(start) if latent is not None else prepare_noise(start, seed)
    positive, negative = prompts(control)
    return sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, start,
        disable_pbar=True, seed=seed, **advanced,
    )  # fmt: skip


def watch(model):
    """Record (sigma, rad, pool, windows, batch, levels) of every evaluation of the UNet."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def look(executor, x, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[4]
        plan = options["hidiffusion"]
        order = {key: tuple(w.order.tolist()) for key, w in plan.windows.items()}
        sigma = float(options["sigmas"][0])
        levels = tuple(options.get("sample_sigmas", torch.empty(0)).tolist())
        seen.append((sigma, plan.rad, plan.pool, order, x.shape[0], levels))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    return seen


def forward(model, size=(32, 40)):
    """The unpatched UNet."""
    positive, _ = prompts()
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5))
    y = {"y": positive[0][1]["pooled_output"]} if model.model.adm_channels else {}
    with torch.no_grad():
        return model.model.diffusion_model(
            x, torch.tensor([500.0]), context=positive[0][0], transformer_options={}, **y
        )


def test_it_samples_and_leaves_the_plain_model_alone(tiny, apply):
    before, plain = forward(tiny), sample(tiny)
    state = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    options = repr(tiny.model_options)
    patched = apply(tiny, rau_net="aggressive")
    result = sample(patched)
    assert result.isfinite().all()
    assert (result - plain).norm() > 0.05 * plain.norm()
    assert torch.equal(sample(patched), result), "reproducible"
    assert torch.equal(forward(tiny), before)
    assert torch.equal(sample(tiny), plain)
    assert repr(tiny.model_options) == options
    assert not tiny.wrappers
    assert all(torch.equal(v, state[k]) for k, v in tiny.model.state_dict().items())


@pytest.mark.parametrize("cancel", [False, True])
def test_the_plain_model_is_the_same_after_an_error_or_a_cancel(tiny, apply, cancel, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    before, plain = forward(tiny), sample(tiny, steps=4)
    error = InterruptProcessingException if cancel else RuntimeError
    patched = apply(tiny, rau_net="aggressive", preset="custom", t1=1.0, t2=1.0)
    down = tiny.model.diffusion_model.input_blocks[6][0].op
    original, calls = down.forward, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error("in the convolution")
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(down, "forward", fail)
        with pytest.raises(error, match=None if cancel else "in the convolution"):
            sample(patched, steps=8)
    assert torch.equal(forward(tiny), before)
    assert torch.equal(sample(tiny, steps=4), plain)


def test_off_is_the_plain_model_bit_for_bit(tiny, apply):
    off = apply(tiny, rau_net="off", window_attention=False)
    assert torch.equal(sample(off), sample(tiny))
    native = apply(tiny, window_attention=False)
    assert torch.equal(sample(native), sample(tiny)), "auto leaves native sizes alone"


@pytest.mark.parametrize("size", [(33, 47), (38, 52), (31, 16)])
def test_any_size_comes_back(tiny, apply, size):
    patched = apply(tiny, rau_net="normal", preset="custom", t1=1.0, t2=1.0)
    result = sample(patched, steps=2, size=size)
    assert result.shape == (1, 4, *size)
    assert result.isfinite().all()


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "uni_pc"]
)
def test_the_steps_are_right_for_every_sampler(sdxl, apply, sampler):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    sample(patched, steps=10, sampler=sampler)
    windows = defaultdict(set)
    for sigma, rad, pool, order, _, levels in seen:
        assert len(levels) == 11
        step = max(i for i in range(10) if levels[i] >= sigma * 0.9999)
        assert (rad, pool) == (step == 0, 1 <= step <= 3), f"sigma {sigma}, step {step}"
        windows[step].add(order["output", 5, 0])
    assert sorted(windows) == list(range(10)), "every step was seen"
    assert all(len(orders) == 1 for orders in windows.values()), "one shift in a step"
    assert len({order for orders in windows.values() for order in orders}) == 4


def test_split_prompts_get_the_windows_of_joined_ones(sdxl, apply, monkeypatch):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    joined = sample(patched, steps=6)
    together, seen[:] = list(seen), []
    monkeypatch.setattr(sdxl.model, "memory_required", lambda *args, **kwargs: 1e30)
    split = sample(patched, steps=6)
    assert [s[4] for s in together] == [2] * 6
    assert [s[4] for s in seen] == [1] * 12
    assert seen[::2] == seen[1::2]
    assert [s[:4] for s in seen[::2]] == [s[:4] for s in together]
    assert (split - joined).norm() < 1e-4 * joined.norm()


def test_seed_and_settings_matter(sdxl, apply):
    size = {"size": (64, 64), "steps": 4}
    results = [
        sample(apply(sdxl, **settings), **size)
        for settings in (
            {"rau_net": "off"},
            {"rau_net": "off", "seed": 2**64 - 1},
            {"rau_net": "normal"},
            {"rau_net": "aggressive"},
            {"rau_net": "off", "window_attention": False},
            {"rau_net": "aggressive", "preset": "custom", "aggressive_ratio": 0.5, "t1": 0.8},
            {"rau_net": "normal", "preset": "SDXL-Turbo"},
        )
    ]
    assert torch.equal(results[2], results[3]), "4 steps are too few for the aggressive phase"
    for i in range(7):
        for j in range(i):
            if (i, j) != (3, 2):
                assert not torch.equal(results[i], results[j]), (i, j)


def test_the_stages_of_ksampler_advanced_share_one_schedule(sdxl, apply):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    sample(patched, steps=25)
    once, seen[:] = [s[:3] for s in seen], []
    first = sample(patched, steps=25, start_step=0, last_step=7, force_full_denoise=False)
    last = sample(patched, steps=25, start_step=7, latent=first)
    # "normal" spaces the steps evenly along the noise levels, so both timings agree.
    assert [s[:3] for s in seen] == once
    assert [s[1] for s in once] == [i < 4 for i in range(25)]
    assert [s[2] for s in once] == [4 <= i < 10 for i in range(25)]
    assert last.isfinite().all()


def test_image_to_image_counts_its_own_steps(sdxl, apply):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    sample(patched, steps=10, denoise=0.5)
    assert [s[1] for s in seen] == [i < 1 for i in range(10)]
    assert [s[2] for s in seen] == [1 <= i < 4 for i in range(10)]


def test_sigma_percent_goes_by_the_noise(sdxl, apply):
    sampling = sdxl.get_model_object("model_sampling")
    patched = apply(sdxl, rau_net="aggressive", timing="sigma percent")
    seen = watch(patched)
    sample(patched, steps=20, scheduler="karras")
    for sigma, rad, pool, *_ in seen:
        assert rad == (sigma > sampling.percent_to_sigma(0.16))
        assert pool == (sampling.percent_to_sigma(0.16) >= sigma > sampling.percent_to_sigma(0.4))
    assert sum(s[1] for s in seen) != 3, "Karras spends its steps elsewhere"


def test_an_evaluation_outside_a_sampler_is_timed_by_noise(sdxl, apply):
    patched = apply(sdxl, rau_net="aggressive")
    seen = watch(patched)
    options = patched.model_options["transformer_options"] | {"wrappers": patched.wrappers}
    positive, _ = prompts()
    for sigma in (14.0, 5.0, 0.5):
        sdxl.model.apply_model(
            torch.randn(1, 4, 16, 16),
            torch.tensor([sigma]),
            c_crossattn=positive[0][0],
            y=positive[0][1]["pooled_output"],
            transformer_options=options | {"sigmas": torch.tensor([sigma])},
        )
    assert [s[1:3] for s in seen] == [(True, False), (False, True), (False, False)]


def residuals(b, h, w):
    """What an SDXL ControlNet hands out for a latent of h×w."""
    sizes = [(h, w)] * 3 + [(h // 2, w // 2)] * 3 + [(h // 4, w // 4)] * 3
    channels = [32] * 7 + [64] * 2
    output = [torch.full((b, c, *s), 0.5) for c, s in zip(channels, sizes, strict=True)]
    return {"output": output, "middle": [output[-1].clone()]}


def control_net():
    from comfy.controlnet import ControlBase

    class Constant(ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            b, _, h, w = x_noisy.shape
            return residuals(b, h, w)

    return Constant()


@pytest.mark.parametrize("rau_net", ["off", "aggressive"])
def test_no_controlnet_residual_is_dropped(sdxl, apply, rau_net, caplog):
    control = control_net()
    patched = apply(sdxl, rau_net=rau_net)
    with caplog.at_level(logging.WARNING):
        with_control = sample(patched, control=control)
    assert "control could not be applied" not in caplog.text
    assert not torch.allclose(with_control, sample(patched))


def test_core_drops_residuals_of_another_size(hi, rules, unets, caplog):
    """The reason for fitting them."""
    plan = hi.Plan(rules.SDXL, rules.feature_sizes(rules.SDXL, (32, 32), True, False), True, False)
    positive, _ = prompts()
    control = residuals(1, 32, 32)
    for fitted, dropped in ((control, True), (hi.fit_control(plan, control), False)):
        caplog.clear()
        with torch.no_grad():
            unets["sdxl"](
                torch.zeros(1, 4, 32, 32), torch.tensor([1.0]), context=positive[0][0],
                y=positive[0][1]["pooled_output"], transformer_options=hi.install(plan, {}),
                control={k: list(v) for k, v in fitted.items()},
            )  # fmt: skip
        assert ("control could not be applied" in caplog.text) is dropped


# ---- beside other nodes


def core_node(comfy, file, name):
    return getattr(importlib.import_module(f"comfy_extras.{file}"), name)


def test_the_second_of_two_nodes_wins_and_says_so(sdxl, apply, caplog):
    once = apply(sdxl, rau_net="off", seed=5)
    expected = sample(once, steps=3)
    with caplog.at_level(logging.WARNING):
        twice = apply(apply(sdxl, rau_net="aggressive", seed=1), rau_net="off", seed=5)
    assert "this node wins" in caplog.text
    assert torch.equal(sample(twice, steps=3), expected)


@pytest.mark.parametrize("first", [True, False])
def test_deep_shrink_wins_over_rau_net(comfy, sdxl, apply, caplog, first):
    node = core_node(comfy, "nodes_model_downscale", "PatchModelAddDownscale")

    def shrink(model):
        return node.execute(model, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic").args[0]

    both = apply(shrink(sdxl), rau_net="aggressive", window_attention=False)
    if not first:
        both = shrink(apply(sdxl, rau_net="aggressive", window_attention=False))
    with caplog.at_level(logging.WARNING):
        result = sample(both, steps=5)
    assert "Deep Shrink" in caplog.text
    assert "RAU-Net is off" in caplog.text
    assert torch.equal(result, sample(shrink(sdxl), steps=5))


@pytest.mark.parametrize("first", [True, False])
def test_hypertile_wins_where_it_tiles(comfy, sdxl, apply, caplog, first):
    node = core_node(comfy, "nodes_hypertile", "HyperTile")

    def tile(model):
        # Depth 1 is the level of the windows; HyperTile draws nothing with a swap size of 1.
        return node.execute(model, 128, 1, 1, False)[0]

    both = apply(tile(sdxl), rau_net="off") if first else tile(apply(sdxl, rau_net="off"))
    with caplog.at_level(logging.WARNING):
        result = sample(both, steps=3, size=(64, 64))
    assert "HyperTile" in caplog.text
    torch.testing.assert_close(result, sample(tile(sdxl), steps=3, size=(64, 64)))


def test_other_patches_keep_working(comfy, sdxl, apply):
    """Patches like those of IP-Adapter and FreeU, and one more for down-samplers."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

    called = defaultdict(set)

    def attention(q, k, v, options):
        called["attn2"].add(options["block"])
        return q, k, v * 1.1

    def output(h, skip, options):
        called["output"].add(options["block"])
        return (h * 1.1 if options["block"][1] == 1 else h), skip

    def downsample(layer, x, *args):
        called["down"].add((x.shape[-2], layer(x).shape[-2]))
        return layer(x)

    def dress(model):
        model = model.clone()
        model.set_model_attn2_patch(attention)
        model.set_model_output_block_patch(output)
        model.set_model_forward_timestep_embed_patch((Downsample, downsample))
        return model

    settings = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}
    results = []
    for both in (apply(dress(sdxl), **settings), dress(apply(sdxl, **settings))):
        called.clear()
        results.append(sample(both, steps=2, size=(32, 32)))
        assert len(called["attn2"]) == 11
        assert len(called["output"]) == 9
        assert called["down"] == {(32, 16), (4, 2)}, "pooled to 8, every second pixel, halved"
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(apply(sdxl, **settings), steps=2, size=(32, 32)))


# ---- number formats, LoRA, memory, compilation


@pytest.mark.parametrize(
    ("dtype", "manual_cast"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_weights_of_every_format(sdxl, apply, dtype, manual_cast):
    """One step, against float32 with the weights rounded as that format rounds them."""
    for weight in sdxl.model.diffusion_model.parameters():
        weight.data = weight.data.to(dtype).float()
    settings = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}
    other = base_model("sdxl", dtype, manual_cast)

    def error(patched):
        pair = [apply(m, **settings) if patched else m for m in (other, sdxl)]
        found, exact = (sample(m, steps=1, cfg=1.0) for m in pair)
        return (found - exact).norm() / exact.norm()

    # With random weights the shrunk features make the network more sensitive to every rounding:
    # a disturbed input shows the same in float32.
    assert error(patched=True) < 1e-5 + 10 * error(patched=False)


def test_a_lora_on_the_dilated_downsampler_counts(sdxl, apply):
    settings = {"rau_net": "normal", "preset": "custom", "t1": 1.0, "t2": 1.0}
    key = "diffusion_model.input_blocks.6.0.op.weight"
    up, down = torch.randn(32, 4) * 0.2, torch.randn(4, 32 * 9) * 0.2
    change = (up @ down).reshape(32, 32, 3, 3)
    with_lora = apply(sdxl, **settings)
    assert with_lora.add_patches({key: ("diff", (change,))}, 1.0, 1.0)
    found = sample(with_lora, steps=3)

    baked = base_model("sdxl")
    baked.model.get_parameter(key).data += change
    torch.testing.assert_close(found, sample(apply(baked, **settings), steps=3))
    assert not torch.allclose(found, sample(apply(sdxl, **settings), steps=3))


def test_offloaded_weights(sdxl, apply):
    """Weights that ComfyUI casts for each call, as it does when memory is short."""
    patched = apply(sdxl, rau_net="aggressive")
    expected = sample(patched, steps=8)
    patched.detach()
    low = apply(base_model("sdxl"), rau_net="aggressive")
    low.load(low.load_device, lowvram_model_memory=1)
    assert low.model.model_lowvram
    assert low.model.diffusion_model.input_blocks[6][0].op.comfy_cast_weights
    torch.testing.assert_close(sample(low, steps=8), expected)


@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_has_one_graph_for_each_phase(sdxl, apply, first, monkeypatch):
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # The attention of a machine without a GPU cannot be compiled into one graph.
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    settings = {"rau_net": "aggressive", "preset": "custom", "t1": 0.6, "aggressive_ratio": 0.3}
    expected = sample(apply(sdxl, **settings), steps=10, size=(16, 16))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = sdxl.clone() if first else apply(sdxl, **settings)
    set_torch_compile_wrapper(model, backend=backend)
    model = apply(model, **settings) if first else model
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = sample(model, steps=10, size=(16, 16))
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert len(graphs) == 3, "dilated, pooled, plain; the shifts make no difference"
        sample(model, steps=10, size=(16, 16), seed=9)
        assert len(graphs) == 3, "a second picture compiles nothing"


# ---- what it refuses


def test_other_networks_get_a_clear_error(comfy, apply):
    class Transformer(torch.nn.Module):
        pass

    model = base_model("sdxl")
    model.add_object_patch("diffusion_model", Transformer())
    with pytest.raises(ValueError, match=r"SDXL, SD 1\.5 or SD 2\.x; got Tiny.* a Transformer"):
        apply(model)

    # A distilled SDXL without attention in the middle.
    pruned = base_model("sdxl", transformer_depth_middle=-1)
    with pytest.raises(ValueError, match=r"rrrDaaDaa/a/aaAaaArrr.* got Tiny .*rrrDaaDaa/r/aaA"):
        apply(pruned)
    refiner = base_model("sd15", transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="HiDiffusion: expected the blocks of SDXL"):
        apply(refiner)


def test_a_preset_of_another_family_is_an_error(comfy, apply):
    with pytest.raises(ValueError, match=r"expected an SDXL model.* got the blocks of SD1\.5/2\.x"):
        apply(base_model("sd15"), preset="SDXL")
    with pytest.raises(ValueError, match=r"expected an SD1\.5/2\.x model"):
        apply(base_model("sdxl"), preset="SD1.5/2.x")


def test_every_input_and_output_has_a_tooltip(comfy):
    schema = comfy.module("nodes.hidiffusion").HiDiffusion.define_schema()
    assert [i.id for i in schema.inputs] == ["model", *DEFAULTS]
    assert {i.id: i.default for i in schema.inputs[1:]} == DEFAULTS
    assert all(i.tooltip and i.tooltip.endswith(".") for i in [*schema.inputs, *schema.outputs])
    assert schema.description
    assert schema.search_aliases
