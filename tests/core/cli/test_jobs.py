"""Which pictures are made, and under which names."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from infdit_core.cli import jobs as jobs_module
from infdit_core.cli.jobs import CommandError, Jobs, check_jobs, check_result, plan_jobs
from infdit_core.pictures.files import ImageError, ImageInfo
from infdit_core.pictures.prepare import target_size


@pytest.fixture
def put(tmp_path):
    """Put small pictures, or files of another kind, below the folder of the test."""

    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            if path.suffix not in (".txt", ".mov"):
                Image.new("RGB", (4, 3)).save(path, format="PNG")

    return put


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plan for inputs below the folder of the test: jobs and the lines that were told."""
    monkeypatch.chdir(tmp_path)

    def plan(*inputs: str, output: str = "out", suffix: str = "png", **options) -> Jobs:
        told: list[str] = []
        options = {"overwrite": False, **options}
        jobs = plan_jobs([*map(Path, inputs)], Path(output), suffix, tell=told.append, **options)
        jobs.told = told  # type: ignore[attr-defined]
        return jobs

    return plan


def pairs(jobs: Jobs) -> dict[str, str]:
    return {source.as_posix(): target.as_posix() for source, target in jobs.todo}


def test_a_folder_says_what_it_leaves_out(put, plan):
    put("in/a.jfif", "in/b.JPE", "in/c.apng", "in/.d.png", "in/e.txt", "in/f.mov", "in/x/g.png")
    jobs = plan("in")
    assert pairs(jobs) == {
        "in/a.jfif": "out/a.png", "in/b.JPE": "out/b.png", "in/c.apng": "out/c.png",
    }  # fmt: skip
    assert jobs.told == [
        "in: 2 files are no pictures that can be read (e.txt, f.mov), 1 sub-folder is left out;"
        " --recursive takes it"
    ]
    put("in/y/.z/a.png", "in/1.txt", "in/2.txt")
    assert plan("in").told == [
        "in: 4 files are no pictures that can be read (1.txt, 2.txt, e.txt, ...), 2 sub-folders are"
        " left out; --recursive takes them"
    ]


def test_sub_folders_keep_their_places(put, plan, tmp_path):
    put("in/a.png", "in/x/a.png", "in/x/y/b.jpg", "in/.git/c.png", "in/out/d.png", "more/e.png")
    (tmp_path / "in" / "x" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "x")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "more")
    jobs = plan("in", output="in/out", recursive=True)
    assert pairs(jobs) == {
        "in/a.png": "in/out/a.png",
        "in/linked/e.png": "in/out/linked/e.png",
        "in/x/a.png": "in/out/x/a.png",
        "in/x/y/b.jpg": "in/out/x/y/b.png",
    }
    assert jobs.told == []
    assert pairs(plan("in", output="in/out")) == {"in/a.png": "in/out/a.png"}


def test_a_picture_is_made_once(put, plan):
    put("in/a.png", "in/b.png")
    jobs = plan("in/b.png", "in", "in/../in/a.png", "in")
    assert pairs(jobs) == {"in/b.png": "out/b.png", "in/a.png": "out/a.png"}


def test_pictures_that_differ_in_their_endings_keep_them(put, plan, tmp_path):
    put("in/anim.gif", "out/anim.png")  # of a run before the other came
    assert [path.name for path in plan("in").finished] == ["anim.png"]
    put("in/anim.webp", "in/Anim.tif", "in/b.png", "in/anim.gif.bmp")
    jobs = plan("in")
    assert pairs(jobs) == {
        "in/Anim.tif": "out/Anim.tif.png",
        "in/anim.gif": "out/anim.gif.png",
        "in/anim.gif.bmp": "out/anim.gif.bmp.png",
        "in/anim.webp": "out/anim.webp.png",
        "in/b.png": "out/b.png",
    }
    assert jobs.told == [
        "names that differ in their endings only keep these in the results: Anim.tif.png,"
        " anim.gif.png, anim.gif.bmp.png, ..."
    ]
    put("out/anim.webp.png")
    assert [path.name for path in plan("in").finished] == ["anim.webp.png"]


def test_results_that_would_be_one_file_fail(put, plan, monkeypatch):
    put("in/a.png", "more/a.png", "in/b.png")
    jobs = plan("in", "more")
    assert pairs(jobs) == {"in/b.png": "out/b.png"}
    assert jobs.summary() == "2 of 3 pictures could not be upscaled: a.png, a.png"
    assert jobs.failed[Path("more/a.png")] == (
        "more/a.png: another picture's result would be out/a.png.png too; expected another name, or"
        " another --output for each of their folders"
    )
    put("in/B.png")
    if len(list(Path("in").iterdir())) == 3:
        assert pairs(plan("in"))["in/B.png"] == "out/B.png.png"
        monkeypatch.setattr(jobs_module, "_ignores_case", lambda folder: True)
        assert set(plan("in").failed) == {Path("in/B.png"), Path("in/b.png")}


@pytest.mark.parametrize("name", ["x" * 251, "é" * 125 + "x"])
def test_a_name_too_long_for_its_result_fails_alone(put, plan, name):
    """The source's name is as long as it may be; the result's is a byte longer."""
    put(f"in/{name}.png", "in/short.png")
    assert len(os.fsencode(f"{name}.png")) == 255
    assert len(plan("in").todo) == 2
    jobs = plan("in", suffix="webp")
    assert pairs(jobs) == {"in/short.png": "out/short.webp"}
    assert jobs.failed[Path(f"in/{name}.png")] == (
        f"in/{name}.png: the name of the result, {name}.webp, is too long for out; expected a"
        " shorter name of the picture"
    )
    with pytest.raises(CommandError, match="is too long for out; expected a shorter name"):
        plan(f"in/{name}.png", suffix="webp")
    assert plan("y" * 300, "in").failed == {Path("y" * 300): f"{'y' * 300}: File name too long"}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_what_is_missing_or_in_the_way_fails_alone(put, plan, tmp_path):
    put("in/a.png", "in/b.png", "in/c.png", "out/c.png/x.txt")
    (tmp_path / "in" / "lost.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    jobs = plan("in", "no.png", "empty", "pipe.png", overwrite=True)
    assert list(pairs(jobs)) == ["in/a.png", "in/b.png"]
    reasons = [reason.split(";")[0] for reason in jobs.failed.values()]
    assert reasons == [
        "empty holds no picture",
        "in/c.png: out/c.png is a folder",
        "in/lost.png does not exist",
        "no.png does not exist",
        "pipe.png is no file",
    ]
    assert jobs.total == 7
    jobs = plan("in/a.png", "in/b.png", output="in", overwrite=True)
    assert list(jobs.failed.values()) == [
        f"in/{n}.png is an input; expected another --output" for n in "ab"
    ]


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["no.png"], "out", "no.png does not exist; expected a picture or a folder"),
        (["empty"], "out", "empty holds no picture; expected .*"),
        (["in", "in/a.png"], "out.png", "out.png is one file; expected a folder for several .*"),
        (["in"], "in/../in", "in/../in is the folder that is read; expected another --output"),
    ],
)
def test_what_leaves_nothing_to_do_is_the_end(put, plan, tmp_path, inputs, output, message):
    put("in/a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match=f"^{message}$"):
        plan(*inputs, output=output)


def denied(path: Path) -> OSError:
    return PermissionError(errno.EACCES, "Permission denied", str(path))


def test_what_may_not_be_read_fails_alone(put, plan, monkeypatch):
    put("in/a.png", "in/b.png", "in/secret/c.png")
    stat, iterdir = Path.stat, Path.iterdir

    def guarded(original, name):
        def call(path, **options):
            if path.name == name:
                raise denied(path)
            return original(path, **options)

        return call

    monkeypatch.setattr(Path, "stat", guarded(stat, "b.png"))
    monkeypatch.setattr(Path, "iterdir", guarded(iterdir, "secret"))
    jobs = plan("in", recursive=True)
    assert pairs(jobs) == {"in/a.png": "out/a.png"}
    assert jobs.failed == {
        Path("in/secret"): "in/secret: Permission denied",
        Path("in/b.png"): "in/b.png: Permission denied",
    }
    with pytest.raises(CommandError, match=r"^in/secret: Permission denied$"):
        plan("in/secret")


def test_heads_and_folders_are_checked_before_the_work(put, plan, tmp_path, monkeypatch):
    put("in/a.png", "in/b.png", "in/gone.png", "in/x/c.png", "in/y/d.png", "in/broken.txt")
    os.rename("in/broken.txt", "in/broken.png")
    Image.new("RGB", (20000, 1)).save("in/wide.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 255)).save("in/b.png")
    put("out/x")
    opened = tempfile.TemporaryFile

    def refused(dir):
        if Path(dir).name == "y":
            raise denied(dir)
        return opened(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    jobs = plan("in", suffix="jpg", recursive=True)
    os.remove("in/gone.png")
    check_jobs(jobs, lambda size: target_size(size, 4), 8)
    # JPEG takes an alpha that is opaque, which no head tells.
    assert pairs(jobs) == {"in/a.png": "out/a.jpg", "in/b.png": "out/b.jpg"}
    reasons = {path.as_posix(): reason for path, reason in jobs.failed.items()}
    assert reasons.pop("in/broken.png").startswith("in/broken.png cannot be read as a picture")
    wide = reasons.pop("in/wide.png")
    assert wide.startswith("in/wide.png: wide.jpg: expected sides of at most 65535 px")
    assert reasons == {
        "in/gone.png": "in/gone.png does not exist; expected a picture",
        "in/x/c.png": "in/x/c.png: out/x cannot be made (File exists); expected a folder to write"
        " to",
        "in/y/d.png": "in/y/d.png: out/y cannot be written to (Permission denied); expected a"
        " folder to write to",
    }
    assert jobs.summary().startswith("5 of 7 pictures could not be upscaled: ")


def test_alpha_counts_where_it_is_not_opaque(tmp_path):
    image = torch.ones(1, 3, 4, 4)
    check_result(tmp_path / "a.jpg", image, (12, 16), 8, ImageInfo())
    image[0, 1, 1, 3] = 254 / 255
    with pytest.raises(ImageError, match="JPEG has no alpha"):
        check_result(tmp_path / "a.jpg", image, (12, 16), 8, ImageInfo())


def test_a_full_disk_and_a_closed_pipe_are_no_picture_s_failure():
    jobs = Jobs(print)
    for error in (OSError(errno.ENOSPC, "full"), BrokenPipeError(errno.EPIPE, "closed")):
        with pytest.raises((CommandError, BrokenPipeError)), jobs.attempt(Path("a.png")):
            raise error
    assert not jobs.failed
