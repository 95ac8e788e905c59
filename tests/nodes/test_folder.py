"""A folder of pictures, one after another."""

import importlib
import json
import re
import time
import weakref
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nodes.photos import SIZES, folder_graph, put
from tools.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.comfy


@pytest.fixture
def run(comfy, load):
    """Run the node Inf-DiT Upscale Folder."""

    def run(folder="photos", output_folder="", format="png", bit_depth="8", **more):
        overwrite = more.pop("overwrite", False)
        return comfy.nodes["InfDiTUpscaleFolder"].execute(
            load("tiny")[0], folder, 2.0, 7, "draft", 0.5, output_folder, format, bit_depth,
            overwrite, **more,
        )  # fmt: skip

    return run


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


def test_the_files_are_what_the_upscale_node_makes(load, upscale, folders, run, bar):
    shown, told = run().ui["images"], [value for value, _, _ in bar]
    assert told == sorted(told)
    assert told[-1] == bar[-1][1] == sum(4 * width * height for width, height in SIZES.values())
    assert shown == [
        {"filename": f"{name}.png", "subfolder": "photos", "type": "output"} for name in "abc"
    ]
    for name, (width, height) in SIZES.items():
        source = pixels(folders[0] / "photos" / name)[None].float() / 255
        expected = upscale(load("tiny")[0], source, seed=7, preset="draft", denoise=0.5)
        found = pixels(folders[1] / "photos" / f"{name[0]}.png")
        assert found.shape == (2 * height, 2 * width, 3)
        assert (found - (255 * expected[0]).round()).abs().max() <= 1


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"size_by": "megapixels", "megapixels": 0.01}, ["a 112x93", "b 82x128", "c 102x102"]),
        (
            {"size_by": "width and height", "width": 40, "height": 30},
            ["a 36x30", "b 19x30", "c 30x30"],
        ),
    ],
)
def test_pictures_of_any_size_come_to_the_size_asked_for(folders, run, asked, sizes):
    run(**asked)
    results = sorted((folders[1] / "photos").iterdir())
    found = [(path.stem, *pixels(path).shape[1::-1]) for path in results]
    assert [f"{name} {width}x{height}" for name, width, height in found] == sizes


def test_the_text_and_the_preview_are_of_the_picture_at_work(
    comfy, folders, run, texts, bar, monkeypatch
):
    run()
    assert texts[0] == "picture 1 of 3 · a.png"
    assert re.fullmatch(r"3 pictures in \d+ s · multistep, 3 steps", texts[-1])
    assert next(preview[1].size for _, _, preview in bar if preview) == SIZES["a.png"]
    (folders[0] / "photos" / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 3 pictures"):
        run(overwrite=True)
    failed = r"1 of 3 pictures failed · 2 pictures in \d+ s · multistep, 3 steps"
    assert re.fullmatch(failed, texts[-1])

    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(
        comfy.module("nodes.infdit.folder"), "write_image", Mock(
            side_effect=management.InterruptProcessingException()
        ),
    )  # fmt: skip
    with pytest.raises(management.InterruptProcessingException):
        run(overwrite=True)
    assert texts[-1] == "cancelled at picture 1 of 2, a.png"


def test_a_result_is_written_as_a_pyramid_and_let_go_of(comfy, folders, run, monkeypatch):
    node = comfy.module("nodes.infdit.folder")
    upscale, results = node.upscale, []

    def watched(*args, **options):
        assert not any(result() is not None for result in results)
        picture = upscale(*args, **options)
        results.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(node, "upscale", watched)
    (folders[0] / "photos" / "b.jpg").unlink()
    assert run(format="tif pyramid", longest_edge=300).ui["images"] == []
    assert len(results) == 2
    for path in (folders[1] / "photos" / f"{name}.tif" for name in "ac"):
        with Image.open(path) as found:
            assert (max(found.size), found.n_frames) == (300, 2)


def test_a_picture_that_fails_is_named_and_the_others_are_made(folders, run):
    (folders[0] / "photos" / "b.jpg").write_bytes(b"no picture")
    message = r"Folder: 1 of 3 pictures .* b.jpg. The first: input/photos/b.jpg cannot be read"
    with pytest.raises(ValueError, match=message):
        run(output_folder="x/v1.5")
    assert sorted(p.name for p in (folders[1] / "x" / "v1.5").iterdir()) == ["a.png", "c.png"]


@pytest.mark.parametrize("broken", ["wide", "alpha", "vanished", "refused"])
def test_what_one_picture_cannot_be_is_no_other_s_fault(
    comfy, folders, run, monkeypatch, caplog, broken
):
    """Sides too long for the format are known before any work, the others before that picture's."""
    node, source = comfy.module("nodes.infdit.folder"), folders[0] / "photos" / "b.jpg"
    made, upscale, write = [], node.upscale, node.write_image
    source.unlink()
    source = source.with_suffix(".png")
    if broken == "alpha":
        Image.new("RGBA", (4, 4), (9, 9, 9, 9)).save(source)
    else:
        Image.new("RGB", (9000 if broken == "wide" else 4, 4)).save(source)

    def counted(image, *args, **options):
        if broken == "wide":
            assert "b.webp: expected sides of at most 16383 px" in caplog.text
        if broken == "vanished":
            source.unlink(missing_ok=True)
        made.append(tuple(image.shape[1:3]))
        return upscale(image, *args, **options)

    def refused(path, *args, **options):
        if broken == "refused" and path.stem == "b":
            raise PermissionError(13, "Permission denied", str(path))
        write(path, *args, **options)

    monkeypatch.setattr(node, "upscale", counted)
    monkeypatch.setattr(node, "write_image", refused)
    format = "jpg" if broken == "alpha" else "webp"
    with pytest.raises(ValueError, match="1 of 3 pictures") as raised:
        run(format=format)
    said = {
        "wide": "input/photos/b.png: b.webp: expected sides of at most 16383 px",
        "alpha": "input/photos/b.png: b.jpg: JPEG has no alpha",
        "vanished": "input/photos/b.png does not exist",
        "refused": "input/photos/b.png: output/photos/b.webp: Permission denied",
    }
    assert f"b.png. The first: {said[broken]}" in str(raised.value)
    assert len(made) == 2 + (broken == "refused")
    assert sorted(p.stem for p in (folders[1] / "photos").iterdir()) == ["a", "c"]


def test_folders_within_and_names_that_differ_in_their_endings(comfy, folders, run, caplog):
    node, photos = comfy.nodes["InfDiTUpscaleFolder"], folders[0] / "photos"
    put(photos / "x", {"a.png": (4, 5)})
    put(photos, {"a.tif": (4, 4)})
    (photos / "notes.txt").write_text("no picture")
    before = node.fingerprint_inputs("photos"), node.fingerprint_inputs("photos", recursive=True)
    shown = run(recursive=True).ui["images"]
    assert [(image["subfolder"], image["filename"]) for image in shown] == [
        ("photos", "a.png.png"), ("photos", "a.tif.png"), ("photos", "b.png"), ("photos", "c.png"),
        ("photos/x", "a.png"),
    ]  # fmt: skip
    assert pixels(folders[1] / "photos" / "x" / "a.png").shape == (10, 8, 3)
    assert "input/photos: 1 file is no picture that can be read (notes.txt)" in caplog.text
    assert "sub-folder" not in caplog.text
    after = node.fingerprint_inputs("photos", overwrite=True)
    within = node.fingerprint_inputs("photos", overwrite=True, recursive=True)
    assert len({*before, after, within}) == 4
    put(photos / "x", {"b.png": (4, 4)})
    assert node.fingerprint_inputs("photos", overwrite=True) == after
    assert node.fingerprint_inputs("photos", overwrite=True, recursive=True) != within
    assert run().ui == {"images": []}
    assert "1 sub-folder is left out; recursive takes it" in caplog.text


def test_what_is_there_is_left_alone(comfy, folders, run):
    target = folders[1] / "photos" / "a.tif"
    target.parent.mkdir()
    target.write_text("mine")
    node = comfy.nodes["InfDiTUpscaleFolder"]
    before = node.fingerprint_inputs("photos")
    run(format="tif", bit_depth="16")
    assert target.read_text() == "mine"
    assert (folders[1] / "photos" / "b.tif").exists()
    after = node.fingerprint_inputs("photos")
    assert after != before
    assert run(format="tif").ui == {"images": []}
    run(format="tif", overwrite=True)
    assert pixels(target).shape == (20, 24, 3)
    (folders[0] / "photos" / "b.jpg").unlink()
    assert node.fingerprint_inputs("photos", overwrite=True) != after


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"folder": "no"}, "expected a folder in ComfyUI's input folder; 'no' is not there"),
        ({"folder": "../output"}, "expected a folder in ComfyUI's input folder; got '../output'"),
        ({"output_folder": "../x"}, "expected a folder in ComfyUI's output folder; got '../x'"),
        ({"output_folder": "/tmp"}, "expected a folder in ComfyUI's output folder; got '/tmp'"),
        ({"format": "jpg", "bit_depth": "16"}, r"result.jpg: expected .png or .tif for 16 bits"),
        ({"folder": "empty"}, "input/empty holds no picture"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(comfy, folders, run, inputs, message):
    (folders[0] / "empty").mkdir()
    with pytest.raises(ValueError, match=f"Inf-DiT Upscale Folder: {message}"):
        run(**inputs)
    assert not [p for p in folders[1].rglob("*") if p.is_file()]


def test_after_a_cancel_it_goes_on_and_the_workflow_is_in_the_files(comfy_server: ComfyServer):
    put(comfy_server.input_dir / "many", {f"{n}.png": (64, 48) for n in range(4)})
    graph = folder_graph("many", "png")
    first, last = (comfy_server.output_dir / "many" / f"{n}.png" for n in (0, 3))
    queued = comfy_server.queue(graph)
    for _ in range(600):
        if first.exists():
            break
        time.sleep(0.1)
    comfy_server.interrupt()
    with pytest.raises(ComfyError):
        comfy_server.wait(queued, 60)
    assert not last.exists()
    made = first.stat().st_mtime_ns
    outputs = comfy_server.submit(graph, timeout=120)
    assert first.stat().st_mtime_ns == made
    assert 1 <= len(comfy_server.output_files(outputs)) <= 3
    with Image.open(last) as picture:
        assert picture.size == (256, 192)
        assert json.loads(picture.text["prompt"])["folder"]["inputs"]["folder"] == "many"
