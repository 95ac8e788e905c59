"""Parity with the public implementations: what they made of the same tiny UNets."""

import json

import pytest
import torch

from tests.goldens import golden, golden_path
from tests.hidiffusion.models import base_model
from tests.upsample_guidance.models import conditions, evaluate

pytestmark = pytest.mark.comfy

RECORDED = json.loads(golden_path("upsample_guidance/guidance.json").read_text())
CASES = {case["name"]: case for case in RECORDED["cases"]}


def recorded():
    return golden("upsample_guidance/guidance.safetensors")


def steps():
    """(case, step) of the recorded evaluations."""
    return [
        pytest.param(CASES[name], CASES[name]["steps_info"][int(i)], id=f"{name}-{i}")
        for name, i in sorted(
            key.removesuffix(".x0_high").rsplit(".", 1)
            for key in recorded()
            if key.endswith(".x0_high")
        )
    ]


def network(case):
    model = base_model(case["name"].split(".")[0])
    for parameter in model.model.diffusion_model.out[2].parameters():
        parameter.mul_(RECORDED["unet_out_scale"])
    return model


def guided(apply, case):
    return apply(network(case), scale=str(case["m"]), theta=case["theta"], eta=case["eta"])


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("case", "step"), steps())
def test_x0_of_a_step(apply, case, step):
    from comfy.patcher_extension import WrappersMP

    tensors, key = recorded(), f"{case['name']}.{step['i']}"
    model, calls = guided(apply, case), []

    def look(executor, x, timesteps, *args, **kwargs):
        output = executor(x, timesteps, *args, **kwargs)
        calls.append((x, timesteps, output))
        return output

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    x, conds = tensors[f"{key}.x"], conditions(case["name"].split(".")[0], 2)
    plain = evaluate(network(case), x.repeat(2, 1, 1, 1), step["sigma"], conds)
    found = evaluate(model, x.repeat(2, 1, 1, 1), step["sigma"], conds)
    errors = [error(plain, tensors[f"{key}.x0_high"]), error(found, tensors[f"{key}.x0_guided"])]
    print(f"{key}: x0 {errors[0]:.1e}, guided {errors[1]:.1e}")
    assert max(errors) <= 2e-6
    assert len(calls) == (2 if step["w"] else 1)
    if step["w"]:
        low, timesteps, eps = calls[0]
        assert timesteps.tolist() == [step["tau"]] * 2
        assert error(low[:1], tensors[f"{key}.low_input"]) <= 2e-6
        assert error(eps, tensors[f"{key}.eps_low"]) <= 1e-4  # as HiDiffusion's
    else:
        assert torch.equal(found, plain)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_whole_run(apply, case):
    import comfy.sample
    from comfy.samplers import sampler_object

    tensors, name = recorded(), case["name"]
    model = guided(apply, case)
    info = case["steps_info"]
    sigmas = torch.tensor([*(step["sigma"] for step in info), info[-1].get("sigma_next", 0.0)])
    conds = conditions(name.split(".")[0], 2)
    y = conds.get("y", torch.zeros(2, 1))
    negative, positive = (
        [[conds["c_crossattn"][i : i + 1], {"pooled_output": y[i : i + 1]}]] for i in (0, 1)
    )
    states = []
    noise = tensors[f"{name}.noise"]
    noise = noise * (1 + sigmas[0] ** -2) ** 0.5
    latent = torch.zeros_like(noise)
    result = comfy.sample.sample_custom(
        model, noise, case["cfg"], sampler_object("euler"), sigmas, positive, negative, latent,
        callback=lambda i, x0, x, total: states.append(x.clone()), seed=0,
    )  # fmt: skip
    states = [*states[1:], model.model.process_latent_in(result)]
    errors = [error(*pair) for pair in zip(states, tensors[f"{name}.next"], strict=True)]
    print(f"{name}: {max(errors):.1e}")
    assert max(errors) <= 4e-5
    final = states[-1]
    if name.startswith("sd15"):  # recorded in the scale that adds up to a variance of 1
        final = final / (1 + sigmas[-1] ** 2) ** 0.5
    assert error(final, tensors[f"{name}.final"]) <= 4e-5


def test_the_low_timestep_is_the_one_of_the_matching_signal_to_noise_ratio(comfy):
    sampling = base_model("sdxl").get_model_object("model_sampling")
    for m, taus in zip((2, 3, 4), recorded()["tau"], strict=True):
        assert torch.equal(sampling.timestep(sampling.sigmas / m).int(), taus)
