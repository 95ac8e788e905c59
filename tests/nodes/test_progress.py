"""What stands on Inf-DiT Upscale before, while and after it runs: text, preview, bar."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy


def test_a_run_begins_with_its_sizes_and_ends_with_its_result(load, upscale, texts, clock):
    model = load("tiny")[0]
    upscale(model, torch.rand(1, 10, 12, 3), 4.0)
    assert texts[0] == "12x10 -> 48x40, loading"
    assert texts[-1] == "48x40 in 1 s · heun, 4 steps, 7 evaluations"
    last = len(texts)
    upscale(model, torch.rand(2, 10, 14, 3), 2.0, preset="fast")
    assert texts[last] == "14x10 -> 28x20, loading"
    assert texts[-1] == "2 pictures of 28x20 in 1 s · multistep, 12 steps"
    assert not [text for text in texts if "\n" in text]


@pytest.mark.parametrize(
    ("inputs", "used"),
    [
        ({"denoise": 0.0}, "enlarged only"),
        ({"sampler": "dpmpp_2m"}, "dpmpp_2m, 4 steps"),
        ({"sampler": "heun"}, "heun, 4 steps, 7 evaluations"),
        ({"sampler": "uni_pc"}, "unipc, 4 steps"),
    ],
)
def test_the_last_line_says_what_was_used(load, upscale, texts, inputs, used):
    if name := inputs.get("sampler"):
        inputs = {"sampler": importlib.import_module("comfy.samplers").sampler_object(name)}
    upscale(load("tiny")[0], torch.rand(1, 10, 12, 3), **inputs)
    assert texts[-1].endswith(f" · {used}")


def test_the_first_preview_is_the_new_picture_and_none_has_padding(load, upscale, bar):
    red = torch.zeros(1, 10, 20, 3)
    red[..., 0] = 1
    upscale(load("tiny")[0], red)
    (value, _, (_, first, _)), *others = bar
    assert value == 0
    assert first.size == (20, 10)
    assert first.getpixel((3, 3)) == (255, 0, 0)
    assert {preview[1].size for _, _, preview in others if preview} == {(40, 20)}


def test_cancel_and_error_say_where(comfy, load, upscale, texts, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    net, model = comfy.module("infdit_core.network.model").InfDiT, load("tiny")[0]
    forward, calls = net.forward, []

    def stops(error):
        calls.clear()

        def at_the_tenth(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 10:
                raise error
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(net, "forward", at_the_tenth)
        with pytest.raises(type(error)):
            upscale(model, torch.rand(2, 10, 12, 3))

    stops(management.InterruptProcessingException())
    assert texts[-1] == "cancelled at picture 2 of 2, step 2 of 4"
    stops(TypeError("a bug"))
    assert texts[-1] == "stopped at picture 2 of 2, step 2 of 4"
    with pytest.raises(ValueError, match="expected finite pixels"):
        upscale(model, torch.rand(1, 10, 12, 3) / 0)
    assert texts[-1] == "stopped at the start"


def lines(comfy, clock, texts, seconds, pictures=1, sizes=((64, 64),), steps=4):
    """The lines of a run whose evaluations take `seconds`, by evaluations begun so far."""
    shown = []
    with comfy.module("nodes.infdit.progress").SamplingProgress("7") as progress:
        progress.start(torch.rand(pictures, 16, 16, 3), sizes, steps, steps, "euler")
        for run in range(pictures * len(sizes)):
            height, width = sizes[run % len(sizes)]
            progress.begin(SimpleNamespace(height=height, width=width, crop=lambda x: x))
            for step in range(steps):
                for cell in range(1, 11):
                    clock.now += seconds(run * steps + step) / 10
                    progress.cells(cell, 10)
                    shown.append(texts[-1])
                progress.step(step, torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), steps)
    return shown


def test_time_left_leaves_out_the_evaluation_that_loads(comfy, clock, texts):
    """60 s for the first and 10 s for each other: never is more than 90 s left announced."""
    shown = lines(comfy, clock, texts, lambda n: 60 if n == 0 else 10, steps=10)
    assert set(shown[1:12]) == {"step 1 of 10", "step 2 of 10"}
    assert shown[12] == "step 2 of 10 · about 1 min left"
    left = [text.partition("about ")[2] for text in shown[12:]]
    assert left[::10] == [
        "1 min left", "1 min left", "1 min left", "1 min left", "50 s left", "40 s left",
        "30 s left", "20 s left", "10 s left",
    ]  # fmt: skip
    assert texts[-1] == "64x64 in 2 min 30 s · euler, 10 steps"


def test_hours_are_said_in_hours(comfy, clock, texts):
    shown = lines(comfy, clock, texts, lambda n: 3600, steps=20)
    assert shown[14] == "step 2 of 20 · about 18 h left"
    assert shown[164] == "step 17 of 20 · about 3 h 30 min left"
    assert texts[-1] == "64x64 in 20 h · euler, 20 steps"


def test_what_matters_first_and_larger_passes_take_longer(comfy, clock, texts):
    """A pass of 64x64 px and one of 128x128, of 1 and 4 s an evaluation: 20 s a picture."""
    shown = lines(
        comfy, clock, texts, lambda n: 4 if n // 4 % 2 else 1, pictures=2,
        sizes=((64, 64), (128, 128)),
    )  # fmt: skip
    assert "picture 1 of 2 · about 40 s left · pass 1 of 2 · step 3 of 4" in shown
    assert "picture 2 of 2 · about 20 s left · pass 1 of 2 · step 2 of 4" in shown
    assert lines(comfy, clock, texts, lambda n: 4, sizes=((64, 64), (128, 128)))[-1].startswith(
        "pass 2 of 2 · about"
    )


def test_the_peak_of_a_gpu_s_memory_stands_in_the_last_line(comfy, clock, texts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_120_000_000)
    with comfy.module("nodes.infdit.progress").SamplingProgress("7") as progress:
        device = torch.device("cuda", 0)
        progress.start(torch.rand(1, 16, 16, 3), [(64, 48)], 4, 4, "euler", device)
        clock.now += 72
    assert texts == ["16x16 -> 48x64, loading", "48x64 in 1 min 12 s, 5.1 GB · enlarged only"]
