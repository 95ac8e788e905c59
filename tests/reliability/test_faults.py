"""Faults in the middle of a run: memory that is not there, cancelling, callbacks, files."""

import gc
import importlib
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infdit_core import edm_sigmas, sample
from infdit_core.memory.adaptive import Adaptive
from infdit_core.memory.planner import Workload, plans
from infdit_core.network.model import InfDiT
from tests.goldens import TINY, random_condition, random_model


class FailingOperation(TorchDispatchMode):
    """Has no memory for the operation with the number `at`, counted from 0."""

    def __init__(self, at: int | None = None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_out_of_memory_at_every_operation(monkeypatch, every):
    """Inside an evaluation a smaller plan takes over; elsewhere the error comes out, and the next
    run is none the worse."""
    model = random_model(TINY, std=0.1)
    noise, cond = random_condition(model, 1, 2)
    found = plans(Workload(model.config, *noise.shape[-2:], torch.float32, device="cpu"))
    operations, inside = FailingOperation(), set()
    denoise = InfDiT.denoise

    def watched(self, *args, **kwargs):
        first = operations.count
        try:
            return denoise(self, *args, **kwargs)
        finally:
            inside.update(range(first, operations.count))

    def draw(mode: FailingOperation) -> torch.Tensor:
        retry = Adaptive(found, free_memory=lambda: None).call
        with mode:
            return sample(model, cond, edm_sigmas(2), noise=noise, solver="euler", retry=retry)

    monkeypatch.setattr(InfDiT, "denoise", watched)
    expected = draw(operations)
    monkeypatch.setattr(InfDiT, "denoise", denoise)
    before = live_tensors()
    total, survived = operations.count, 0
    assert 100 < total < 5000
    for at in range(0, total, every):
        try:
            result = draw(FailingOperation(at))
        except torch.OutOfMemoryError:
            assert at not in inside, f"operation {at} of {total}"
            continue
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        assert at in inside, f"operation {at} of {total} did not fail"
        survived += 1
        del result
    assert survived > 0.7 * total / every
    assert live_tensors() <= before
    assert torch.equal(draw(FailingOperation()), expected)


# In ComfyUI


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 16, 32, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def management(comfy):
    found = importlib.import_module("comfy.model_management")
    yield found
    found.interrupt_current_processing(False)


@pytest.fixture
def layers(comfy, monkeypatch):
    """Calls a function with the number of every layer call before it is made."""
    net = comfy.module("infdit_core.network.model").InfDiT
    layer = net.layer

    def install(before):
        calls = 0

        def counted(self, *args):
            nonlocal calls
            calls += 1
            before(calls)
            return layer(self, *args)

        monkeypatch.setattr(net, "layer", counted)

    return install


@pytest.mark.comfy
def test_out_of_memory_at_every_chunk(load, upscale, image, layers, caplog):
    model = load("tiny")[0]
    expected = upscale(model, image, steps=2)  # once before, since making the plans calls layers
    for at in range(1, TINY.num_layers * 3 + 1):

        def fail(n, at=at):
            if n == at:
                raise torch.OutOfMemoryError("injected")

        layers(fail)
        caplog.clear()
        result = upscale(model, image, steps=2)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        assert "out of memory with" in caplog.text


@pytest.mark.comfy
def test_cancelling_at_every_chunk(comfy, load, upscale, image, layers, management):
    """It takes effect at that chunk, and the next run gives the same picture."""
    model = comfy.nodes["InfDiTSchedule"].execute(load("tiny")[0], "layer by layer", 1, False, 0.0)
    model = model.args[0]
    done = []
    layers(done.append)
    expected = upscale(model, image, steps=2)
    total = len(done)
    assert total == 2 * TINY.num_layers * 3  # blocks, layers, evaluations
    before = live_tensors()

    for at in range(1, total + 1):
        done.clear()

        def cancel(n, at=at):
            done.append(n)
            if n == at:
                management.interrupt_current_processing(True)

        layers(cancel)
        with pytest.raises(management.InterruptProcessingException):
            upscale(model, image, steps=2)
        assert len(done) == at
        management.interrupt_current_processing(False)
    assert live_tensors() <= before
    layers(done.append)
    assert torch.equal(upscale(model, image, steps=2), expected)


@pytest.mark.comfy
def test_a_preview_that_fails_costs_the_preview_alone(
    comfy, load, upscale, image, monkeypatch, caplog
):
    model = load("tiny")[0]
    expected = upscale(model, image)

    def fail(denoised):
        raise OSError("no encoder")

    monkeypatch.setattr(comfy.module("nodes.infdit.progress"), "preview_image", fail)
    assert torch.equal(upscale(model, image), expected)
    assert "Inf-DiT: no preview: no encoder" in caplog.text


@pytest.mark.comfy
def test_an_exception_in_core_callbacks_ends_the_run_alone(
    comfy, load, upscale, image, monkeypatch
):
    """Of the interface's hook, which ComfyUI owns: the error comes out, the next run works."""
    utils, model = importlib.import_module("comfy.utils"), load("tiny")[0]
    expected = upscale(model, image)

    def fail(*args, **options):
        raise ConnectionError("the browser is gone")

    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", fail)
    with pytest.raises(ConnectionError):
        upscale(model, image)
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", None)
    assert torch.equal(upscale(model, image), expected)


@pytest.mark.comfy
def test_a_result_larger_than_the_memory_is_refused_before_any_work(
    comfy, load, upscale, image, monkeypatch, layers
):
    model, calls = load("tiny")[0], []
    layers(calls.append)
    monkeypatch.setattr(comfy.module("infdit_core.memory.host"), "available_bytes", lambda: 5e5)
    monkeypatch.setattr(comfy.module("infdit_core.upscale"), "lay_out", None)
    monkeypatch.setattr(comfy.module("nodes.infdit.runs"), "plans", None)
    message = "128×64 px need at least 1 MB of RAM; 0 MB are free"
    with pytest.raises(ValueError, match=f"^Inf-DiT Upscale: {message}"):
        upscale(model, image, 4.0)
    many = image.expand(64, -1, -1, -1)
    with pytest.raises(ValueError, match="Inf-DiT Upscale: 64 pictures of 128×64 px need"):
        upscale(model, many, 4.0)
    with pytest.raises(ValueError, match="Inf-DiT Conditioning: 128×64 px need"):
        comfy.nodes["InfDiTConditioning"].execute(model, image, 4.0)
    assert calls == []


@pytest.mark.comfy
@pytest.mark.parametrize(
    "name", ["../tiny.safetensors", "/etc/passwd", "..\\tiny.safetensors", "", "tiny", 7, ["a"]]
)
def test_names_that_leave_the_folder_are_refused(comfy, load, name):
    load("tiny")
    outside = comfy.models_dir / "tiny.safetensors"
    outside.touch()
    for node in ("InfDiTCheckpointLoader", "InfDiTCLIPLoader"):
        assert f"{name!r} is not there" in comfy.nodes[node].validate_inputs(name)
    if isinstance(name, str) and name:
        folder_paths = importlib.import_module("folder_paths")
        found = folder_paths.get_full_path("infdit", name)
        assert found is None or Path(found).is_relative_to(comfy.models_dir / "infdit")


@pytest.mark.comfy
def test_a_name_from_another_node_is_looked_up_later(comfy, load):
    load("tiny")
    loader = comfy.nodes["InfDiTCheckpointLoader"]
    assert loader.validate_inputs(None) is True
    assert loader.fingerprint_inputs(model_name=None, weight_dtype="default") == ""
