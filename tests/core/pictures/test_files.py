"""Picture files as a user meets them: names, sizes, what cannot be read or written."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from infdit_core.pictures.files import (
    ImageError,
    check_writable,
    picture_size,
    read_image,
    write_image,
)

RNG = np.random.default_rng(0)


def random_pixels(channels: int, dtype=np.uint8, height: int = 13, width: int = 17) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_png_round_trip(tmp_path, channels):
    pixels = random_pixels(channels, np.uint16)
    image = torch.from_numpy(pixels.astype(np.float32) / 65535)[None]
    write_image(tmp_path / "a.png", image, bit_depth=16)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], image)
    by_pillow = np.array(Image.open(tmp_path / "a.png"))
    assert np.array_equal(by_pillow, pixels >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(random_pixels(3, height=16, width=24)).save(path, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal((read_image(path)[0][0] * 255).round().numpy(), expected)
    assert picture_size(path) == expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".tif", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_lossless_formats(tmp_path, suffix, channels):
    pixels = random_pixels(channels)
    write_image(tmp_path / f"a{suffix}", torch.from_numpy(pixels)[None] / 255)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]
    assert np.array_equal(np.array(Image.open(tmp_path / f"a{suffix}")), pixels)


def test_jpeg(tmp_path):
    write_image(tmp_path / "a.jpg", torch.full((1, 16, 16, 3), 0.5))
    assert abs(np.array(Image.open(tmp_path / "a.jpg")).astype(int) - 128).max() <= 1


def test_values_are_clipped_and_rounded(tmp_path):
    image = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 7.0]).reshape(1, 1, 4, 1)
    write_image(tmp_path / "a.png", image.expand(-1, -1, -1, 3))
    assert np.array(Image.open(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.xyz", {}, r"a\.xyz: expected a name that ends in \.png, .*\.jpeg"),
        ("a", {}, "expected a name that ends in"),
        ("a.jpg", {"alpha": True}, "JPEG has no alpha; expected .png"),
        ("a.webp", {"bit_depth": 16}, "expected .png or .tif for 16 bits"),
        ("a.png", {"bit_depth": 12}, "8 or 16 bits per channel, got 12"),
        ("missing/a.png", {}, "is not a folder"),
        ("a.jpg", {"size": (65536, 9)}, "at most 65535 px for JPEG, got 9×65536; use .png or .tif"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, options, message):
    with pytest.raises(ImageError, match=message):
        check_writable(tmp_path / name, **{"alpha": False, "bit_depth": 8, **options})


def test_an_alpha_that_is_opaque_is_not_written_into_jpeg(tmp_path):
    image = torch.full((1, 16, 16, 4), 0.5)
    image[..., 3] = 1 - 1e-7  # as interpolation leaves it
    write_image(tmp_path / "a.jpg", image)
    assert Image.open(tmp_path / "a.jpg").mode == "RGB"
    image[0, 0, 0, 3] = 0.9
    with pytest.raises(ImageError, match="JPEG has no alpha"):
        write_image(tmp_path / "a.jpg", image)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"old")
    with pytest.raises(ImageError, match=r"at most 16383 px for WEBP, got 16384×1; use \.png"):
        write_image(tmp_path / "a.webp", torch.zeros(1, 1, 16384, 3))
    with pytest.raises(ImageError, match=r"\(1, H, W, 3 or 4\), got \(2, 4, 4, 3\)"):
        write_image(tmp_path / "a.webp", torch.zeros(2, 4, 4, 3))
    assert (tmp_path / "a.webp").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(ImageError, match="does not exist; expected a picture"):
        read_image(tmp_path / "a.png")
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png cannot be read as a picture: "):
            read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path)
