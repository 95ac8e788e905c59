"""Nodes of ComfyUI that load the model of a MODEL once more, or change its weights.

They ask for it where dynamic VRAM is on, which needs a GPU: here patchers only say that it is.
"""

import importlib
from types import MethodType

import pytest
import torch

from tests.nodes.test_nodes import ksampler
from tests.nodes.test_weights import PREFIX, TABLES, weights

pytestmark = pytest.mark.comfy
META = torch.device("meta")
"""In place of a second GPU."""


@pytest.fixture
def dynamic(load):
    """A model whose patcher says that it has dynamic VRAM."""
    patchers = importlib.import_module("comfy.model_patcher")
    model = load("tiny")[0]
    model.is_dynamic = lambda: True
    model.non_dynamic_delegate_model = None
    delegate = patchers.ModelPatcherDynamic.get_non_dynamic_delegate
    model.get_non_dynamic_delegate = MethodType(delegate, model)
    return model


def assert_loaded_anew(model, original) -> None:
    assert model.model is not original.model
    expected = weights(original)
    assert weights(model).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights(model).items())
    assert model.model.infdit.metadata == original.model.infdit.metadata
    assert model.model.model_sampling.sigma_max == original.model.model_sampling.sigma_max


def test_torch_compile_model(dynamic, load, upscale):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    image, graphs = torch.rand(1, 10, 12, 3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = TorchCompileModel.execute(dynamic, backend).args[0]
    assert_loaded_anew(compiled, dynamic)
    assert not compiled.is_dynamic()
    torch.testing.assert_close(upscale(compiled, image), upscale(load("tiny")[0], image))
    assert 2 <= len(graphs) <= 4, "the projections and the MLP, which all layers share"


def test_the_switch_compiles_the_parts_of_the_layers_of_its_model(
    comfy, load, upscale, monkeypatch
):
    network = comfy.module("infdit_core.network.model").InfDiT
    compile_layers, backends = network.compile_layers, []

    def eagerly(self, *, backend):
        backends.append(backend)
        compile_layers(self, backend="eager")

    monkeypatch.setattr(network, "compile_layers", eagerly)
    model, image = load("tiny")[0], torch.rand(1, 10, 12, 3)
    plain, first = upscale(model, image), model.model.infdit.layers[0]
    execute = comfy.nodes["InfDiTSchedule"].execute
    switched = execute(model, "auto", 1, False, 0.0, compile=True).args[0]
    torch.testing.assert_close(upscale(switched, image), plain)
    assert backends == ["inductor"]
    assert "project" in vars(first.attention)
    assert torch.equal(upscale(model, image), plain)
    assert "project" not in vars(first.attention)
    assert first.mlp._compiled_call_impl is None


def test_a_failure_to_compile_is_named(comfy, load, upscale, monkeypatch):
    network = comfy.module("infdit_core.network.model").InfDiT
    compile_layers = network.compile_layers

    def fail(graph, inputs):
        raise OSError("no compiler")

    def failing(self, backend):
        compile_layers(self, backend=fail)

    monkeypatch.setattr(network, "compile_layers", failing)
    execute = comfy.nodes["InfDiTSchedule"].execute
    switched = execute(load("tiny")[0], "auto", 1, False, 0.0, compile=True).args[0]
    with pytest.raises(ValueError, match=r"compile on this device; got .*no compiler.*Switch"):
        upscale(switched, torch.rand(1, 10, 12, 3))


def test_select_model_device(dynamic, load, upscale, monkeypatch):
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    on_cpu = SelectModelDeviceNode.execute(dynamic, "cpu").args[0]
    image = torch.rand(1, 10, 12, 3)
    torch.testing.assert_close(upscale(on_cpu, image), upscale(load("tiny")[0], image))

    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "resolve_gpu_device_option", lambda option: META)
    moved = SelectModelDeviceNode.execute(load("tiny")[0], "gpu:1").args[0]
    assert_loaded_anew(moved, dynamic)
    assert moved.load_device == META


def test_multigpu_work_units(load, monkeypatch):
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    management, model = importlib.import_module("comfy.model_management"), load("prior")[0]
    devices = [model.load_device, META]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices)
    split = MultiGPUCFGSplitNode.execute(model, 2).args[0]
    (clone,) = split.get_additional_models_with_key("multigpu")
    assert_loaded_anew(clone, model)
    assert clone.load_device == META


def test_a_weight_hook_on_the_conditioning(comfy, dynamic, load):
    hooks, image = importlib.import_module("comfy.hooks"), torch.rand(1, 10, 12, 3)
    patch, lora, net = {}, {}, dynamic.model.infdit
    for name in ("layers.0.mlp.fc1", *TABLES):
        out, into = net.get_submodule(name).weight.shape
        up, down = torch.randn(out, 2), torch.randn(2, into)
        lora |= {f"{PREFIX}{name}.lora_up.weight": up, f"{PREFIX}{name}.lora_down.weight": down}
        patch[f"{PREFIX}{name}.weight"] = ("diff", (up @ down,))
    patched = load("tiny")[0]
    assert len(patched.add_patches(patch)) == len(patch)
    expected = ksampler(comfy, patched, image, 2, seed=3)

    node, execute = comfy.nodes["InfDiTConditioning"], comfy.nodes["InfDiTConditioning"].execute
    hooked = hooks.create_hook_lora(lora, 1.0, 1.0)

    def with_hooks(*args):
        conditioning, *others = execute(*args).args
        conditioning = hooks.set_hooks_for_conditioning(conditioning, hooked)
        return type(execute(*args))(conditioning, *others)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(node, "execute", with_hooks)
        result = ksampler(comfy, dynamic, image, 2, seed=3)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert (result - ksampler(comfy, load("tiny")[0], image, 2, seed=3)).abs().max() > 1e-2


def test_steps_of_samplers_that_evaluate_once_or_twice(comfy):
    step_index = comfy.module("nodes.common").step_index
    sigmas = [10.0, 5.0, 2.0, 1.0, 0.0]
    assert [step_index(s, sigmas) for s in sigmas[:-1]] == [0, 1, 2, 3]
    assert [step_index(s, sigmas) for s in (7.0, 3.0, 1.5, 0.1)] == [0, 1, 2, 3]
    assert step_index(5.00001, sigmas) == 1, "a rounding error is no step"
    assert step_index(11.0, sigmas) == 0, "churned above the first level"
    assert step_index(0.0, sigmas) == 3, "never past the last step"
