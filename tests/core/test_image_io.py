"""Picture files: every pixel format that users have, exactly."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from infdit_core.pictures import png16
from infdit_core.pictures.files import (
    ImageError,
    ImageInfo,
    check_writable,
    read_image,
    write_image,
)

RNG = np.random.default_rng(0)


def random_pixels(channels: int, dtype=np.uint8, height: int = 13, width: int = 17) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def test_8_bit_modes(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        pixels = random_pixels(channels)
        Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(tmp_path / "a.png")
        image, info = read_image(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode == mode
        assert image.dtype == torch.float32
        assert np.array_equal(image[0].numpy(), pixels.astype(np.float32) / 255)
        assert info == ImageInfo(bit_depth=8, icc_profile=None)


def test_grey_with_alpha_becomes_rgba(tmp_path):
    pixels = random_pixels(2)
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    image, _ = read_image(tmp_path / "a.png")
    assert np.array_equal(image[0].numpy() * 255, pixels[..., [0, 0, 0, 1]])


def test_palette(tmp_path):
    palette = [10, 20, 30, 200, 100, 50, 0, 255, 0]
    indices = RNG.integers(0, 3, (8, 9), dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(palette)
    colours = np.array(palette, np.uint8).reshape(3, 3)
    picture.save(tmp_path / "opaque.png")
    opaque, _ = read_image(tmp_path / "opaque.png")
    assert np.array_equal((opaque[0] * 255).round().numpy(), colours[indices])
    picture.save(tmp_path / "clear.png", transparency=bytes([255, 0, 128]))
    clear, _ = read_image(tmp_path / "clear.png")
    assert np.array_equal((clear[0, ..., :3] * 255).round().numpy(), colours[indices])
    assert np.array_equal(
        (clear[0, ..., 3] * 255).round().numpy(), np.array([255, 0, 128])[indices]
    )


def test_bilevel_and_cmyk(tmp_path):
    Image.fromarray(random_pixels(1)[..., 0] > 127).save(tmp_path / "bits.png")
    bits, _ = read_image(tmp_path / "bits.png")
    assert bits.shape == (1, 13, 17, 1)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    Image.new("CMYK", (4, 5), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    ink, _ = read_image(tmp_path / "ink.tif")
    assert ink.shape == (1, 5, 4, 3)
    assert ink[0, 0, 0].tolist() == [1, 0, 0]


def filtered_png(pixels: np.ndarray, filters: np.ndarray) -> bytes:
    """Encode 16-bit pixels with the given filter for each row, straight from the specification."""
    height, width, channels = pixels.shape
    step = 2 * channels
    rows = pixels.astype(">u2").tobytes()
    stride = width * step
    previous, out = bytes(stride), bytearray()
    for y in range(height):
        row = rows[y * stride : (y + 1) * stride]
        out.append(filters[y])
        for i, value in enumerate(row):
            a = row[i - step] if i >= step else 0
            b, c = previous[i], previous[i - step] if i >= step else 0
            p = a + b - c
            paeth = min((a, b, c), key=lambda candidate: abs(p - candidate))
            out.append((value - (0, a, b, (a + b) // 2, paeth)[filters[y]]) % 256)
        previous = row

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    packed = zlib.compress(bytes(out))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", packed[:50])
        + chunk(b"IDAT", packed[50:])
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (40, 23), (23, 40)])
def test_16_bit_png_with_every_filter(channels, height, width):
    pixels = random_pixels(channels, np.uint16, height, width) >> RNG.integers(0, 9)
    encoded = filtered_png(pixels, RNG.integers(0, 5, height))
    found = png16.read(io.BytesIO(encoded))
    assert np.array_equal(found, pixels)
    if channels != 2:  # Pillow agrees on the eight bits that it keeps
        by_pillow = np.array(Image.open(io.BytesIO(encoded))).reshape(pixels.shape)
        assert np.array_equal(by_pillow, pixels if channels == 1 else pixels >> 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_read_in_full_precision(tmp_path, channels):
    pixels = random_pixels(channels, np.uint16)
    (tmp_path / "a.png").write_bytes(filtered_png(pixels, RNG.integers(0, 5, len(pixels))))
    image, info = read_image(tmp_path / "a.png")
    expected = pixels[..., [0, 0, 0, 1]] if channels == 2 else pixels
    assert info.bit_depth == 16
    assert np.array_equal((image[0].numpy().astype(np.float64) * 65535).round(), expected)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_png_round_trip(tmp_path, channels):
    pixels = random_pixels(channels, np.uint16)
    image = torch.from_numpy(pixels.astype(np.float32) / 65535)[None]
    write_image(tmp_path / "a.png", image, bit_depth=16)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], image)
    by_pillow = np.array(Image.open(tmp_path / "a.png"))
    assert np.array_equal(by_pillow, pixels >> 8)


def test_16_bit_grey_tiff(tmp_path):
    pixels = random_pixels(1, np.uint16)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.tif")
    image, info = read_image(tmp_path / "a.tif")
    assert info.bit_depth == 16
    assert np.array_equal((image[0] * 65535).round().numpy(), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(random_pixels(3, height=16, width=24)).save(path, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal((read_image(path)[0][0] * 255).round().numpy(), expected)
    assert expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_colour_profile_is_kept(tmp_path, bit_depth):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(random_pixels(3)).save(tmp_path / "in.png", icc_profile=profile)
    image, info = read_image(tmp_path / "in.png")
    assert info.icc_profile == profile
    write_image(tmp_path / "out.png", image, bit_depth=bit_depth, info=info)
    assert read_image(tmp_path / "out.png")[1] == ImageInfo(bit_depth, profile)


def test_a_profile_for_grey_does_not_fit_the_result(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"GRAY"
    Image.fromarray(random_pixels(1)[..., 0]).save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert read_image(tmp_path / "a.png")[1].icc_profile is None


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
    ],
)
def test_what_cannot_be_written(tmp_path, name, options, message):
    with pytest.raises(ImageError, match=message):
        check_writable(tmp_path / name, **{"alpha": False, "bit_depth": 8, **options})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"old")
    with pytest.raises(ImageError, match=r"at most 16383 px for WEBP; use \.png"):
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


@pytest.mark.parametrize("channels", [1, 3])
def test_damaged_files(tmp_path, channels):
    path = tmp_path / "a.png"
    whole = filtered_png(random_pixels(channels, np.uint16), np.zeros(13, int))
    for broken in (
        *(whole[:n] for n in range(10, len(whole) - 12, 37)),
        whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
    ):
        path.write_bytes(broken)
        with pytest.raises(ImageError, match=r"a\.png cannot be read as a picture: "):
            read_image(path)


def test_deep_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="32 bits per channel; expected 8 or 16"):
        read_image(tmp_path / "a.tif")


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match="need Pillow: pip install pillow"):
        read_image(tmp_path / "a.png")
