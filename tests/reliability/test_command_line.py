"""`infdit upscale` in production: cut off, disturbed, and never losing anything."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from infdit_core.__main__ import main
from infdit_core.checkpoints.convert import convert
from infdit_core.cli import commands
from infdit_core.memory import host as host_memory
from infdit_core.pictures import files as image_io
from tests.goldens import TINY, random_tensors

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--steps", "1", "--solver", "euler", "--device", "cpu", "--schedule", "full"]
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_file(random_tensors(TINY), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures."""
    path = tmp_path / "in"
    path.mkdir()
    for seed, name in enumerate(NAMES):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


@pytest.fixture
def upscale(model):
    def run(*args: object) -> int:
        return main(["upscale", *FAST, "--model", str(model), *map(str, args)])

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KILLED_WHILE_WRITING = """
import os, signal, sys
from infdit_core.__main__ import main

fsync, count = os.fsync, 0

def killed(descriptor):
    global count
    count += 1
    if count == 2:
        os.truncate(descriptor, 4)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on(model, folder, upscale, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert upscale(folder, "-o", whole) == 0
    arguments = ["upscale", *FAST, "--model", str(model), str(folder), "-o", str(out)]
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = content(out)
    assert left.pop("a.png") == (whole / "a.png").read_bytes()
    ((part, half),) = left.items()
    assert part.startswith(".")  # no name that anybody takes for a result
    assert half == b"\x89PNG"

    finished = (out / "a.png").stat().st_mtime_ns
    capsys.readouterr()
    assert upscale(folder, "-o", out) == 0
    said = capsys.readouterr().out
    assert "a.png is there already; --overwrite replaces it" in said
    assert said.count(" -> ") == 2
    assert (out / "a.png").stat().st_mtime_ns == finished
    assert content(out) == content(whole)


def test_a_finished_run_does_nothing(folder, upscale, tmp_path, monkeypatch):
    assert upscale(folder, "-o", tmp_path / "out") == 0
    monkeypatch.setattr(commands, "load_model", None)
    assert upscale(folder, "-o", tmp_path / "out") == 0


def test_only_overwrite_overwrites(folder, upscale, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").write_bytes(b"precious")
    assert upscale(folder, "-o", out) == 0
    assert (out / "b.png").read_bytes() == b"precious"
    assert upscale(folder, "-o", out, "--overwrite") == 0
    assert Image.open(out / "b.png").size == (48, 36)


def test_a_result_that_comes_meanwhile_is_kept(folder, upscale, tmp_path, monkeypatch, capsys):
    out, made = tmp_path / "out", commands.upscale

    def meanwhile(*args, **options):
        (out / "b.png").write_bytes(b"theirs")
        return made(*args, **options)

    monkeypatch.setattr(commands, "upscale", meanwhile)
    assert upscale(folder, "-o", out) == 1
    assert "b.png cannot be written: it has come into being meanwhile" in capsys.readouterr().err
    assert (out / "b.png").read_bytes() == b"theirs"
    assert sorted(content(out)) == ["a.png", "b.png", "c.png"]


def test_a_folder_in_the_way_is_an_error(folder, upscale, tmp_path, capsys):
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    assert upscale(folder, "-o", tmp_path / "out") == 1
    assert "b.png already exists" in capsys.readouterr().err


def test_failures_are_told_at_the_end(folder, upscale, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"no picture")
    Image.new("RGB", (3, 3)).save(folder / ".hidden.png")
    assert upscale(folder, "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out.count(" -> ") == 2
    first, last = said.err.splitlines()
    assert "b.png cannot be read as a picture" in first
    assert last == "infdit: error: 1 of 3 pictures could not be upscaled: b.png"
    assert sorted(content(tmp_path / "out")) == ["a.png", "c.png"]


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fail", [no_memory, lambda: bytearray(2**62), lambda: torch.empty(2**55)])
def test_one_picture_too_many_for_the_memory(folder, upscale, tmp_path, monkeypatch, capsys, fail):
    made, calls = commands.upscale, []

    def fails_once(*args, **options):
        calls.append(args)
        return fail() if len(calls) == 2 else made(*args, **options)

    monkeypatch.setattr(commands, "upscale", fails_once)
    assert upscale(folder, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "b.png: the memory of cpu is too small for --schedule full; try block-major" in said
    assert said.endswith("1 of 3 pictures could not be upscaled: b.png\n")
    assert sorted(content(tmp_path / "out")) == ["a.png", "c.png"]


def test_memory_that_is_counted():
    assert 1e8 < host_memory.available_bytes() < 1e15
    host_memory.require_memory((64, 64), "cpu")
    with pytest.raises(ValueError, match=r"^1000000×1000000 px need at least 48000.0 GB"):
        host_memory.require_memory((10**6, 10**6), "cuda")
    with pytest.raises(ValueError, match=r"^99 pictures of 100000×100000 px need at least 1296"):
        host_memory.require_memory((10**5, 10**5), "cpu", results=99)


@pytest.mark.parametrize(
    ("row", "folder", "names"),
    [
        ("0::/", "", ("memory.max", "memory.current", "active_file")),
        ("0::/user/job 7", "user/job 7", ("memory.max", "memory.current", "active_file")),
        ("0::/user/job/step", "user", ("memory.max", "memory.current", "active_file")),
        ("0::/not/seen/from/here", "", ("memory.max", "memory.current", "active_file")),
        (
            "9:cpu:/\n7:memory:/docker/1",
            "memory/docker/1",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file"),
        ),
    ],
)
def test_the_share_of_a_container_counts(tmp_path, monkeypatch, row, folder, names):
    limit, used, cache = names
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000\n")
    (group / used).write_text("900\n")
    (group / "memory.stat").write_text(f"anon 500\n{cache} 7\n")
    (tmp_path / "own").write_text(f"{row}\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", tmp_path / "own")
    assert host_memory.available_bytes() == 107
    assert host_memory.waiting_bytes() == pytest.approx(96.3)
    (group / limit).write_text("max\n")
    assert host_memory.available_bytes() > 1000


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
def test_formats_of_a_folder(folder, upscale, tmp_path, kind):
    assert upscale(folder, "-o", tmp_path / "out", "--format", kind) == 0
    results = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert {picture.format for picture in results} == {
        {"png": "PNG", "tif": "TIFF", "webp": "WEBP", "jpg": "JPEG"}[kind]
    }
    assert {picture.size for picture in results} == {(48, 36)}


def test_16_bits_where_asked(folder, upscale, tmp_path):
    for kind in ("png", "tif"):
        out = tmp_path / kind
        assert upscale(folder, "-o", out, "--format", kind, "--bit-depth", 16) == 0
    assert image_io.read_image(tmp_path / "png" / "a.png")[1].bit_depth == 16
    assert Image.open(tmp_path / "tif" / "a.tif").tag_v2[258] == (16, 16, 16)


# A full disk


@contextmanager
def small_files():
    """The system refuses to write more than 500 bytes into a file, as a full disk would.

    Not a fixture: pytest's own output, which may go to a file, comes while fixtures are set up.
    """
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_disk_that_takes_no_more(tmp_path, kind, bits):
    if bits == 16 and kind in ("webp", "jpg"):
        pytest.skip("8 bits only")
    (tmp_path / f"a.{kind}").write_bytes(b"old")
    error = pytest.raises(image_io.ImageError, match=rf"a\.{kind} cannot be written: ")
    with error, small_files():
        image_io.write_image(tmp_path / f"a.{kind}", torch.rand(1, 40, 40, 3), bit_depth=bits)
    assert content(tmp_path) == {f"a.{kind}": b"old"}


def test_a_conversion_on_a_disk_that_takes_no_more(model, tmp_path):
    error = pytest.raises(ValueError, match=r"b\.safetensors cannot be written: .*File too large")
    with error, small_files():
        convert(model, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_ends_the_run(folder, upscale, tmp_path, monkeypatch, capsys):
    """Every further picture would be made for nothing; the next run goes on."""
    out = tmp_path / "out"
    replace, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", full)
    assert upscale(folder, "-o", out) == 1
    assert "b.png cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert len(calls) == 2
    assert list(content(out)) == ["a.png"]
    assert upscale(folder, "-o", out) == 0
    assert list(content(out)) == ["a.png", "b.png", "c.png"]


def test_what_a_file_says_does_not_drive_the_terminal(tmp_path, capsys):
    save_file(random_tensors(TINY), tmp_path / "a.safetensors", metadata={"x": "\x1b[2J\nfake: 1"})
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\nfake" not in said
    assert "\\x1b[2J" in said
