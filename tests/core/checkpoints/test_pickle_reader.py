"""Pickles: where the tensors lie, and that nothing a pickle asks for is done."""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from infdit_core.checkpoints.checkpoint import CheckpointError, open_checkpoint
from infdit_core.checkpoints.pickle_reader import MAX_PICKLE_OPCODES, read_pickle


class _Storage:
    """Pickled as a storage of `numel` floats in the entry data/0."""

    def __init__(self, numel: int):
        self.numel = numel


class _View:
    """Pickled as a tensor with whatever geometry is claimed."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple, stride: tuple):
        self.args = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return ("storage", torch.FloatStorage, "0", "cpu", obj.numel)
        return None


def _save_view(path: Path, numel: int, offset: int, shape: tuple, stride: tuple):
    """A .pt file whose storage really has 8 floats."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({"x": _View(_Storage(numel), offset, shape, stride)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())
        archive.writestr("a/data/0", torch.arange(8.0).numpy().tobytes())


def test_geometry_that_fits(tmp_path):
    _save_view(tmp_path / "a.pt", 8, 1, (2, 2), (4, 2))
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.tensor("x").tolist() == [[1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (8, 0, (9,), (1,)),
        (2**40, 0, (9,), (1,)),  # a storage that is longer than its data
        (4, 0, (5,), (1,)),  # data that is longer than its storage
        (8, 1, (2, 4), (4, 1)),
        (8, -1, (2,), (1,)),
        (8, 0, (-2,), (1,)),
        (8, 7, (2,), (-1,)),
        (8, 0, (2, 2), (1,)),
        (8, 0, (2**40,), (0,)),
        (8, 0, (0, 2**70), (1, 1)),
        (8, 0, (2**32, 2**32, 0), (0, 0, 0)),
        (8, 0, (1,), (2**70,)),
        (8, 0, (1,) * 17, (1,) * 17),
    ],
)
def test_geometry_outside_the_storage_is_refused(tmp_path, numel, offset, shape, stride):
    _save_view(tmp_path / "a.pt", numel, offset, shape, stride)
    with pytest.raises(CheckpointError, match=r"tensor x of shape .* does not fit its storage"):
        open_checkpoint(tmp_path / "a.pt")


def test_pickle_cannot_name_modules_into_being(tmp_path, monkeypatch):
    (tmp_path / "infdit_never.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    read_pickle(b"cinfdit_never\nThing\n)R.")
    assert "infdit_never" not in sys.modules


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",  # nothing to memoize
        b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",  # BYTEARRAY8
        b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b"x.",  # BINUNICODE8
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # LONG4
        b"\x80\x02(((",
        b"\x80\x02.",
        b"e.",
        b"g9\n.",
        b"}(NNNu.",
        b"0" * 9,
        b"not a pickle",
        b"",
        b"N0" * (MAX_PICKLE_OPCODES // 2 + 1) + b".",
    ],
)
def test_malformed_pickle(data):
    with pytest.raises(ValueError, match="its pickle cannot be read"):
        read_pickle(data)


def test_declared_sizes_and_depth_cost_nothing():
    assert read_pickle(b"Nr\xff\xff\xff\x7f.") is None  # memo index of 2 billion
    deep = read_pickle(b")" + b"\x85" * 300_000 + b".")
    assert isinstance(deep, tuple)
    # A tuple that holds itself twice, sixty times over: hashing it as a key would never end.
    assert read_pickle(b"})" + b"2\x86" * 60 + b"Ns.") == {}
    assert read_pickle(b")" + b"2\x86" * 60 + b"2\x93.") is not None
