"""Picture files: every pixel format that users have, exactly, and what they say beside pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from infdit_core.pictures.files import (
    ImageError,
    ImageInfo,
    check_writable,
    read_image,
    write_image,
)
from infdit_core.pictures.metadata import Metadata
from tests.reliability.hostile_pictures import chunk

ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""First column and row of the passes of an interlaced picture, and their steps."""
RNG = np.random.default_rng(0)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" rights="\xc3\xa9"/></x:xmpmeta>'
UPRIGHT = XMP.replace(b'"6"', b'"1"')
WORKFLOW = '{"nodes": ["é"]}'
TAKEN = "2020:01:02 03:04:05"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


def random_pixels(channels: int, dtype=np.uint8, height: int = 13, width: int = 17) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def png(pixels: np.ndarray, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """Encode (H, W, C) pixels, straight from the specification."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    depth = 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    passes = [pixels[y::down, x::right] for x, y, right, down in ADAM7] if interlaced else [pixels]
    rows = (row for part in passes if part.size for row in part)
    packed = zlib.compress(
        b"".join(b"\0" + row.astype(f">u{row.itemsize}").tobytes() for row in rows)
    )
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@st.composite
def png_files(draw) -> tuple[bytes, np.ndarray]:
    """A PNG file and the pixels, (H, W, C) upright, that it stands for."""
    channels = draw(st.integers(1, 4))
    shape = (*draw(st.tuples(st.integers(1, 9), st.integers(1, 9))), channels)
    pixels = draw(arrays(draw(st.sampled_from([np.uint8, np.uint16])), shape))
    orientation = draw(st.integers(1, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunks = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    expected = pixels
    if channels in (1, 3) and draw(st.booleans()):
        transparent = pixels[0, 0]
        chunks += chunk(b"tRNS", transparent.astype(">u2").tobytes())
        opaque = (pixels != transparent).any(-1, keepdims=True) * np.iinfo(pixels.dtype).max
        expected = np.concatenate([pixels, opaque.astype(pixels.dtype)], axis=-1)
    if expected.shape[-1] == 2:
        expected = expected[..., [0, 0, 0, 1]]
    turns = {3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}.get(orientation, 0)
    mirrored = expected[:, ::-1] if orientation in (2, 4, 5, 7) else expected
    return png(pixels, draw(st.booleans()), chunks), np.rot90(mirrored, turns)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(png_files())
def test_any_png_is_read_exactly(folder, file):
    data, expected = file
    (folder / "a.png").write_bytes(data)
    image, info = read_image(folder / "a.png")
    levels = np.iinfo(expected.dtype).max
    assert image.dtype == torch.float32
    assert np.array_equal(image[0].numpy(), expected.astype(np.float32) / levels)
    assert info == ImageInfo(bit_depth=8 * expected.itemsize, icc_profile=None)


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


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (700, 601)])
def test_tiff_of_8_bits_is_what_pillow_reads(tmp_path, channels, size):
    pixels = random_pixels(channels, np.uint8, *size)
    write_image(tmp_path / "a.tif", torch.from_numpy(pixels)[None] / 255)
    found = Image.open(tmp_path / "a.tif")
    assert found.mode == {3: "RGB", 4: "RGBA"}[channels]
    assert np.array_equal(np.array(found), pixels)


@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_of_16_bits(tmp_path, channels):
    pixels = random_pixels(channels, np.uint16, 300, 601)
    write_image(tmp_path / "a.tif", torch.from_numpy(pixels / 65535)[None], bit_depth=16)
    data = (tmp_path / "a.tif").read_bytes()
    tags = Image.open(io.BytesIO(data)).tag_v2
    assert tags[258] == (16,) * channels
    strips = zip(tags[273], tags[279], strict=True)
    rows = b"".join(zlib.decompress(data[start : start + size]) for start, size in strips)
    differences = np.frombuffer(rows, "<u2").reshape(pixels.shape)
    assert len(tags[273]) > 1
    assert np.array_equal(differences.cumsum(1, dtype=np.uint16), pixels)
    # Pillow reads the upper eight bits
    assert np.abs(np.array(Image.open(io.BytesIO(data))).astype(int) - (pixels >> 8)).max() <= 1


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
    whole = png(random_pixels(channels, np.uint16))
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


# What a file says beside its pixels


def make_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x8298], exif[0x0112] = "Camera", "Somebody", 6
    exif[0x011A] = 72.0  # resolution, which is another afterwards
    exif.get_ifd(0x8769).update({0x9003: TAKEN, 0xA002: 11, 0x927C: b"maker's"})
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 1.0, 2.0)})
    return exif


@pytest.fixture
def source(tmp_path):
    """A JPEG picture with everything."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "source.jpg"
    Image.new("RGB", (11, 9)).save(path, exif=make_exif(), xmp=XMP, icc_profile=profile)
    return path


FORMATS = [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("webp", 8), ("jpg", 8)]


@pytest.mark.parametrize(("suffix", "bits"), FORMATS)
def test_metadata_is_kept(source, tmp_path, suffix, bits):
    image, info = read_image(source)
    target = tmp_path / f"out.{suffix}"
    write_image(target, image, info=info, bit_depth=bits)
    with Image.open(target) as found:
        exif = found.getexif()
        assert exif[0x010F] == "Camera"
        assert exif[0x8298] == "Somebody"
        assert exif.get(0x0112, 1) == 1  # the pixels are upright
        assert 0x011A not in exif
        assert dict(exif.get_ifd(0x8769)) == {0x9003: TAKEN}
        assert dict(exif.get_ifd(0x8825)) == {1: "N", 2: (47.0, 1.0, 2.0)}
        xmp = found.info.get("xmp") or found.info["XML:com.adobe.xmp"].encode()
        assert xmp == UPRIGHT
        assert found.info["icc_profile"] == info.icc_profile
    again = read_image(target)[1]
    assert again.metadata.xmp == info.metadata.xmp
    assert again.icc_profile == info.icc_profile


@pytest.mark.parametrize("bits", [8, 16])
def test_texts_of_png_are_kept(tmp_path, bits):
    texts = PngInfo()
    texts.add_text("workflow", WORKFLOW)
    texts.add_text("Comment", "plain")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=texts)
    image, info = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", image, info=info, bit_depth=bits)
    assert Image.open(tmp_path / "b.png").text == {"workflow": WORKFLOW, "Comment": "plain"}


def test_a_picture_without_metadata_gets_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image, info = read_image(tmp_path / "a.png")
    assert info.metadata == Metadata()
    for suffix, bits in FORMATS:
        write_image(tmp_path / f"b.{suffix}", image, info=info, bit_depth=bits)
        assert read_image(tmp_path / f"b.{suffix}")[1].metadata.xmp is None


def test_damaged_metadata_does_not_fail_a_picture(tmp_path, monkeypatch, caplog):
    def damaged(self):
        raise TypeError("a tuple of nothing")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=make_exif())
    image = Image.open(tmp_path / "a.png")
    monkeypatch.setattr(Image.Exif, "tobytes", damaged)
    image.close()
    pixels, info = read_image(tmp_path / "a.png")
    assert pixels.shape == (1, 4, 4, 3)
    assert info.metadata == Metadata()
    assert "its metadata is damaged and left out: a tuple of nothing" in caplog.text
