"""Broken and hostile files get a clear error, soon and in little memory, and have no effect.

More of the inputs by chance, from the seed INFDIT_SEED on:

    INFDIT_SEED=1000000 python3 tools/dev.py test -m slow tests/reliability/test_hostile_files.py
"""

import io
import json
import logging
import os
import pickletools
import struct
import sys
import time
import zipfile
from pathlib import Path
from random import Random

import pytest

from infdit_core.checkpoints.checkpoint import CheckpointError, open_checkpoint
from tests.reliability import fuzz, hostile

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's"),
    pytest.mark.filterwarnings("ignore:::PIL"),  # what Pillow says about damage
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    fuzz.warm_up(path)
    for name in os.listdir(path):
        (path / name).unlink()
    return path


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    """Whatever a file does to the working folder is seen."""
    monkeypatch.chdir(folder)


@pytest.fixture
def unlogged():
    """pytest would keep every warning, and with its error what was read."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def refused(path: Path, data: bytes) -> str:
    """The message that a checkpoint is refused with; that nothing else happens is checked."""
    path.write_bytes(data)
    with fuzz.bounded_memory():
        message = fuzz.attempt(fuzz.load, path, CheckpointError)
    assert os.listdir(path.parent) == [path.name]
    assert message is not None
    return message


LONG = (pytest.mark.slow, pytest.mark.timeout(7200))


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("checkpoint", 800),
        ("picture", 300),
        pytest.param("checkpoint", 100_000, marks=LONG),
        pytest.param("picture", 50_000, marks=LONG),
    ],
)
def test_any_damage(folder, target, count, unlogged):
    make, read, error, limit = fuzz.TARGETS[target]
    path = folder / "input"
    with fuzz.bounded_memory():
        for seed in range(fuzz.FIRST_SEED, fuzz.FIRST_SEED + count):
            kind, data = make(Random(seed))
            path.write_bytes(data)
            try:
                fuzz.attempt(read, path, error, limit)
            except fuzz.Finding as finding:
                pytest.fail(f"seed {seed}, {kind}: {finding}")
    assert os.listdir(folder) == ["input"]


def test_the_whole_files_are_read(folder):
    for data in (hostile.whole_pt(), hostile.whole_safetensors()):
        path = folder / "input"
        path.write_bytes(data)
        assert fuzz.attempt(fuzz.load, path, CheckpointError) is None


@pytest.mark.parametrize("act", ["write", "import", "exec", "process", "slow", "crash", "memory"])
def test_the_watch_sees_what_it_forbids(folder, act):
    """A fuzzer that sees nothing would pass as well."""

    def read(path: Path):
        match act:
            case "write":
                (path.parent / "written").write_bytes(b"x")
            case "import":
                sys.modules.pop("this_is_no_module", None)
                __import__("colorsys")
            case "exec":
                exec("1")
            case "process":
                os.system("true")
            case "slow":
                end = time.thread_time() + fuzz.SECONDS
                while time.thread_time() <= end:
                    pass
            case "crash":
                raise KeyError("x")
            case "memory":
                bytearray(2**30)

    sys.modules.pop("colorsys", None)
    path = folder / "input"
    path.touch()
    with pytest.raises(fuzz.Finding), fuzz.bounded_memory():
        fuzz.attempt(read, path, CheckpointError)
    (folder / "written").unlink(missing_ok=True)


ACTING = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4",
          "GLOBAL", "STACK_GLOBAL", "PERSID", "BINPERSID", "APPEND", "APPENDS", "SETITEM",
          "SETITEMS"}  # fmt: skip
"""Opcodes that look up, call, change or hand over to code, of all that Python's pickle has."""


def test_every_acting_opcode_has_its_payload():
    programs = (p.replace(b"{command}", b"touch a") + b"." for p in hostile.CALLS.values())
    used = {opcode.name for program in programs for opcode, _, _ in pickletools.genops(program)}
    assert used >= ACTING


@pytest.mark.parametrize("name", hostile.CALLS)
@pytest.mark.parametrize("where", ["beside the weights", "alone", "as the weights", "as a key"])
def test_nothing_that_a_pickle_calls_is_called(folder, name, where):
    payload = hostile.CALLS[name].replace(b"{command}", b"touch a")
    pickled = {
        "beside the weights": hostile.planted(payload),
        "alone": payload + b".",
        "as the weights": b"}Vmodule\n" + payload + b"s.",
        "as a key": b"}" + payload + b"Nsr\x01\x00\x00\x00.",
    }[where]
    path = folder / "input"
    path.write_bytes(hostile.with_pickle(pickled))
    before = list(sys.path)
    message = fuzz.attempt(fuzz.load, path, CheckpointError)
    assert os.listdir(folder) == ["input"]
    assert sys.path == before
    assert (message is None) == (where == "beside the weights")


def header_of(count: int, size: int) -> bytes:
    """A valid .safetensors header of `count` empty tensors, padded with blanks to `size` bytes."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(i): entry for i in range(count)}).encode()
    return struct.pack("<Q", max(size, len(text))) + text + b" " * (size - len(text))


@pytest.mark.parametrize("count", [1, 20_000])
def test_a_header_of_100_mb(folder, count):
    message = refused(folder / "input", header_of(count, 100_000_000))
    assert "its safetensors header has 100000000 bytes; expected at most 4194304" in message


def test_a_header_as_long_as_is_allowed(folder):
    message = refused(folder / "input", header_of(40_000, 4 * 2**20))
    assert "holds 40000 tensors" in message


def test_a_zip_bomb_is_not_unpacked(folder):
    files = hostile.entries() | {"archive/data.pkl": bytes(10**8)}
    packed = hostile.archive_of(files, zipfile.ZIP_DEFLATED)
    assert len(packed) < 10**6
    assert "compressed or encrypted" in refused(folder / "input", packed)


def test_a_directory_of_a_million_entries(folder):
    """Reading the archive's directory alone would take seconds and hundreds of MB."""
    data = hostile.archive_of({str(i): b"" for i in range(1000)})
    start, end = data.find(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    directory = data[start:end] * 100
    record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFE, 0xFFFE, len(directory), start, 0)
    message = refused(folder / "input", data[:start] + directory + record)
    assert f"a directory of {len(directory)} bytes; expected at most 4194304" in message


def test_a_declared_size_is_not_allocated(folder):
    """The size of a stored entry that is shorter: zipfile would ask for 4 GB at once."""
    data = bytearray(hostile.whole_pt())
    entry = data.find(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = b"\xfe\xff\xff\xff" * 2
    assert "lies outside the file" in refused(folder / "input", bytes(data))


def test_a_number_of_megabytes_in_a_shape(folder):
    """Multiplying the sizes of such a tensor would take hours."""
    vast = b"\x8b" + struct.pack("<i", 3_000_000) + b"\x7f" * 3_000_000
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQK\x00(" + vast + b"q\x01" + b"h\x01" * 15
        + b"t(" + b"K\x01" * 16 + b"tI00\n}tR"
    )  # fmt: skip
    path = folder / "input"
    path.write_bytes(hostile.with_pickle(hostile.planted(tensor)))
    assert fuzz.attempt(fuzz.load, path, CheckpointError) is None  # it is no tensor


def test_one_storage_sold_many_times_is_refused(folder):
    """A small file with thousands of views of one storage, which copying would multiply."""
    import torch

    buffer = io.BytesIO()
    shared = torch.zeros(100_000)
    torch.save({f"t{i}": shared for i in range(1000)}, buffer)
    message = refused(folder / "input", buffer.getvalue())
    assert "its tensors claim 400000000 bytes in a file of" in message


@pytest.mark.parametrize("name", ["n" * 100_000, "\x1b[2Jowned", "a\nb"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_names_that_no_message_could_show(folder, name, kind):
    import torch
    from safetensors.torch import save

    tensors = {name: torch.zeros(1)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    data = buffer.getvalue() if kind == "pt" else save(tensors)
    message = refused(folder / "input", data)
    assert f"a tensor's name has {len(name)} characters" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["../../evil", "{outside}/evil", "..\\evil", "C:evil"])
def test_names_in_an_archive_lead_nowhere(folder, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside")
    name = name.format(outside=outside)
    files = {k.replace("archive/", f"{name}/"): v for k, v in hostile.entries().items()}
    path = folder / "input"
    path.write_bytes(hostile.archive_of(files))
    fuzz.attempt(fuzz.load, path, CheckpointError)
    assert os.listdir(folder) == ["input"]
    assert os.listdir(outside) == []


def test_links_pipes_and_devices(folder, tmp_path):
    def said(path: Path) -> str | None:
        return fuzz.attempt(fuzz.load, path, CheckpointError)

    whole = tmp_path / "whole.pt"
    whole.write_bytes(hostile.whole_pt())
    link = tmp_path / "link.pt"
    link.symlink_to(whole)
    assert said(link) is None
    for target, part in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "loop.pt", "cannot be read (Too many levels of symbolic links)"),
        (Path("/etc/hostname"), "text file" if Path("/etc/hostname").exists() else "not exist"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path / "pipe", "a pipe or a device"),
    ):
        if target.name == "pipe":
            os.mkfifo(target)
        link = tmp_path / "loop.pt"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert part in str(said(link))


def test_a_checkpoint_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(hostile.whole_pt())
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "No")))
    with pytest.raises(CheckpointError, match=r"cannot be read \(No\)"):
        open_checkpoint(path)


def test_a_message_does_not_cite_the_file(folder):
    assert len(refused(folder / "input", hostile.with_pickle(b"S" + b"x" * 10**6 + b"\n."))) < 400
