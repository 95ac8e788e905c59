"""The farm without Ray: the same plan, worker and rounds, in this process."""

import sys
from argparse import Namespace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from infdit_core.__main__ import main
from infdit_core.cli.parser import build_parser
from infdit_core.farm import command, worker
from infdit_core.farm.cluster import Cluster
from infdit_core.farm.command import plan
from infdit_core.farm.places import Place
from infdit_core.farm.worker import AGAIN, FAILED, MADE, STOP, THERE, TOO_LARGE, Outcome, Worker
from tests.core.farm.small import FAST, put_picture, put_pictures

STORE = "memory://store"


class Here:
    """A cluster of this process alone."""

    share, largest = 10**12, 10**12
    shares: list[int]
    """Of every round."""

    def __init__(self, args: Namespace) -> None:
        args.gpus_per_actor = 0
        self.args = args
        Here.shares = []

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def outcomes(self, pairs, share):
        Here.shares.append(share)
        made = Worker(vars(self.args), self.args.source, self.args.target, share)
        return [made.work(*pair) for pair in pairs.items()]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(command, "Cluster", Here)
    monkeypatch.setattr(Here, "share", Here.share)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures of several kinds, some in a sub-folder, beside other files."""
    folder = tmp_path / "in"
    put_pictures(folder, 2)
    put_picture(folder / "sub" / "photo.jpg", 3)
    put_picture(folder / "sub" / "photo.webp", 4)
    put_picture(folder / ".hidden.png", 5)
    (folder / "notes.txt").write_text("none")
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    Image.open(folder / "000.png").save(folder / "turned.jpg", exif=exif)
    return folder


def farm(*args: object) -> int:
    return main(["farm", *FAST, *map(str, args)])


def parsed(*args: object) -> Namespace:
    args_ = build_parser().parse_args(["farm", *FAST, *map(str, args)])
    args_.gpus_per_actor = 0
    return args_


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored(url: str) -> dict[str, bytes]:
    store, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root + "/"): store.cat_file(path) for path in store.find(root)}


def test_results_are_the_command_line_s_to_the_bit(model, folder, tmp_path):
    options = ["--model", model, "--recursive", "--bit-depth", 16, "--seed", 5, "--scale", 3]
    expected = tmp_path / "expected"
    upscale = ["upscale", *FAST, "--device", "cpu", folder, "-o", expected, *options]
    assert main([*map(str, upscale)]) == 0
    expected = files(expected)
    assert "sub/photo.jpg.png" in expected
    assert farm(folder, tmp_path / "out", *options) == 0
    assert files(tmp_path / "out") == expected
    fsspec.filesystem("memory").put(str(folder), "/store/in", recursive=True)
    assert farm(f"{STORE}/in", f"{STORE}/out", *options) == 0
    assert stored(f"{STORE}/out") == expected
    assert farm(f"{STORE}/in", tmp_path / "mixed", *options) == 0
    assert files(tmp_path / "mixed") == expected
    assert farm(f"file://{folder}", f"{STORE}/mixed", *options) == 0
    assert stored(f"{STORE}/mixed") == expected


@pytest.mark.parametrize("url", [True, False])
def test_what_is_there_is_left_alone(model, tmp_path, url, capsys):
    put_pictures(tmp_path / "in", 3)
    target = f"{STORE}/out" if url else str(tmp_path / "out")
    store, root = fsspec.core.url_to_fs(target)
    store.makedirs(root, exist_ok=True)
    store.pipe_file(f"{root}/001.png", b"kept")
    assert farm(tmp_path / "in", target, "--model", model) == 0
    assert store.cat_file(f"{root}/001.png") == b"kept"
    assert sorted(path.rpartition("/")[2] for path in store.find(root)) == [
        "000.png",
        "001.png",
        "002.png",
    ]
    said = capsys.readouterr()
    assert "1 results are there already" in said.err
    assert "2 of 2 pictures made" in said.out
    # of another worker, after the plan was made
    args = parsed(tmp_path / "in", target, "--model", model)
    assert Worker(vars(args), args.source, args.target).work("001.png", "001.png").state == THERE
    assert farm(tmp_path / "in", target, "--model", model, "--overwrite") == 0
    assert store.cat_file(f"{root}/001.png") != b"kept"


class Shelf(MemoryFileSystem):
    """A file system that writes as it goes, and may break off."""

    protocol = "shelf"
    store: dict = {}  # noqa: RUF012 as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    breaks = ""

    def put_file(self, lpath, rpath, **_):
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[: len(data) // 2] if self.breaks == "put" else data)
        if self.breaks == "put":
            raise OSError("the connection is gone")

    def mv(self, path1, path2, **options):
        if self.breaks == "mv":
            raise OSError("the connection is gone")
        super().mv(path1, path2, **options)


@pytest.mark.parametrize("breaks", ["put", "mv"])
def test_a_result_is_whole_or_not_there(model, tmp_path, breaks, monkeypatch, capsys):
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    Shelf.store.clear()
    put_pictures(tmp_path / "in", 1)
    monkeypatch.setattr(Shelf, "breaks", breaks)
    assert farm(tmp_path / "in", "shelf://out", "--model", model) == 1
    assert Shelf.store == {}
    assert "the connection is gone" in capsys.readouterr().err
    monkeypatch.setattr(Shelf, "breaks", "")
    assert farm(tmp_path / "in", "shelf://out", "--model", model) == 0
    assert [*Shelf.store] == ["shelf://out/000.png"]
    Image.open(Shelf.store["shelf://out/000.png"]).load()


def test_failures_are_tried_again_and_named_at_the_end(model, tmp_path, capsys):
    put_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert farm(tmp_path / "in", tmp_path / "out", "--model", model, "--retries", 1) == 1
    assert len(Here.shares) == 2
    said = capsys.readouterr()
    assert f"error: {tmp_path / 'in' / '001.png'} cannot be read as a picture" in said.err
    assert said.err.endswith("infdit: error: 1 of 3 pictures could not be upscaled: 001.png\n"), (
        said.err
    )
    assert sorted(files(tmp_path / "out")) == ["000.png", "002.png"]


def test_a_picture_whose_workers_die_is_given_up(model, tmp_path):
    put_pictures(tmp_path, 1)
    args = parsed(tmp_path, tmp_path / "out", "--model", model, "--retries", 2)
    for times, state in [(3, MADE), (4, FAILED)]:
        made = Worker(
            vars(args), args.source, str(tmp_path / str(times)), begin=lambda _, n=times: n
        )
        outcome = made.work("000.png", "000.png")
        assert outcome.state == state
    assert outcome.reason == "the worker's process died 3 times in the work on it"


def test_a_fault_of_ours_shows_where(model, tmp_path, monkeypatch):
    put_pictures(tmp_path, 1)
    monkeypatch.setattr(worker, "read_picture", lambda *_: {}["no such key"])
    args = parsed(tmp_path, tmp_path / "out", "--model", model)
    outcome = Worker(vars(args), args.source, args.target).work("000.png", "000.png")
    assert outcome.state == AGAIN
    assert "Traceback" in outcome.reason
    assert "no such key" in outcome.reason


def test_what_would_fail_for_every_picture_ends_the_run(tmp_path, monkeypatch, capsys):
    put_pictures(tmp_path / "in", 3)
    assert farm(tmp_path / "in", tmp_path / "out", "--model", tmp_path / "none.safetensors") == 1
    assert "none.safetensors" in capsys.readouterr().err
    stop = Outcome("000.png", STOP, "the disk is full")
    monkeypatch.setattr(Here, "outcomes", lambda *_: iter([stop, None]))
    assert farm(tmp_path / "in", tmp_path / "out") == 1
    assert "error: the disk is full" in capsys.readouterr().err


def test_large_pictures_wait_for_larger_workers(model, tmp_path, monkeypatch, capsys):
    put_pictures(tmp_path / "in", 2)
    put_picture(tmp_path / "in" / "large.png", 7, size=(96, 128))
    monkeypatch.setattr(Here, "share", 615 * 10**6)
    assert farm(tmp_path / "in", tmp_path / "out", "--model", model) == 0
    assert Here.shares == [615 * 10**6, 1230 * 10**6]
    assert len(files(tmp_path / "out")) == 3
    monkeypatch.setattr(Here, "largest", 616 * 10**6)
    assert farm(tmp_path / "in", tmp_path / "out2", "--model", model) == 1
    assert Here.shares == [615 * 10**6]
    assert len(files(tmp_path / "out2")) == 2
    error = capsys.readouterr().err
    assert "large.png: needs at least 0.6 GB of RAM; the largest machine has 0.6 GB" in error


def test_an_order_that_was_asked_for_counts_as_it_is(model, tmp_path):
    put_picture(tmp_path / "large.png", 7, size=(96, 128))
    for schedule, state in [("auto", MADE), ("full", TOO_LARGE)]:
        args = parsed(tmp_path, tmp_path / "out", "--model", model, "--schedule", schedule)
        args.overwrite = True
        made = Worker(vars(args), args.source, args.target, memory_bytes=640e6)
        assert made.work("large.png", "large.png").state == state


@pytest.mark.parametrize(
    ("options", "share", "workers"),
    [
        ([], 8, 12),  # the second machine has the least RAM for each of its 8
        (["--cpus-per-actor", 4], 32, 3),
        (["--workers", 2], 32, 2),
        (["--gpus-per-actor", 1], 16, 6),
    ],
)
def test_workers_by_the_resources_of_the_machines(options, share, workers):
    """Of three machines; the last has no processor for us."""
    args = build_parser().parse_args(["farm", "in", "out", *map(str, options)])
    cluster = Cluster(args)
    nodes = [
        {"CPU": 4.0, "memory": 64e9, "GPU": 4.0},
        {"CPU": 8.0, "memory": 64e9, "GPU": 2.0},
        {"memory": 500e9},
    ]
    if "--gpus-per-actor" not in options:
        args.gpus_per_actor = 0
    cluster._choose(nodes)
    assert cluster.share == share * 10**9
    assert cluster.largest == 64e9
    assert cluster.workers(cluster.share) == workers
    assert cluster.workers(int(40e9)) == 2


def test_strips_reserve_their_gpus():
    args = build_parser().parse_args(["farm", "in", "out", "--gpus-per-actor", "4"])
    cluster = Cluster(args)
    cluster._choose([{"GPU": 8.0, "CPU": 64.0, "memory": 100e9}])
    assert cluster.workers(cluster.share) == 2
    with pytest.raises(command.CommandError, match="no machine of the farm has 4 GPUs"):
        cluster._choose([{"GPU": 2.0, "CPU": 64.0, "memory": 100e9}])


def test_without_ray_the_command_to_install_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Cluster", Cluster)
    monkeypatch.setitem(sys.modules, "ray", None)
    put_pictures(tmp_path, 1)
    assert farm(tmp_path, tmp_path / "out") == 1
    assert 'pip install "comfyui-infdit[farm]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none", "out", "none is no folder; expected a folder of pictures"),
        ("memory://nothing", "out", "memory://nothing holds no file"),
        ("nosuch://there", "out", "nosuch://there cannot be used"),
        ("in", "in", "is the folder that is read"),
        ("in", "in/000.png", "is one file; expected a folder"),
    ],
)
def test_user_errors(tmp_path, monkeypatch, capsys, source, target, message):
    put_pictures(tmp_path / "in", 2)
    monkeypatch.chdir(tmp_path)
    assert farm(source, target) == 1
    assert message in capsys.readouterr().err


def test_names_in_a_store_stay_in_the_folder():
    store = fsspec.filesystem("memory")
    names = ["a.png", "b.tif", "sub/c.png", "../up.png", ".h/d.png", "back\\slash.png", "e.txt"]
    for name in names:
        store.store["/store/in/" + name] = store.open("/x", "wb")
    found = Place(f"{STORE}/in").search(True)
    assert [path.as_posix() for path in found.pictures] == ["a.png", "b.tif", "sub/c.png"]
    assert sorted(path.as_posix() for path in found.others) == ["back\\slash.png", "e.txt"]
    flat = Place(f"{STORE}/in").search(False)
    assert [path.as_posix() for path in flat.pictures] == ["a.png", "b.tif"]
    assert flat.folders == [Path("sub")]


def test_names_that_differ_in_case_are_two_results_of_a_store(tmp_path):
    store = fsspec.filesystem("memory")
    for name in ["A.png", "a.png"]:
        store.pipe_file(f"/store/in/{name}", b"")
    args = parsed(f"{STORE}/in", f"{STORE}/out")
    jobs = plan(Place(args.source), Place(args.target), args)
    assert len({result for _, result in jobs.todo}) == 2
    assert not jobs.failed


def test_pixels_are_what_was_asked_for(model, tmp_path):
    put_picture(tmp_path / "in" / "wide.png", 1, size=(10, 20))
    assert farm(tmp_path / "in", tmp_path / "out", "--model", model, "--size", 60) == 0
    assert np.array(Image.open(tmp_path / "out" / "wide.png")).shape == (30, 60, 3)
