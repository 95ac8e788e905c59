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
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


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
    assert upscale(folder, "-o", tmp_path / "out", "--overwrite") == 1
    assert "out/b.png is a folder; expected another --output" in capsys.readouterr().err
    assert sorted(content(tmp_path / "out")) == ["a.png", "c.png"]


def test_failures_are_told_at_the_end(folder, upscale, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"no picture")
    Image.new("RGB", (3, 3)).save(folder / ".hidden.png")
    assert upscale(folder, "-o", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.out.count(" -> ") == 2
    first, last = said.err.splitlines()
    assert first.startswith(f"infdit: error: {folder / 'b.png'} cannot be read as a picture: ")
    assert last == "infdit: error: 1 of 3 pictures could not be upscaled: b.png"
    assert sorted(content(tmp_path / "out")) == ["a.png", "c.png"]


@pytest.mark.parametrize("name", ["x" * 251, "é" * 125 + "x"])
def test_the_longest_names_come_through(folder, upscale, tmp_path, name):
    (folder / "b.png").rename(folder / f"{name}.png")
    assert upscale(folder, "-o", tmp_path / "out") == 0
    assert sorted(content(tmp_path / "out")) == sorted(["a.png", "c.png", f"{name}.png"])
    assert upscale(folder, "-o", tmp_path / "jpg", "--format", "webp") == 1
    assert sorted(content(tmp_path / "jpg")) == ["a.webp", "c.webp"]


def test_what_no_picture_could_do_is_said_once(folder, upscale, tmp_path, capsys):
    (tmp_path / "plain").write_text("a file")
    for output, options, message in (
        ("plain", [], "plain cannot be made (File exists)"),
        ("out", ["--format", "webp", "--bit-depth", 16], "expected .png or .tif for 16 bits"),
    ):
        assert upscale(folder, "-o", tmp_path / output, *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.parametrize("name", ["x" * 243, "é" * 121 + "x"])
def test_a_conversion_with_the_longest_name(model, tmp_path, name):
    target = tmp_path / f"{name}.safetensors"
    assert len(os.fsencode(target.name)) == 255
    convert(model, target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_recursive_run_goes_on(folder, upscale, tmp_path, capsys):
    (folder / "x").mkdir()
    (folder / "b.png").rename(folder / "x" / "a.png")
    out = folder / "out"
    for said in (3, 0):
        assert upscale(folder, "-o", out, "--recursive") == 0
        assert capsys.readouterr().out.count(" -> ") == said
    assert sorted(content(out)) == ["a.png", "c.png", "x/a.png"]


@pytest.mark.parametrize("fault", ["vanished", "replaced", "refused", "unlisted"])
def test_a_file_that_changes_while_running_fails_alone(
    folder, upscale, tmp_path, monkeypatch, capsys, fault
):
    out, load, replace = tmp_path / "out", commands._load, os.replace

    def meanwhile(*args):
        if fault == "vanished":
            (folder / "b.png").unlink()
        elif fault == "replaced":
            Image.new("RGBA", (3, 3)).save(folder / "b.png")
        elif fault == "unlisted":
            (out / "b.jpg").mkdir()
        return load(*args)

    def refused(source, target):
        if fault == "refused" and Path(target).stem == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(commands, "_load", meanwhile)
    monkeypatch.setattr(os, "replace", refused)
    assert upscale(folder, "-o", out, "--format", "jpg") == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"infdit: error: {folder / 'b.png'}")
    reasons = {
        "vanished": "b.png does not exist",
        "replaced": "JPEG has no alpha",
        "refused": "Permission denied",
        "unlisted": "it has come into being meanwhile",
    }
    assert reasons[fault] in first
    assert last == "infdit: error: 1 of 3 pictures could not be upscaled: b.png"
    assert sorted(content(out)) == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "webp"], "strip.webp: expected sides of at most 16383 px"),
        (["--scale", "0"], "expected a factor above 0, got 0"),
        (["--scale", "1e308"], "expected a factor above 0"),
        (["--size", "1000000000", "--format", "tif"], "1000000000×400000 px need at least"),
        (["--format", "jpg"], "JPEG has no alpha"),
        (["--start", "none.png"], "none.png does not exist"),
    ],
)
def test_one_picture_ends_before_the_model_is_loaded(
    upscale, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setattr(commands, "_load", None)
    Image.new("RGBA", (5000, 2), (1, 2, 3, 4)).save(tmp_path / "strip.png")
    assert upscale(tmp_path / "strip.png", "-o", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert content(tmp_path).keys() == {"strip.png"}


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
    with pytest.raises(ValueError, match=r"^1000000×1000000 px need at least 36000.0 GB"):
        host_memory.require_memory((10**6, 10**6), "cuda")
    with pytest.raises(ValueError, match=r"^99 pictures of 100000×100000 px need at least 1248"):
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
