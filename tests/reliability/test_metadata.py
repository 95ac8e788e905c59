"""What a file says beside its pixels survives upscaling; TIFF files of our own hold what Pillow's
hold, and 16 bits."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from infdit_core.pictures.files import ImageError, check_writable, read_image, write_image
from infdit_core.pictures.metadata import Metadata

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" rights="\xc3\xa9"/></x:xmpmeta>'
UPRIGHT = XMP.replace(b'"6"', b'"1"')
WORKFLOW = '{"nodes": ["é"]}'
TAKEN = "2020:01:02 03:04:05"


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


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (700, 601)])
def test_tiff_of_8_bits_is_what_pillow_reads(tmp_path, channels, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    write_image(tmp_path / "a.tif", torch.from_numpy(pixels)[None] / 255)
    found = Image.open(tmp_path / "a.tif")
    assert found.mode == {3: "RGB", 4: "RGBA"}[channels]
    assert np.array_equal(np.array(found), pixels)


@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_of_16_bits(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 65536, (300, 601, channels), dtype=np.uint16)
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


def test_16_bits_need_a_format_that_has_them(tmp_path):
    check_writable(tmp_path / "a.tif", alpha=True, bit_depth=16)
    with pytest.raises(ImageError, match=r"expected \.png or \.tif for 16 bits"):
        check_writable(tmp_path / "a.webp", alpha=False, bit_depth=16)


def test_a_file_that_came_meanwhile_is_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(b"theirs")
    with pytest.raises(ImageError, match=r"a\.png cannot be written: it has come into being"):
        write_image(tmp_path / "a.png", torch.zeros(1, 4, 4, 3), overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1
