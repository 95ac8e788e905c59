"""Core's clones of the model on several devices: on the CPU, which goes by two names here."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.comfy

DEVICES = [torch.device("cpu"), torch.device("cpu", 1), torch.device("cpu", 2)]


@pytest.fixture
def on_devices(comfy, monkeypatch):
    """A function that puts a model on so many devices, as MultiGPU Work Units does."""
    management = importlib.import_module("comfy.model_management")
    multigpu = importlib.import_module("comfy.multigpu")
    monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: DEVICES)

    def spread(model, count):
        return multigpu.create_multigpu_deepclones(model, count)

    return spread


@pytest.fixture
def strips(monkeypatch, comfy):
    """The chunks of all strips that are computed."""
    network = comfy.module("infdit_core.network.model").InfDiT
    seen, forward = [], network.forward

    def count(self, x, *args, strip=None, **kwargs):
        if strip is not None:
            seen.append(strip.chunk)
        return forward(self, x, *args, strip=strip, **kwargs)

    monkeypatch.setattr(network, "forward", count)
    return seen


@pytest.mark.parametrize("name", ["tiny", "prior"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_picture_of_one_device_to_the_bit(load, upscale, on_devices, strips, name, count):
    model, image = load(name)[0], torch.rand(1, 40, 17, 3)  # of five lines of two blocks
    expected = upscale(model, image, upscale_by=4.0)
    assert not strips
    found = upscale(on_devices(model, count), image, upscale_by=4.0)
    assert torch.equal(found, expected)
    evaluations, left = divmod(len(strips), count)
    assert evaluations > 0
    assert left == 0
    assert sum(chunk.rows for chunk in strips) == 5 * evaluations
    assert len({chunk.top for chunk in strips}) == count


def test_conditions_of_a_ksampler_take_strips_one_after_the_other(comfy, load, on_devices, strips):
    """With a cfg there are two, which core would give a device each."""
    import nodes

    model, image = load("tiny")[0], torch.rand(1, 32, 16, 3)
    conditioning = comfy.nodes["InfDiTConditioning"].execute(model, image, 4.0).args
    positive, latent = conditioning[0], conditioning[1]
    draw = nodes.KSampler().sample
    settings = (3, 2, 2.0, "euler", "normal", positive, positive, latent)
    expected = draw(model, *settings)[0]["samples"]
    found = draw(on_devices(model, 2), *settings)[0]["samples"]
    assert torch.equal(found, expected)
    assert len(strips) == 2 * 2 * 2  # strips of conditions of steps


def test_lines_go_by_the_speed_of_the_devices(load, upscale, on_devices, strips):
    multigpu = importlib.import_module("comfy.multigpu")
    model = on_devices(load("tiny")[0], 2)
    group = multigpu.GPUOptionsGroup()
    group.add(multigpu.GPUOptions(1, 3.0))
    group.register(model)
    upscale(model, torch.rand(1, 32, 8, 3), upscale_by=4.0, steps=1)
    assert {chunk.rows for chunk in strips} == {1, 3}


def test_out_of_memory_on_one_device(comfy, load, upscale, on_devices, monkeypatch, caplog):
    network = comfy.module("infdit_core.network.model").InfDiT
    model, image = load("tiny")[0], torch.rand(1, 32, 16, 3)
    expected = upscale(model, image, upscale_by=4.0)
    spread, layer, left = on_devices(model, 2), network.layer, [1]

    def fail(self, n, tokens, modulation, rotary, frontier, *args):
        if n == 1 and frontier._link is not None and frontier._link.has_before and left:
            left.pop()
            raise torch.OutOfMemoryError("injected")
        return layer(self, n, tokens, modulation, rotary, frontier, *args)

    monkeypatch.setattr(network, "layer", fail)
    assert torch.equal(upscale(spread, image, upscale_by=4.0), expected)
    assert not left
    assert "out of memory with" in caplog.text


def test_cancel_reaches_all(comfy, load, upscale, on_devices, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    network = comfy.module("infdit_core.network.model").InfDiT
    layer = network.layer

    def cancel(self, n, *args):
        management.interrupt_current_processing(True)
        return layer(self, n, *args)

    monkeypatch.setattr(network, "layer", cancel)
    model = on_devices(load("tiny")[0], 3)
    with pytest.raises(management.InterruptProcessingException):
        upscale(model, torch.rand(1, 48, 8, 3), upscale_by=4.0)
    management.interrupt_current_processing(False)
