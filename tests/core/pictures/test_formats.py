"""Formats by Pillow: pixels by value, colours, and why a file is refused."""

import io
import os

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infdit_core.pictures.files import (
    READABLE,
    ImageError,
    has_alpha,
    read_image,
    write_image,
)
from tests.core.pictures.made import drawn, exif, ink_profile, upright

RNG = np.random.default_rng(0)
SAVED = {
    "bmp": {},
    "gif": {},
    "webp": {"lossless": True, "exact": True},
    "jpg": {"quality": 100, "subsampling": 0},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
    "heic": {"quality": -1, "chroma": "444"},
}
MODES = {
    "bmp": ["1", "L", "P", "RGB"],
    "gif": ["L", "P"],
    "webp": ["RGB", "RGBA"],
    "jpg": ["L", "RGB", "CMYK"],
    "avif": ["RGB", "RGBA"],
    "heic": ["RGB", "RGBA"],
}
LOSSLESS = ("bmp", "gif", "webp")
TURNED = ("webp", "jpg", "avif")
"""What Pillow writes with an orientation; HEIC is stored upright."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@st.composite
def pillow_files(draw) -> tuple[str, Image.Image, int, bool]:
    suffix = draw(st.sampled_from(list(SAVED)))
    mode = draw(st.sampled_from(MODES[suffix]))
    small = st.integers(1, 12) if suffix in LOSSLESS else st.just(16)
    width, height = draw(small), draw(small)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    # coarse, so that a lossy format keeps it
    cells = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 4)).astype(np.uint8)
    pixels = cells.repeat(8, 0).repeat(8, 1)[:height, :width]
    picture = Image.fromarray(pixels, "RGBA")
    if mode == "CMYK":
        picture = Image.fromarray(pixels, "CMYK")
    elif mode != "RGBA":
        picture = picture.convert("RGB").convert(mode)
    return suffix, picture, draw(st.integers(1, 8)), draw(st.booleans())


@drawn(200)
@given(pillow_files())
def test_any_mode_of_any_format_is_read_by_value(folder, file):
    suffix, picture, orientation, profile = file
    options = dict(SAVED[suffix])
    if suffix in TURNED:
        options["exif"] = exif(orientation)
    if profile and picture.mode in ("RGB", "RGBA") and suffix not in ("bmp", "gif"):
        options["icc_profile"] = imagecodecs.cms_profile("adobergb")
    picture.save(folder / f"a.{suffix}", **options)
    image, info = read_image(folder / f"a.{suffix}")
    alpha = picture.mode == "RGBA"
    if picture.mode == "CMYK":
        expected = np.array(picture.convert("RGB"))
    elif picture.mode in ("1", "L"):
        expected = np.array(picture.convert("L"))[..., None]
    else:
        expected = np.array(picture.convert("RGBA" if alpha else "RGB"))
    if suffix in TURNED:
        expected = upright(expected, orientation)
    if expected.shape[-1] == 1:  # GIF and others store grey as colours
        expected = np.broadcast_to(expected, image.shape[1:])
    assert image.shape[1:3] == expected.shape[:2]
    error = 0 if suffix in LOSSLESS else 4
    np.testing.assert_allclose(image[0].numpy() * 255, expected, atol=error + 1e-3)
    assert info.icc_profile == options.get("icc_profile")


def test_ink_becomes_srgb_by_its_profile(tmp_path):
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[..., 0] = 100
    corners[1] = (55, -40, -50)  # cyan as nobody would guess it
    corners[0, 1] = (46, 0, 0)  # magenta that is grey
    corners[..., 1, :] = 0
    profile = ink_profile(corners)
    ink = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    ink.paste((0, 255, 0, 0), (8, 0, 16, 8))
    ink.save(tmp_path / "a.tif", icc_profile=profile)
    ink.save(tmp_path / "a.jpg", icc_profile=profile, quality=100, subsampling=0)
    for suffix in ("tif", "jpg"):
        image, info = read_image(tmp_path / f"a.{suffix}")
        assert info.icc_profile is None
        # Lab (55, -40, -50) is beyond sRGB in red; L* of 46 is the grey 109
        np.testing.assert_allclose(image[0, 2, 2] * 255, [0, 150, 221], atol=6)
        np.testing.assert_allclose(image[0, 2, 13] * 255, [109, 109, 109], atol=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_becomes_srgb_by_its_profile(tmp_path, dtype):
    linear = imagecodecs.cms_profile("gray", gamma=1.0, whitepoint=[0.3457, 0.3585, 1.0])
    full = np.iinfo(dtype).max
    grey = np.full((4, 5), round(full * 55 / 255), dtype)
    Image.fromarray(grey).save(tmp_path / "a.tif", icc_profile=linear)
    image, info = read_image(tmp_path / "a.tif")
    assert info.icc_profile is None
    assert image.shape == (1, 4, 5, 1)
    np.testing.assert_allclose(image * 255, np.full(image.shape, 128), atol=0.6)


def test_adobe_rgb_that_only_exif_tells(tmp_path):
    found = Image.Exif()
    camera = found.get_ifd(0x8769)
    camera[0xA001] = 0xFFFF
    camera[0xA005] = {1: "R03", 2: b"0100"}
    colour = Image.new("RGB", (16, 16), (100, 200, 100))
    colour.save(tmp_path / "a.jpg", exif=found, quality=100)
    image, info = read_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.png", image, info=info)
    with Image.open(tmp_path / "b.png") as written:
        profile = written.info["icc_profile"]
    light = imagecodecs.cms_transform(
        np.full((1, 1, 3), (100, 200, 100), np.uint8), profile, imagecodecs.cms_profile("adobergb"),
        colorspace="rgb", outcolorspace="rgb",
    )  # fmt: skip
    np.testing.assert_allclose(light[0, 0], [100, 200, 100], atol=1)


def test_avif_of_10_bits_keeps_them(tmp_path):
    ramp = np.linspace(0, 1023, 512).astype(np.uint16)
    pixels = np.broadcast_to(ramp[None, :, None], (16, 512, 3)).copy()
    coded = imagecodecs.avif_encode(pixels, level=100, bitspersample=10)
    (tmp_path / "a.avif").write_bytes(coded)
    image, info = read_image(tmp_path / "a.avif")
    assert info.bit_depth == 16
    np.testing.assert_allclose(image[0] * 1023, pixels, atol=1.5)
    assert len(image.unique()) > 400


def test_heic_of_10_bits_keeps_them(tmp_path):
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)
    pixels = np.broadcast_to(ramp[None, :, None], (64, 512, 3)).copy()
    heif = pillow_heif.from_bytes("RGB;16", (512, 64), pixels.tobytes())
    heif.save(tmp_path / "a.heic", quality=-1)
    image, info = read_image(tmp_path / "a.heic")
    assert info.bit_depth == 16
    np.testing.assert_allclose(image[0] * 65535, pixels, atol=400)
    assert len(image.unique()) > 400


def test_code_points_of_avif_are_kept(tmp_path):
    pixels = np.full((16, 16, 3), 500, np.uint16)
    coded = imagecodecs.avif_encode(pixels, bitspersample=10, primaries=9, transfer=16, matrix=9)
    (tmp_path / "a.avif").write_bytes(coded)
    assert read_image(tmp_path / "a.avif")[1].cicp == bytes((9, 16, 0, 1))


def test_suffixes_of_cameras_and_phones_are_taken():
    assert {".jfif", ".jpe", ".apng", ".avif", ".heic", ".heif"} <= READABLE


@pytest.mark.parametrize("suffix", ["jpe", "jfif"])
def test_jpeg_by_its_other_names(tmp_path, suffix):
    write_image(tmp_path / f"a.{suffix}", torch.full((1, 16, 16, 3), 0.5))
    assert Image.open(tmp_path / f"a.{suffix}").format == "JPEG"
    np.testing.assert_allclose(read_image(tmp_path / f"a.{suffix}")[0], 0.5, atol=0.01)


def test_the_reason_is_the_pixel_format_where_it_is(tmp_path):
    coded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(coded, "JPEG")
    deep = bytearray(coded.getvalue())
    deep[deep.index(b"\xff\xc0") + 4] = 12  # bits per channel
    (tmp_path / "a.jpg").write_bytes(deep)
    with pytest.raises(ImageError, match=r"read as a picture: as JPEG, .*12-bit"):
        read_image(tmp_path / "a.jpg")
    coded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(coded, "BMP")
    deep = bytearray(coded.getvalue())
    deep[28] = 5  # bits per pixel
    (tmp_path / "a.bmp").write_bytes(deep)
    with pytest.raises(ImageError, match=r"read as a picture: Unsupported BMP pixel depth"):
        read_image(tmp_path / "a.bmp")
    (tmp_path / "a.jpg").write_bytes(os.urandom(100))
    with pytest.raises(ImageError, match="expected a picture as JPEG, WEBP, TIFF"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "mode", "options", "expected"),
    [
        ("a.png", "RGBA", {}, True),
        ("a.png", "LA", {}, True),
        ("a.png", "L", {"transparency": 3}, True),
        ("a.png", "P", {"transparency": 3}, True),
        ("a.png", "P", {}, False),
        ("a.tif", "RGBA", {}, True),
        ("a.tif", "LA", {}, True),
        ("a.tif", "CMYK", {}, False),
        ("a.tif", "L", {}, False),
        ("a.jpg", "CMYK", {}, False),
        ("a.gif", "P", {"transparency": 3}, True),
        ("a.gif", "P", {}, False),
        ("a.webp", "RGBA", {"lossless": True}, True),
        ("a.avif", "RGBA", {}, True),
        ("a.avif", "RGB", {}, False),
    ],
)
def test_a_file_s_head_says_whether_it_is_read_with_alpha(tmp_path, name, mode, options, expected):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = RNG.integers(0, 9, (16, 16, channels)).astype(np.uint8).squeeze()
    Image.frombytes(mode, (16, 16), pixels.tobytes()).save(tmp_path / name, **options)
    assert has_alpha(tmp_path / name) is expected
    assert (read_image(tmp_path / name)[0].shape[-1] == 4) is expected
