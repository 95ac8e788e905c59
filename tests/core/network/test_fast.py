"""Every way to compute with fewer passes over memory gives what the plain one gives."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infdit_core.blocks.schedules import LayerMajor
from infdit_core.network import backends, fast
from infdit_core.network.attention import block_attention
from infdit_core.network.layers import EPS, modulated_norm
from infdit_core.network.rope import Rotary, rotary_factors, rotate
from tests.goldens import TINY, random_condition, random_model


@pytest.fixture(scope="module")
def kernels():
    """The Triton kernels, run by Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("on a machine with a GPU the kernels are tested there")
    return importlib.import_module("infdit_core.network.kernels")


@pytest.fixture
def on_cpu(monkeypatch, kernels):
    """The ways of a GPU taken on the CPU."""
    fast._kernels_work.cache_clear()
    for way in ("place", "join"):
        monkeypatch.setitem(fast.DEVICES, way, {"cpu"})
    yield
    fast._kernels_work.cache_clear()


def neighbourhood(dtype=torch.float32, batch=1, blocks=1, tokens=64, heads=2, d=80):
    """Queries of a line of blocks, keys and values around it, segment vectors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    shape = batch, 1 + blocks, tokens, heads, d
    line, above = normal(2, *shape), normal(2, *shape)
    neighbours = line[:, :, 1:], above[:, :, :-1], line[:, :, :-1], above[:, :, 1:]
    return normal(batch, 1, blocks, tokens, heads, d), [neighbours], normal(4, heads, d)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=["fp32", "bf16"]
)
def test_one_kernel_normalises_rotates_and_places(kernels, dtype, atol, by_columns):
    b, r, c, side, heads, d = 2, 2, 3, 2, 3, 24
    qkv = torch.randn(b, r, c, side**2, 3, heads, d).to(dtype)
    weight, bias = torch.randn(2, d).to(dtype)
    rotary = Rotary(
        rotary_factors(torch.arange(r * side), d).unflatten(0, (r, side)),
        rotary_factors(7 + torch.arange(c * side), d).unflatten(0, (c, side)),
    )
    n, m = (c, r) if by_columns else (r, c)
    lines = torch.zeros(2, b, n, 1 + m, side**2, heads, d, dtype=dtype)
    room = lines[:, :, :, 1:].transpose(2, 3) if by_columns else lines[:, :, :, 1:]
    q = kernels.place(qkv, weight, bias, *rotary, room, EPS)
    exact = [
        F.layer_norm(x, (d,), weight.float(), bias.float(), EPS) for x in qkv.float().unbind(4)
    ]
    torch.testing.assert_close(q.float(), rotate(exact[0], rotary), atol=atol, rtol=0)
    torch.testing.assert_close(room[0].float(), rotate(exact[1], rotary), atol=atol, rtol=0)
    assert torch.equal(room[1], qkv[..., 2, :, :])
    assert not lines[:, :, :, 0].any()


def test_joined_attention_is_nearer_to_float64_than_gathered(kernels):
    q, neighbours, embed = neighbourhood(torch.bfloat16)
    gathered = block_attention(q, neighbours, embed)
    doubled = [tuple(x.double() for x in neighbours[0])]
    exact = block_attention(q.double(), doubled, embed.double())
    q = q[0, 0]  # (c, T, A, d)
    parts = [
        backends.flash_for_cpu(*(x.transpose(1, 2) for x in (q, *kv[:, 0]))) for kv in neighbours[0]
    ]
    joined = torch.empty(q.shape)  # in float32, since the interpreter does not round to the nearest
    kernels.join(q, *zip(*parts, strict=True), embed, joined)
    assert rms(joined.bfloat16() - exact) < rms(gathered - exact) < 1e-3


def test_joined_attention_falls_back_for_a_gradient_and_without_a_backend(on_cpu, monkeypatch):
    q, neighbours, embed = neighbourhood(batch=2, tokens=4, d=16)
    joined = block_attention(q, neighbours, embed)
    through = q.clone().requires_grad_()
    gathered = block_attention(through, neighbours, embed)
    torch.testing.assert_close(joined, gathered, atol=1e-5, rtol=0)
    gathered.sum().backward()
    assert through.grad is not None
    monkeypatch.setattr(backends, "_fastest", {})
    monkeypatch.setitem(backends.BACKENDS, "cpu", ())
    assert torch.equal(block_attention(q, neighbours, embed), gathered)


def test_a_network_computes_the_same_with_all_of_them(on_cpu, monkeypatch):
    model = random_model(replace(TINY, block_patches=4), std=0.2)
    x, cond = random_condition(model, 2, 1)
    fused = model.denoise(x, 1.0, cond, LayerMajor(1))
    for way in fast.DEVICES:
        monkeypatch.setitem(fast.DEVICES, way, set())
    plain = model.denoise(x, 1.0, cond, LayerMajor(1))
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from infdit_core.network import kernels

sizes = {"HEADS": 16, "DIM": 80, "ALL_HEADS": 16, "ALL_DIM": 128}
types = {"rows": "*fp32", "columns": "*fp32", "EPS": "fp32", "SCALE": "fp32"}
types |= {f"l{i}": "*fp32" for i in range(4)} | {f"o{i}": "*bf16" for i in range(4)}
types |= {n: "*bf16" for n in "qkv weight bias q room embed joined".split()}
for kernel in (kernels._place, kernels._join):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
    constants = {(names.index(n),): size for n, size in sizes.items()}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


def test_normalisation_with_modulation_is_one_operation_for_one_picture():
    x, shift, scale = torch.randn(1, 1, 2, 4, 8), torch.randn(1, 8), torch.randn(1, 8)
    both = modulated_norm(x.expand(2, -1, -1, -1, -1), *(p.expand(2, -1) for p in (shift, scale)))
    torch.testing.assert_close(modulated_norm(x, shift, scale), both[:1], atol=1e-6, rtol=0)


def test_another_backend_is_chosen_where_it_is_clearly_faster():
    first, second, third = (lambda q, k, v: (q, q) for _ in range(3))
    assert backends.choose({first: 1.0, second: 0.97, third: 1.2}) is first
    assert backends.choose({first: 1.0, second: 0.9, third: 0.5}) is third
    assert backends.choose({first: 1.0, second: 0.9, third: 0.88}) is second


def test_backends_are_timed_once_a_shape_and_those_that_fail_are_left_out(monkeypatch):
    timed = []

    def broken(q, k, v):
        raise RuntimeError("no kernel for this head size")

    def slow(q, k, v):
        return backends.flash_for_cpu(q, k, v)

    def seconds(backend, q, k, v):
        timed.append(backend)
        return 2.0 if backend is slow else 1.0

    monkeypatch.setattr(backends, "_fastest", {})
    monkeypatch.setattr(backends, "_seconds", seconds)
    monkeypatch.setitem(backends.BACKENDS, "cpu", (broken, slow, backends.flash_for_cpu))
    monkeypatch.setitem(fast.DEVICES, "backends", {"cpu"})
    q = torch.randn(3, 2, 8, 16)
    for blocks in (3, 1, 2):
        assert backends.fastest(q[:blocks], q[:blocks], q[:blocks]) is backends.flash_for_cpu
    assert timed == [slow, backends.flash_for_cpu]


def test_cudnn_never_sees_what_it_would_take_for_half_precision(monkeypatch):
    seen = []

    class Recording:
        def _scaled_dot_product_cudnn_attention(self, q, *_):
            seen.append(q.dtype)
            return q, q[..., :1]

    monkeypatch.setattr(backends, "aten", Recording())
    q = torch.randn(1, 2, 8, 16)
    candidates = list(backends._working((backends.cudnn,), q, q, q))
    assert candidates == []
    assert list(backends._working((backends.cudnn,), *[q.bfloat16()] * 3)) == [backends.cudnn]
    assert seen == [torch.bfloat16]


def test_layers_that_cast_patch_or_round_are_called():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert fast.is_plain(layer, x)
    assert not fast.is_plain(layer, x.bfloat16())
    assert not fast.is_plain(nn.Identity(), x)
    for name, value in (("comfy_cast_weights", True), ("weight_function", [torch.neg])):
        setattr(layer, name, value)
        assert not fast.is_plain(layer, x)
        delattr(layer, name)


def test_layers_say_whether_all_of_them_are_fused(on_cpu, monkeypatch):
    model = random_model(TINY, std=0.2)
    assert not model.fused
    monkeypatch.setitem(fast.DEVICES, "gelu", {"cpu"})
    assert model.fused
    model.compile_layers()
    assert not model.fused
    model.run_eagerly()
    monkeypatch.setattr(model.layers[1].mlp.fc1, "comfy_cast_weights", True, raising=False)
    assert not model.fused


@pytest.mark.gpu
def test_on_a_gpu_all_of_them_give_what_the_plain_ones_give(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model(replace(TINY, hidden_size=160), std=0.1).cuda()
    x, cond = random_condition(model, 3, 4)
    x, cond = x.cuda(), replace(cond, concat=cond.concat.cuda(), lr=cond.lr.cuda(), vector=None)
    results = {"all": model.denoise(x, 1.0, cond, LayerMajor(3))}
    for way in fast.DEVICES:
        monkeypatch.setitem(fast.DEVICES, way, set())
        results[f"without {way} and those before"] = model.denoise(x, 1.0, cond, LayerMajor(3))
    *fused, plain = results.values()
    errors = [float((result - plain).abs().max()) for result in fused]
    assert max(errors) <= 1e-5, dict(zip(results, errors, strict=False))
