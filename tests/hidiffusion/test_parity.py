"""Parity with the authors' code: what their implementation made of the same tiny UNets."""

import json

import pytest
import torch

from tests.goldens import golden, golden_marks, golden_path, thinned
from tests.hidiffusion.models import base_latent

pytestmark = pytest.mark.comfy


def recorded(*names):
    """(file, case) of the recordings whose outputs are at hand."""
    for name in names:
        path, file = golden_path(f"hidiffusion/{name}.json"), f"hidiffusion/{name}.safetensors"
        if not path.exists():
            continue
        keys = golden(file).keys()
        for case in json.loads(path.read_text())["cases"]:
            # At odd sizes the authors resize the tokens where we repeat a row; and the input of
            # the largest case is not among the recordings.
            odd = any(call["odd"] for call in case["msw_calls"])
            if case["name"] in keys and not odd and case["H"] <= 256:
                marks = golden_marks(file, case["name"])
                marks += [pytest.mark.slow] * (case["H"] * case["W"] > 128 * 128)
                yield pytest.param(name, case, id=f"{name}-{case['name']}", marks=marks)


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
    base = base_latent()
    x = torch.cat([base[:, :, :h, :w], base[:, :, 256 - h :, 256 - w :]][:b])
    cond = golden(f"hidiffusion/{family}/cond.safetensors")

    sigmas = torch.linspace(case["num_steps"], 0, case["num_steps"] + 1)
    patch = patch_of(hi, rules, family, case)
    options = {"sample_sigmas": sigmas}
    changes = patch.changes(x, float(sigmas[case["step_index"]]), options, None)
    assert (changes.rad, changes.pool) == (case["active"]["rad"], case["active"]["pool"])
    assert set(changes.windows) == set(shifts)
    y = {"y": cond["y"][:b]} if "y" in cond else {}
    with torch.no_grad():
        return unet(
            x,
            torch.full((b,), case["timestep"]),
            context=cond["context"][:b],
            control=hi.fit_control(changes, control),
            transformer_options=hi.install(changes, options),
            **y,
        )


def assert_parity(found, expected):
    assert (found - expected).abs().max() <= 5e-4
    assert (found - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize(("name", "case"), list(recorded("sd15/small", "sdxl/small", "sdxl/large")))
def test_parity_with_the_authors(hi, rules, unets, monkeypatch, name, case):
    family = name.split("/")[0]
    found = evaluate(hi, rules, monkeypatch, unets[family], family, case)
    expected = golden(f"hidiffusion/{name}.safetensors")[case["output"]["key"]]
    assert_parity(thinned(found, expected), expected)


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
