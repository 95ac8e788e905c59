"""The network against the authors' release."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from infdit_core.network.attention import sdpa
from infdit_core.network.config import RELEASED
from infdit_core.network.layers import time_features
from tests.goldens import (
    golden,
    golden_cases,
    golden_condition,
    golden_model,
    random_condition,
    random_model,
    thinned,
)

ATOL = 1e-5


def close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", atol: float = ATOL):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", golden_cases("*/a_full_*.safetensors"))
def test_denoised_equals_the_release(name):
    tensors = golden(name)
    # past 8 times its training size the release's positions wrap; ours do so only when told to
    model = golden_model(name.split("/")[0], **({"rope_wrap": 256} if "1x33" in name else {}))
    for out in (key for key in tensors if key == "out" or key.startswith("out_sigma")):
        sigma = tensors["sigma"] if out == "out" else float(out.removeprefix("out_sigma"))
        x = tensors[out.replace("out", "x")]
        close(model.denoise(x, sigma, golden_condition(tensors)), tensors[out], out)


def test_true_positions_differ_from_the_release_only_past_its_wrap():
    name = "xs/a_full_1x33.safetensors"
    tensors, model = golden(name), golden_model("xs")
    expected = tensors["out_sigma0.5"]
    denoised = model.denoise(tensors["x_sigma0.5"], 0.5, golden_condition(tensors))
    close(denoised[..., : 32 * 32], expected[..., : 32 * 32])
    assert (denoised[..., 32 * 32 :] - expected[..., 32 * 32 :]).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "maximum"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", golden_cases("*/a_full_?x?.safetensors"))
def test_denoised_equals_the_release_on_cuda(name, dtype, maximum):
    torch.backends.cuda.matmul.allow_tf32 = False
    tensors = {k: v.cuda() for k, v in golden(name).items()}
    model = golden_model(name.split("/")[0], dtype).cuda()
    for key in (k for k in tensors if k.startswith("out_sigma")):
        x, sigma = tensors[key.replace("out", "x")], float(key.removeprefix("out_sigma"))
        denoised = model.denoise(x, sigma, golden_condition(tensors))
        torch.testing.assert_close(denoised, tensors[key], atol=maximum, rtol=0)


@pytest.mark.slow
def test_one_evaluation_of_the_released_size():
    model = random_model(RELEASED, std=0.02)
    x, cond = random_condition(model, 1, 2)
    denoised = model.denoise(x, 1.0, cond)
    assert denoised.shape == (1, 3, 128, 256)
    assert denoised.isfinite().all()


@pytest.mark.parametrize("name", golden_cases("*/d_intermediates_*.safetensors"))
def test_every_intermediate_equals_the_release(name):
    expected = golden(name)
    model = golden_model(name.split("/")[0])
    cond, sigma = golden_condition(expected), expected["sigma"]
    config = model.config
    seen: dict[str, torch.Tensor] = {}
    calls: list[tuple[torch.Tensor, ...]] = []

    def keep(module, key, *, of_input=False):
        def hook(module, args, output):
            seen.setdefault(key, args[0] if of_input else output)

        module.register_forward_hook(hook)

    def attend(q, k, v):
        calls.append((q, k, v, sdpa(q, k, v)))
        return calls[-1][-1]

    model.attend = attend
    keep(model.patch_embed, "net_input", of_input=True)
    keep(model.patch_embed, "patch_embed")
    keep(model.time_embed, "time_embed")
    keep(model.vector_embed, "cond_embed_vector_term")
    first = model.layers[0]
    keep(first.attention.qkv, "attn0_input", of_input=True)
    keep(first.attention, "attn0_output")
    keep(model.cross_attention.query, "cross_input", of_input=True)
    keep(model.cross_attention, "cross_output")
    keep(model.final, "final_layer_input", of_input=True)
    seen_norms = []
    first.attention.qk_norm.register_forward_hook(lambda m, a, o: seen_norms.append(o.clone()))
    denoised = model.denoise(expected["x"], sigma, cond)

    rows, columns, _ = model.grid(expected["x"])

    def tokens(x):
        """Blocks (B, r, c, T, ...) to the release's row-major tokens (B, n, ...)."""
        return rearrange(
            x, "b r c (y x) ... -> b (r y c x) ...", y=config.block_patches, r=rows, c=columns
        )

    def blocks(row_calls, i):
        """One argument of a layer's attention calls as (blocks, tokens, heads, d)."""
        return torch.cat([call[i] for call in row_calls]).transpose(1, 2)

    self_calls, cross_calls = calls[:rows], calls[rows : 2 * rows]
    vector_term = seen["cond_embed_vector_term"]
    embed = seen["time_embed"] + vector_term
    lr_tokens = rearrange(model.lr_embed(cond.lr), "b h y x -> b y x h")
    border = config.lr_block
    padded = torch.nn.functional.pad(lr_tokens, (0, 0, border, border, border, border))
    windows = model.cross_attention._windows(padded[None, ..., None, :])
    norm = torch.nn.functional.layer_norm
    hidden = seen["final_layer_input"]
    final = norm(hidden, hidden.shape[-1:], eps=1e-6)
    c_noise = sigma.log() / 4
    k_norm, q_norm = seen_norms[0], seen_norms[1]  # keys are placed first
    found = {
        "c_noise": c_noise,
        "net_input": seen["net_input"],
        "patch_embed": rearrange(seen["patch_embed"], "b h y x -> b (y x) h"),
        "time_embed": seen["time_embed"],
        "cond_embed_vector_term": vector_term,
        "cond_embed_sum": embed,
        "emb": torch.nn.functional.silu(embed),
        "attn0_input": tokens(seen["attn0_input"]),
        "layer0_q_after_ln": tokens(q_norm),
        "layer0_k_after_ln": tokens(k_norm),
        "layer0_q_rope": tokens(blocks(self_calls, 0).unflatten(0, (1, rows, columns))),
        # the fourfold keys begin with the block itself; without its segment vector: rotated keys
        "layer0_k_rope": tokens(
            (
                blocks(self_calls, 1)[:, : config.block_tokens]
                - first.attention.segment_embed.weight[0].unflatten(0, (config.num_heads, -1))
            ).unflatten(0, (1, rows, columns))
        ),
        "self0_flash_q": blocks(self_calls, 0),
        "self0_flash_k": blocks(self_calls, 1),
        "self0_flash_v": blocks(self_calls, 2),
        "self0_flash_out": blocks(self_calls, 3),
        "attn0_output": tokens(seen["attn0_output"]),
        "process_lr": windows[0].squeeze(-2),
        "cross_input": tokens(seen["cross_input"]),
        "cross0_flash_q": blocks(cross_calls, 0),
        "cross0_flash_k": blocks(cross_calls, 1),
        "cross0_flash_v": blocks(cross_calls, 2),
        "cross0_flash_out": blocks(cross_calls, 3),
        "cross_output": tokens(seen["cross_output"]),
        f"hidden_{config.num_layers - 1}": tokens(hidden),
        "final_layernorm": tokens(final),
        "norm_final": tokens(norm(final, final.shape[-1:], eps=1e-6)),
        "net_output_F": model(
            expected["x"] / (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma, cond
        ),
        "out": denoised,
    }
    for n in range(config.num_layers - 1):
        found[f"hidden_{n}"] = tokens(hidden_states(model, expected["x"], sigma, cond)[n])
    inputs = {"x", "sigma", "concat_lr_imgs", "lr_imgs", "vector"}
    compared = set(expected) - inputs
    assert compared <= set(found), "a recorded tensor is not compared"
    for key in compared:
        close(thinned(found[key], expected[key]), expected[key], key)


def hidden_states(model, x, sigma, cond) -> list[torch.Tensor]:
    """The residual stream after each layer."""
    states, layer = [], model.layer

    def watched(*args):
        states.append(layer(*args))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "layer", watched)
        model.denoise(x, sigma, cond)
    return states


@pytest.mark.parametrize("name", golden_cases("*/g_bf16_?x?.safetensors"))
def test_bf16_is_as_exact_as_the_release(name):
    tensors = golden(name)
    model = golden_model(name.split("/")[0], torch.bfloat16)
    cond = golden_condition(tensors)
    for key in (k for k in tensors if k.startswith("out_f32_")):
        exact = tensors[key]
        theirs = tensors[key.replace("f32", "bf16")] - exact
        x = tensors[key.replace("out_f32", "x")]
        ours = model.denoise(x, float(key.split("sigma")[1]), cond) - exact
        assert ours.abs().max() <= 1.5 * theirs.abs().max(), key
        assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt(), key


def test_fp16_is_close_to_fp32():
    x, cond = random_condition(golden_model("xs"), 2, 2)
    exact = golden_model("xs").denoise(x, 0.5, cond)
    half = golden_model("xs", torch.float16).denoise(x, 0.5, cond)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 5e-3


def test_the_origin_moves_the_rotary_positions():
    model = golden_model("xs", rope_wrap=16)
    x, cond = random_condition(model, 2, 2)
    at_zero = model.denoise(x, 0.5, cond)
    close(model.denoise(x, 0.5, replace(cond, origin=(16, 32))), at_zero)
    for origin in ((1, 0), (0, 1)):
        assert (model.denoise(x, 0.5, replace(cond, origin=origin)) - at_zero).abs().max() > 1e-3


def test_time_features_are_cosines_then_sines():
    features = time_features(torch.tensor([0.5]), 192)
    assert features.shape == (1, 192)
    close(features[0, 0], torch.tensor(0.5).cos())
    close(features[0, 96], torch.tensor(0.5).sin())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x[..., :40], c), "multiples of 32 px, got 40×64|concat: expected shape"),
        (lambda x, c: (x, replace(c, lr=c.lr[..., :-1])), "lr: expected shape"),
        (lambda x, c: (x, replace(c, vector=None)), "needs a CLIP embedding"),
        (lambda x, c: (x, replace(c, vector=c.vector[:, :-1])), "vector: expected shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    model = golden_model("xs")
    x, cond = change(*random_condition(model, 2, 2))
    with pytest.raises(ValueError, match=message):
        model.denoise(x, 0.5, cond)
