"""Pictures in files: the bits of pictures in memory, nothing left behind, and runs that go on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from infdit_core import InfDiTError, Sampler, bands, load_model, sampling, upscale
from infdit_core.__main__ import main
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.cli import commands
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.memory.planner import Workload, evaluation_bytes
from infdit_core.pictures import prepare
from infdit_core.pictures.colour_fix import COLOUR_FIXES
from infdit_core.pictures.files import read_image, write_image
from infdit_core.pictures.resize import resize_into
from infdit_core.sampling import PRESETS, Preset
from infdit_core.scratch import Scratch, ScratchError
from tests.goldens import TINY, random_model

MODEL = BUNDLED_FOLDER / "infdit_small.safetensors"
IMAGE = torch.rand(1, 19, 27, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundled():
    return load_model(MODEL).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY, 0.05)


@pytest.fixture
def small_bands(monkeypatch):
    """Every picture is large, and a band a few rows of it."""
    monkeypatch.setattr(prepare, "WHOLE_PX", 0)
    monkeypatch.setattr(bands, "_BAND", 1000)
    monkeypatch.setattr(sampling, "_PIECE", 1024)


def test_a_picture_in_a_file_leaves_nothing_behind(tmp_path: Path):
    scratch = Scratch(tmp_path / "new")
    a, b = scratch.empty((1, 3, 40, 50)), scratch.empty((7,))
    assert list((tmp_path / "new").iterdir()) == []
    with LiveBytes() as live:
        scratch.empty((1000,)).fill_(3)
    assert live.peak == 0, "the pages of a file are the system's"
    a.fill_(2)
    b.fill_(1)
    assert a.sum() == 2 * a.numel()
    assert (a.dtype, a.shape) == (torch.float32, (1, 3, 40, 50))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_drawn(
    tiny, tmp_path: Path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**5))
    monkeypatch.setattr(type(tiny), "forward", None)
    scratch = Scratch(tmp_path)
    message = rf"256×128 px: 2.8 MB .* needed in {tmp_path}, where 0.1 MB are free"
    with pytest.raises(InfDiTError, match=message):
        upscale(IMAGE, (128, 256), model=tiny, scratch=scratch)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ScratchError, match=f"4.0 MB of scratch files are needed in {tmp_path}"):
        scratch.empty((10**6,))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ScratchError, match="file cannot be used for scratch files"):
        Scratch(tmp_path / "file")


@pytest.mark.parametrize("size", [(76, 108), (50, 70), (19, 27), (152, 216)], ids=str)
def test_pictures_in_files_have_the_bits_of_those_in_memory(
    bundled, tmp_path: Path, small_bands, size
):
    expected = upscale(IMAGE, size, model=bundled)
    with Scratch(tmp_path) as scratch:
        found = upscale(IMAGE, size, model=bundled, scratch=scratch)
    assert torch.equal(found, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_bands_change_no_bit_of_a_solver_and_hardly_a_picture(
    bundled, monkeypatch, tmp_path: Path, solver
):
    """Preparation by bands differs from torch's by the rounding of places."""
    draw = {"model": bundled, "preset": Preset(solver, 3)}
    whole = upscale(IMAGE, 4.0, **draw)
    monkeypatch.setattr(bands, "_BAND", 1000)
    assert torch.equal(upscale(IMAGE, 4.0, **draw), whole)
    monkeypatch.setattr(prepare, "WHOLE_PX", 0)
    torch.testing.assert_close(upscale(IMAGE, 4.0, **draw), whole, atol=1e-4, rtol=0)
    with Scratch(tmp_path) as scratch:
        assert torch.equal(
            upscale(IMAGE, 4.0, scratch=scratch, **draw), upscale(IMAGE, 4.0, **draw)
        )


@pytest.mark.parametrize("method", COLOUR_FIXES)
def test_colours_are_fixed_in_files(tiny, tmp_path: Path, monkeypatch, method):
    draw = {"model": tiny, "preset": PRESETS["draft"], "colour_fix": method}
    whole = upscale(IMAGE, 4.0, **draw)
    monkeypatch.setattr(prepare, "WHOLE_PX", 0)
    monkeypatch.setattr(bands, "_BAND", 300)
    by_bands = upscale(IMAGE, 4.0, **draw)
    torch.testing.assert_close(by_bands, whole, atol=1e-4, rtol=0)
    with Scratch(tmp_path) as scratch:
        assert torch.equal(upscale(IMAGE, 4.0, scratch=scratch, **draw), by_bands)


@pytest.mark.parametrize("size", [(120, 52), (30, 13), (41, 66), (97, 131)], ids=str)
def test_a_band_is_resized_as_the_whole(monkeypatch, size):
    rows, columns = torch.linspace(0, 9, 60)[:, None], torch.linspace(0, 5, 33)
    picture = (rows.sin() * columns.cos())[None, None].expand(1, 3, -1, -1)
    expected = F.interpolate(picture, size, mode="bicubic", antialias=True)
    found = []
    for band in (1, 700, 10**6):
        monkeypatch.setattr(bands, "_BAND", band)
        found.append(resize_into(torch.empty(1, 3, *size), picture))
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=0)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_a_large_canvas_is_prepared_as_a_small_one(monkeypatch):
    image = torch.rand(2, 37, 51, 4)
    for factor in (4.0, 1.0, 2.7, 0.6):
        whole = prepare.prepare(image, factor, block_px=32)
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "WHOLE_PX", 0)
            patch.setattr(bands, "_BAND", 1000)
            found = prepare.prepare(image, factor, block_px=32)
        for name in ("concat", "lr", "alpha"):
            expected = getattr(whole, name)
            torch.testing.assert_close(getattr(found, name), expected, atol=5e-5, rtol=0)


def test_what_is_not_made_in_bands_is_refused(tiny, tmp_path: Path):
    scratch = Scratch(tmp_path)
    alpha = torch.rand(2, 8, 8, 4)
    with pytest.raises(InfDiTError, match="2 pictures at a time and alpha and wrap both: expected"):
        upscale(alpha, 4.0, model=tiny, scratch=scratch, wrap="both")
    with pytest.raises(InfDiTError, match="expected no reuse of layers"):
        upscale(IMAGE, 4.0, model=tiny, scratch=scratch, reuse_layers=1)


def test_memory_is_that_of_the_plan_whatever_the_area(tiny, tmp_path: Path, small_bands):
    """For four times the area the network takes what a line of twice the length needs."""
    peaks = []
    for side in (64, 128):
        image = torch.rand(1, side, side, 3)
        with Scratch(tmp_path) as scratch:
            draw = Sampler(tiny, Preset("euler", 1), scratch=scratch)
            canvas = draw.prepare(prepare.prepare(image, block_px=32, empty=scratch.empty))
            schedule = draw.plan(canvas).plan.schedule
            with LiveBytes() as live:
                draw(canvas)
        work = Workload(TINY, 4 * side, 4 * side, torch.float32, device="cpu", scratch=True)
        assert live.peak == pytest.approx(evaluation_bytes(work, schedule), rel=0.1)
        peaks.append(live.peak)
    assert peaks[1] < 2.2 * peaks[0]


class Killed(BaseException):
    """What ends a run in its middle."""


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_run_that_was_killed_goes_on_from_the_last_finished_step(
    tiny, tmp_path: Path, caplog, solver
):
    draw = {"model": tiny, "preset": Preset(solver, 6)}
    expected = upscale(IMAGE, 4.0, **draw)
    for killed in range(6):

        def kill(step, killed=killed):
            if step.index == killed:
                raise Killed

        with pytest.raises(Killed), Scratch(tmp_path) as scratch:
            upscale(IMAGE, 4.0, callback=kill, scratch=scratch, **draw)
        assert len(list(tmp_path.iterdir())) == min(killed, 1)
        taken: list[tuple[int, int]] = []

        def note(step, taken=taken):
            taken.append((step.index, step.total))

        with Scratch(tmp_path) as scratch:
            assert torch.equal(
                upscale(IMAGE, 4.0, callback=note, scratch=scratch, **draw), expected
            )
        assert taken == [(n, 6) for n in range(killed, 6)]
        assert list(tmp_path.iterdir()) == []
    assert "going on after step 5 of 6" in caplog.text


def test_a_pass_that_is_finished_is_not_drawn_again(tiny, tmp_path: Path):
    taken = []

    def kill(step):
        taken.append(step.x.shape)
        if len(taken) == 6 + 2:
            raise Killed

    draw = {"model": tiny, "preset": PRESETS["draft"]}
    with pytest.raises(Killed), Scratch(tmp_path) as scratch:
        upscale(IMAGE, 8.0, callback=kill, scratch=scratch, **draw)
    taken.clear()
    with Scratch(tmp_path) as scratch:
        found = upscale(IMAGE, 8.0, callback=kill, scratch=scratch, **draw)
    assert len(taken) == 5
    assert torch.equal(found, upscale(IMAGE, 8.0, **draw))


def test_the_state_of_another_run_is_left_alone(tiny, tmp_path: Path, caplog):
    def kill(step):
        if step.index == 1:
            raise Killed

    draw = {"model": tiny, "preset": PRESETS["draft"]}
    with pytest.raises(Killed), Scratch(tmp_path) as scratch:
        upscale(IMAGE, 4.0, callback=kill, scratch=scratch, **draw)
    (state,) = tmp_path.iterdir()
    other = random_model(TINY, 0.06)
    for changed in ({"model": other}, {"seed": 1}, {"denoise": 0.5}, {"preset": PRESETS["fast"]}):
        caplog.clear()
        with Scratch(tmp_path) as scratch:
            found = upscale(IMAGE, 4.0, scratch=scratch, **(draw | changed))
        assert torch.equal(found, upscale(IMAGE, 4.0, **(draw | changed)))
        assert f"{state} is of a run with another picture, model or setting" in caplog.text
    assert list(tmp_path.iterdir()) == [state]
    state.write_bytes(state.read_bytes()[:-1])
    with Scratch(tmp_path) as scratch:
        found = upscale(IMAGE, 4.0, scratch=scratch, **draw)
    assert torch.equal(found, upscale(IMAGE, 4.0, **draw))
    assert f"{state} is damaged" in caplog.text


def test_the_command_goes_on_after_a_kill(bundled, tmp_path: Path):
    """To the bit, and with nothing left in the folder at the end."""
    picture, scratch = tmp_path / "picture.png", tmp_path / "scratch"
    write_image(picture, torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0)))

    words = ["upscale", str(picture), "-o", str(tmp_path / "a.png"), "--preset", "draft"]
    command = [sys.executable, "-m", "infdit_core", *words, "--scratch", str(scratch)]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while not list(scratch.glob("*.infdit-state")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    assert first.wait() != 0
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "going on after step" in again.stderr
    with Scratch(tmp_path / "other") as other:
        image, _ = read_image(picture)
        expected = upscale(image, 4.0, model=bundled, preset="draft", scratch=other)
    write_image(tmp_path / "b.png", expected)
    (a, _), (b, _) = read_image(tmp_path / "a.png"), read_image(tmp_path / "b.png")
    assert torch.equal(a, b)
    assert list(scratch.iterdir()) == []


def test_what_a_failed_picture_left_stays_while_others_succeed(tmp_path, monkeypatch):
    def write(path, *args, **kwargs):
        if path.stem == "a":
            raise InfDiTError("cannot be written")
        write_image(path, *args, **kwargs)

    monkeypatch.setattr(commands, "write_image", write)
    pictures, results, scratch = (tmp_path / name for name in ("in", "out", "scratch"))
    pictures.mkdir()
    for n, name in enumerate("abc"):
        write_image(pictures / f"{name}.png", IMAGE.roll(n, 1))
    command = ["upscale", str(pictures), "-o", str(results), "--scratch", str(scratch)]
    assert main([*command, "--device", "cpu"]) == 1
    assert {path.name for path in results.iterdir()} == {"b.png", "c.png"}
    (left,) = scratch.iterdir()
    assert left.suffix == ".infdit-state"
    monkeypatch.undo()
    assert main([*command, "--device", "cpu"]) == 0
    assert list(scratch.iterdir()) == []
