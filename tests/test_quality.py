"""The quality benchmark measures what it says, on pictures made for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("piq")
pytest.importorskip("kornia")

from benchmarks import quality, quality_grid
from benchmarks.common_metrics import (
    LOWER_IS_BETTER,
    against_input,
    against_original,
    bars,
    borders,
    passed,
)
from benchmarks.common_peers import read_peers
from benchmarks.common_photos import bicubic, degrade
from benchmarks.common_tfjs import LayersModel

BLOCK_PX, PATCH_PX = 32, 4


def test_benchmarks_import_their_library_and_not_each_other():
    for path in Path(quality.__file__).parent.glob("*.py"):
        imported = re.findall(r"^from \.(\w*) import (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert all((module or name).startswith("common") for module, name in imported), path.name


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    """(1, 3, 192, 192): smoothed noise, which has detail of every size."""
    noise = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    return 0.3 * noise + 0.7 * soft


def with_steps(picture: torch.Tensor, period_px: int) -> torch.Tensor:
    """A checkerboard of cells, a little lighter and darker."""
    index = torch.arange(picture.shape[-1]) // period_px
    sign = 1 - 2 * ((index[:, None] + index) % 2)
    return (picture + 0.05 * sign).clamp(0, 1)


def test_every_metric_prefers_the_original_to_bicubic(original):
    enlarged = bicubic(degrade(original, "bicubic", "any"))
    same, blurred = against_original(original, original), against_original(enlarged, original)
    for name, value in same.items():
        assert value < blurred[name] if name in LOWER_IS_BETTER else value > blurred[name], name


def test_seams_are_found_where_they_are(original):
    clean = borders(original, BLOCK_PX, PATCH_PX)
    assert list(clean.values()) == pytest.approx([1, 1, 1], abs=0.1)
    blocks = borders(with_steps(original, BLOCK_PX), BLOCK_PX, PATCH_PX)
    assert min(blocks["block_borders"], blocks["block_lines"]) > 1.5
    patches = borders(with_steps(original, PATCH_PX), BLOCK_PX, PATCH_PX)
    assert patches["patch_borders"] > 1.5
    assert patches["block_borders"] == pytest.approx(1, abs=0.15)  # no seam between blocks


def test_input_is_matched_and_colour_measured(original):
    lr = degrade(original, "bicubic", "any")
    assert against_input(original, lr)["consistency_db"] > 50
    shifted = original.clone()
    shifted[:, 1] += 2 / 255
    found = against_input(shifted, lr)
    assert found["colour_shift"] == pytest.approx(2, abs=0.1)
    # one channel of three off by 2 levels
    assert found["consistency_db"] == pytest.approx(10 * np.log10(3 * (255 / 2) ** 2), abs=0.5)


def test_real_degradation_follows_from_the_name(original):
    first, again, other = (degrade(original, "realesrgan", name) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bars_fail_one_by_one():
    bicubic_means = {"gmsd": 0.1, "haarpsi": 0.8, "vifp": 0.4, "fsim": 0.8}
    good = {"gmsd": 0.09, "haarpsi": 0.81, "vifp": 0.41, "fsim": 0.81}
    good |= {"consistency_db": 40.0, "block_seam": -0.01, "colour_shift": 0.5}
    assert passed(bars(good, bicubic_means, "bicubic"))
    assert passed(bars(good | {"vifp": 0.3}, bicubic_means, "bicubic"))  # FSIM is enough
    for change in (
        {"gmsd": 0.11},
        {"haarpsi": 0.7},
        {"vifp": 0.3, "fsim": 0.7},
        {"consistency_db": 31.0},
        {"block_seam": -0.04},
        {"colour_shift": 1.1},
    ):
        assert not passed(bars(good | change, bicubic_means, "bicubic")), change
    assert passed(bars(good | {"consistency_db": 20.0}, bicubic_means, "realesrgan"))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "test").mkdir()
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        picture = generator.integers(0, 256, (182, 200, 3), dtype=np.uint8)
        np.save(tmp_path / "test" / f"{name}.npy", picture)
    return tmp_path


def test_command_keeps_finished_pictures(photos, capsys, monkeypatch):
    out = photos / "out" / "quality.json"
    command = ["--photos", str(photos), "--crop", "180", "--solver", "euler", "--steps", "1"]
    command += ["--degradation", "bicubic", "--out", str(out)]
    quality.main(command)
    result = json.loads(out.read_text())
    assert [row["photo"] for row in result["rows"]] == ["one", "two"]
    assert {tuple(row["size"]) for row in result["rows"]} == {(180, 180)}
    assert result["environment"]["commit"]
    assert result["summary"]["bicubic"]["photos"] == 2
    assert "limit" in capsys.readouterr().out

    def marked() -> list[bool]:
        rows = json.loads(out.read_text())["rows"]
        return [row["methods"]["ours"]["seconds"] == -1.0 for row in rows]

    result["rows"][0]["methods"]["ours"]["seconds"] = -1.0  # a mark that a second run leaves
    out.write_text(json.dumps(result | {"rows": result["rows"][:1]}))
    quality.main(command)
    assert marked() == [True, False]

    peers = {"peer": lambda lr: bicubic(lr) / 2}
    monkeypatch.setattr(quality, "read_peers", lambda *_: peers)
    quality.main(command)  # another method joins them
    assert marked() == [True, False]
    means = json.loads(out.read_text())["summary"]["bicubic"]["means"]
    assert means["peer"]["psnr"] < means["bicubic"]["psnr"]

    quality.main([*command, "--seed", "1"])  # other settings start afresh
    assert marked() == [False, False]


def layer(kind: str, name: str, *sources: str, **config: object) -> dict:
    nodes = [[[source, 0, 0, {}] for source in sources]] if sources else []
    return {
        "class_name": kind,
        "name": name,
        "config": {"name": name} | config,
        "inbound_nodes": nodes,
    }


def test_tensorflow_network_is_read_by_value():
    """Kernels, the order of concatenated channels and of those that become pixels."""
    convolution = {"strides": [1, 1], "padding": "same", "dilation_rate": [1, 1], "groups": 1}
    layers = [
        layer("InputLayer", "in"),
        layer("Activation", "relu", "in", activation="relu"),
        layer("Concatenate", "cat", "relu", "in", axis=3),
        layer("Conv2D", "conv/1", "cat", activation="linear", **convolution),
        layer("MultiplyBeta", "half", "conv/1", beta=0.5),
        layer("Add", "sum", "half", "conv/1"),
        layer("PixelShuffle4x", "out", "sum", scale=2),
    ]
    weights = [
        {"name": "conv/1/kernel", "shape": [1, 3, 2, 8], "dtype": "float32"},
        {"name": "conv/1/bias", "shape": [8], "dtype": "float32"},
    ]
    kernel = np.zeros((1, 3, 2, 8), "<f4")  # height, width, in, out
    kernel[0, 2, 1] = np.arange(8) + 1  # of what is right of a pixel, in the channel of `in`
    bias = np.full(8, 10, "<f4")
    config = {"layers": layers, "output_layers": [["out", 0, 0]]}
    description = {
        "modelTopology": {"model_config": {"config": config}},
        "weightsManifest": [{"paths": ["a", "b"], "weights": weights}],
    }
    model = LayersModel(description, kernel.tobytes() + bias.tobytes())
    result = model(torch.tensor([[[[5.0, -2.0]]]]))[0]
    n = torch.tensor([[[1, 3], [5, 7]], [[2, 4], [6, 8]]])  # 1 + 4 dy + 2 dx + colour
    expected = torch.full((2, 2, 4), 15.0)
    expected[:, :, :2] = 1.5 * (10 - 2 * n)
    assert torch.equal(result, expected)


def test_peers_are_found_by_their_packages(tmp_path):
    cpu = torch.device("cpu")
    assert read_peers(None, cpu) == {}
    with pytest.raises(SystemExit, match="esrgan-thick"):
        read_peers(tmp_path, cpu)


def test_no_photographs_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="expected photographs"):
        quality.main(["--photos", str(tmp_path)])


def test_grid_shows_every_crop(monkeypatch, tmp_path):
    monkeypatch.setattr(quality_grid, "CENTRES_PX", {"a": (128, 128), "b": (130, 140)})
    photos = {name: np.full((300, 300, 3), 90, dtype=np.uint8) for name in "ab"}
    quality_grid.draw(photos, {"bicubic": bicubic, "peer": bicubic}, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (584, 410)
        assert grid.getpixel((500, 300)) == (90, 90, 90)
