"""Collecting photographs: what is kept, at which size."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from training.photos import FLAT, HIDDEN, LEVEL, hidden, save, wheel_pictures


def hatching(size: int, period: int, levels: int) -> np.ndarray:
    stripes = np.arange(size) // (period // 2) % 2 * levels + 100
    return np.broadcast_to(stripes[None, :, None], (size, size, 3)).astype(np.uint8)


def test_a_pattern_too_fine_for_a_quarter_of_the_size_is_found():
    assert hidden(hatching(64, 2, 60)) == pytest.approx(30 * LEVEL, rel=0.05)
    assert hidden(hatching(64, 2, 10)) < HIDDEN


def test_what_a_quarter_of_the_size_shows_is_no_hidden_pattern():
    assert hidden(hatching(64, 32, 60)) < HIDDEN
    noise = np.random.default_rng(0).integers(256, size=(66, 70, 3), dtype=np.uint8)
    assert hidden(noise) < HIDDEN, f"no place is flat: {FLAT}"


def test_pictures_are_reduced_and_patterns_and_small_ones_left_out(tmp_path):
    even = Image.new("RGB", (600, 500), (10, 20, 30))
    save(tmp_path / "even.npy", even, 2.0)
    assert np.load(tmp_path / "even.npy").shape == (250, 300, 3)
    # enlarged, so that reducing it gives the stripes back
    striped = Image.fromarray(hatching(200, 4, 100)).resize((400, 400), Image.Resampling.NEAREST)
    save(tmp_path / "striped.npy", striped, 2.0)
    save(tmp_path / "small.npy", even, 3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["even.npy"]


def test_pictures_of_a_wheel(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.write(tmp_path / "a.png", "package/media/a.png")
        wheel.writestr("package/media/b.mp4", b"")
    found = [(name, picture.size) for name, picture in wheel_pictures(tmp_path / "w.whl")]
    assert found == [("templates-a", (20, 10))]
