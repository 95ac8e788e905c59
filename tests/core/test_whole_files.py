"""A file appears whole or not at all."""

import os
from pathlib import Path

import pytest

from infdit_core.whole_files import whole_file


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"the old file"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, error, where, old):
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)

    def fail(*_):
        assert any(name.endswith(".part") for name in os.listdir(tmp_path))
        raise error

    def write():
        with whole_file(target) as file:
            file.write(b"half")
            if where == "block":
                fail()

    if where != "block":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        write()
    assert os.listdir(tmp_path) == ([] if old is None else [target.name])
    assert old is None or target.read_bytes() == old


def test_the_longest_name_that_is_legal(tmp_path):
    target = tmp_path / ("é" * 125 + ".json")
    assert len(os.fsencode(target.name)) == 255
    with whole_file(target) as file:
        file.write(b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = {}
    for name in ("a.bin", "b.bin"):
        with whole_file(tmp_path / name) as file:
            left[name] = Path(file.name)
    for path in left.values():
        path.write_bytes(b"left")
    with whole_file(tmp_path / "a.bin"):
        pass
    assert not left["a.bin"].exists()
    assert left["b.bin"].exists()


def test_a_file_that_came_meanwhile_stays(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(FileExistsError), whole_file(target, overwrite=False):
        target.write_bytes(b"theirs")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"theirs"]
