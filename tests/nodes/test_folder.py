"""A folder of pictures, one after another."""

import importlib
import json
import re
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from tools.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.comfy

SIZES = {"a.png": (12, 10), "b.jpg": (9, 14), "c.webp": (16, 16)}


def put(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """ComfyUI's input and output folder, with pictures in input/photos."""
    folder_paths = importlib.import_module("folder_paths")
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    put(tmp_path / "input" / "photos", SIZES)
    return tmp_path / "input", tmp_path / "output"


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
    assert texts[-1] == "cancelled at picture 1 of 3, a.png"


def test_a_picture_that_fails_is_named_and_the_others_are_made(folders, run):
    (folders[0] / "photos" / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"Upscale Folder: 1 of 3 pictures .* b.jpg. The first: b"):
        run(output_folder="x/v1.5")
    assert sorted(p.name for p in (folders[1] / "x" / "v1.5").iterdir()) == ["a.png", "c.png"]


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
        ({"folder": "twice"}, "2 pictures would be written to output/twice/a.png; rename them"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(comfy, folders, run, inputs, message):
    (folders[0] / "empty").mkdir()
    put(folders[0] / "twice", {"a.png": (4, 4), "a.jpg": (4, 4)})
    with pytest.raises(ValueError, match=f"Inf-DiT Upscale Folder: {message}"):
        run(**inputs)
    assert not [p for p in folders[1].rglob("*") if p.is_file()]


def test_after_a_cancel_it_goes_on_and_the_workflow_is_in_the_files(comfy_server: ComfyServer):
    put(comfy_server.input_dir / "many", {f"{n}.png": (64, 48) for n in range(4)})
    graph = {
        "load": {
            "class_type": "InfDiTCheckpointLoader",
            "inputs": {"model_name": "infdit_small.safetensors", "weight_dtype": "default"},
        },
        "folder": {
            "class_type": "InfDiTUpscaleFolder",
            "inputs": {
                "model": ["load", 0], "folder": "many", "upscale_by": 4.0, "seed": 0,
                "preset": "draft", "denoise": 1.0, "output_folder": "", "format": "png",
                "bit_depth": "8", "overwrite": False,
            },
        },
    }  # fmt: skip
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
