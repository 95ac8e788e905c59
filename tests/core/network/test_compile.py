"""Compiled layers give what eager ones give."""

import shutil

import pytest
import torch

from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.network.rope import Rotary, rotary_factors, rotate
from tests.goldens import golden_model, random_condition

HAS_COMPILER = shutil.which("g++") is not None


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_layers_give_the_same(backend):
    eager, compiled = golden_model("xs"), golden_model("xs")
    compiled.compile_layers(backend=backend)
    assert set(compiled.state_dict()) == set(eager.state_dict())
    for grid in ((1, 1), (3, 4)):
        x, cond = random_condition(eager, *grid)
        for schedule in (Full(), BlockMajor(2), LayerMajor(3)):
            with torch.no_grad():
                expected = eager.denoise(x, 1.0, cond, schedule)
                result = compiled.denoise(x, 1.0, cond, schedule)
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_one_graph_serves_all_layers_and_chunks():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = golden_model("xs")
    model.compile_layers(backend=backend)
    with torch.no_grad():
        for grid in ((2, 2), (3, 3), (4, 5)):
            x, cond = random_condition(model, *grid)
            model.denoise(x, 1.0, cond, LayerMajor(2))
    # an MLP and a projection, and again where a size is 1, which is never dynamic
    assert len(graphs) <= 6 < 3 * model.config.num_layers * 2


def test_rotation_in_real_numbers_is_that_in_complex_ones(monkeypatch):
    x = torch.randn(1, 2, 3, 16, 2, 16)
    factors = rotary_factors(torch.arange(12), 16)
    rotary = Rotary(factors[:8].unflatten(0, (2, 4)), factors.unflatten(0, (3, 4)))
    expected = rotate(x.clone(), rotary)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rotary), expected, atol=1e-6, rtol=0)


def test_compiled_layers_can_be_streamed():
    eager, compiled = golden_model("xs"), golden_model("xs")
    compiled.compile_layers(backend="eager")
    x, cond = random_condition(eager, 2, 2)
    expected = eager.denoise(x, 1.0, cond, LayerMajor(2))
    result = compiled.denoise(x, 1.0, cond, LayerMajor(2, stream_weights=True))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
