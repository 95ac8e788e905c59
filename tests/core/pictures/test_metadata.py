"""What a file says beside its pixels: kept where it stays true, taken out where not."""

import struct

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infdit_core.pictures import metadata, xmp
from infdit_core.pictures.files import ImageInfo, read_image, write_image
from infdit_core.pictures.metadata import Metadata
from tests.core.pictures.made import TAKEN, drawn, exif

FORMATS = [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("webp", 8), ("jpg", 8)]
IPTC = b"\x1c\x02\x50\x00\x08Somebody\x1c\x02\x05\x00\x05Title"
NAMESPACES = {
    "tiff": "http://ns.adobe.com/tiff/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "GCamera": "http://ns.google.com/photos/1.0/camera/",
    "Container": "http://ns.google.com/photos/1.0/container/",
    "GPano": "http://ns.google.com/photos/1.0/panorama/",
    "hdrgm": "http://ns.adobe.com/hdr-gain-map/1.0/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
}


def packet(inside: str = "", attributes: str = "") -> bytes:
    names = " ".join(f'xmlns:{prefix}="{name}"' for prefix, name in NAMESPACES.items())
    return (
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta'
        f' xmlns:x="adobe:ns:meta/" {names}><rdf:RDF><rdf:Description rdf:about="" {attributes}>'
        f'{inside}</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode()


XMP = packet("<dc:creator><rdf:Seq><rdf:li>é</rdf:li></rdf:Seq></dc:creator>", 'xmp:Rating="3"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@st.composite
def infos(draw) -> ImageInfo:
    words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30)
    made = Image.Exif()
    if draw(st.booleans()):
        made[0x010F] = draw(st.text("abc XYZ012", min_size=1).filter(str.strip))
    if draw(st.booleans()):
        made.get_ifd(0x8769).update({0x9003: TAKEN, 0x829A: draw(st.sampled_from([0.5, 0.25]))})
    if draw(st.booleans()):
        made.get_ifd(0x8825).update({1: "N", 2: (float(draw(st.integers(0, 90))), 1.0, 2.0)})
    has_exif = len(made) or made.get_ifd(0x8769) or made.get_ifd(0x8825)
    profile = draw(st.sampled_from([None, "adobergb", "srgb"]))
    return ImageInfo(
        icc_profile=imagecodecs.cms_profile(profile) if profile else None,
        metadata=Metadata(
            made.tobytes() if has_exif else None,
            draw(st.sampled_from([None, XMP, packet("<xmp:Label>x</xmp:Label>" * 500)])),
            draw(
                st.dictionaries(st.text("abc XYZ", min_size=1).map(str.strip).filter(bool), words)
            ),
            draw(st.sampled_from([None, IPTC])),
        ),
    )


def tags(data: bytes | None) -> tuple:
    found = Image.Exif()
    found.load(data or b"")
    return dict(found.get_ifd(0x8769)), dict(found.get_ifd(0x8825)), found.get(0x010F)


@drawn(100)
@given(infos(), st.sampled_from(FORMATS), st.booleans())
def test_what_is_written_is_what_is_read(folder, info, format, alpha):
    suffix, bits = format
    channels = 4 if alpha and suffix != "jpg" else 3
    pixels = np.random.default_rng(0).integers(0, 2**bits, (8, 8, channels))
    image = torch.from_numpy(pixels / (2**bits - 1)).float()[None]
    write_image(folder / f"a.{suffix}", image, bit_depth=bits, info=info)
    again, found = read_image(folder / f"a.{suffix}")
    if suffix != "jpg":
        assert torch.equal(again, image)
    assert found.icc_profile == info.icc_profile
    assert found.metadata.xmp == info.metadata.xmp
    assert tags(found.metadata.exif) == tags(info.metadata.exif)
    assert found.metadata.text == (info.metadata.text if suffix == "png" else {})
    assert found.metadata.iptc == (None if suffix == "webp" else info.metadata.iptc)


@pytest.mark.parametrize(("suffix", "bits"), FORMATS)
def test_what_a_camera_wrote_comes_out_and_what_is_untrue_does_not(tmp_path, suffix, bits):
    profile = imagecodecs.cms_profile("adobergb")
    turned = packet("", 'tiff:Orientation="6" tiff:ImageWidth="11"')
    resource = b"8BIM\x04\x0c\0\0\0\0\0\2ab" + metadata.iptc_resource(IPTC)
    body = b"Photoshop 3.0\0" + resource
    segment = struct.pack(">HH", 0xFFED, 2 + len(body)) + body
    source = tmp_path / "source.jpg"
    options = {"exif": exif(6), "xmp": turned, "icc_profile": profile, "extra": segment}
    Image.new("RGB", (11, 9)).save(source, **options)
    image, info = read_image(source)
    assert info.metadata.iptc == IPTC
    target = tmp_path / f"out.{suffix}"
    write_image(target, image, info=info, bit_depth=bits)
    with Image.open(target) as found:
        seen = found.getexif()
        assert seen[0x010F] == "Camera"
        assert seen[0x8298] == "Somebody"
        assert seen.get(0x0112, 1) == 1  # the pixels are upright
        assert seen.get(0x011A, 1) == 1  # no resolution
        assert dict(seen.get_ifd(0x8769)) == {0x9003: TAKEN}
        assert dict(seen.get_ifd(0x8825)) == {1: "N", 2: (47.0, 1.0, 2.0)}
        there = found.info.get("xmp") or found.info["XML:com.adobe.xmp"].encode()
        assert b'Orientation="1"' in there
        assert b"ImageWidth" not in there
        assert found.info["icc_profile"] == profile


def test_untrue_parts_of_xmp_are_taken_out_and_the_rest_stays():
    untrue = packet(
        "<dc:title>T</dc:title><tiff:Orientation>8</tiff:Orientation>"
        "<Container:Directory><rdf:Seq><rdf:li>x</rdf:li></rdf:Seq></Container:Directory>",
        'GCamera:MotionPhoto="1" GCamera:MicroVideoOffset="4096" hdrgm:Version="1.0" xmp:Rating="3"'
        ' GPano:FullPanoWidthPixels="32" GPano:ProjectionType="equirectangular"'
        ' exif:PixelXDimension="32"',
    )
    found = xmp.upright(untrue).decode()
    for gone in ("Motion", "MicroVideo", "hdrgm:", "Directory", "PanoWidth", "PixelX"):
        assert gone not in found.partition("rdf:about")[2]
    for kept in ("<dc:title>T<", 'xmp:Rating="3"', 'Type="equirectangular"', "xpacket end"):
        assert kept in found
    assert "<tiff:Orientation>1<" in found
    assert xmp.orientation(untrue) == 8
    assert xmp.upright(XMP) == XMP


@pytest.mark.parametrize("bad", [b"<a", b"<!DOCTYPE a><a/>", b"<a x:y='1'/>", b"<a>" * 5000])
def test_damaged_xmp_costs_itself_alone(tmp_path, caplog, bad):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", xmp=bad, exif=exif(1))
    image, info = read_image(tmp_path / "a.jpg")
    assert image.shape == (1, 4, 4, 3)
    assert info.metadata.xmp is None
    assert info.metadata.exif
    assert "a.jpg: its XMP is damaged and left out" in caplog.text


@pytest.mark.parametrize("kind", ["exif", "APP1"])
def test_exif_in_a_raw_profile_turns_the_pixels_once(tmp_path, kind):
    texts = PngInfo()
    for name, data in (
        (kind, exif(6).tobytes()),
        ("xmp", XMP),
        ("8bim", metadata.iptc_resource(IPTC)),
        ("icc", imagecodecs.cms_profile("adobergb")),
    ):
        texts.add_text(*metadata.raw_profile(name, data), zip=True)
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png", pnginfo=texts)
    image, info = read_image(tmp_path / "a.png")
    assert image.shape == (1, 5, 3, 3)
    write_image(tmp_path / "b.png", image, info=info)
    with Image.open(tmp_path / "b.png") as found:
        assert found.getexif().get(0x0112, 1) == 1
        assert found.getexif()[0x010F] == "Camera"
        assert found.info["icc_profile"] == imagecodecs.cms_profile("adobergb")
        assert list(found.text) == ["XML:com.adobe.xmp", "Raw profile type iptc"]
    again = read_image(tmp_path / "b.png")
    assert again[0].shape == image.shape
    assert again[1].metadata.iptc == IPTC
    assert again[1].metadata.xmp == XMP


def test_metadata_too_large_for_jpeg_never_costs_the_picture(tmp_path, caplog):
    ancestors = packet("<dc:title>T</dc:title><xmp:Big>" + "x" * 70_000 + "</xmp:Big>")
    big = Image.Exif()
    big.get_ifd(0x8769)[0x9286] = b"x" * 70_000
    info = ImageInfo(
        metadata=Metadata(big.tobytes(), ancestors, {"workflow": "{}"}, b"\x1c" * 70_000)
    )
    write_image(tmp_path / "a.jpg", torch.zeros(1, 8, 8, 3), info=info)
    found = read_image(tmp_path / "a.jpg")[1].metadata
    assert b"<dc:title>T" in (found.xmp or b"")
    assert b"xmp:Big" not in (found.xmp or b"")
    assert (found.exif, found.iptc) == (None, None)
    assert "a.jpg is written without its EXIF of 700" in caplog.text
    assert "xmp:Big of its XMP, its IPTC of 70000 bytes, texts ('workflow')" in caplog.text


def test_a_picture_without_metadata_gets_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image, info = read_image(tmp_path / "a.png")
    assert info == ImageInfo()
    for suffix, bits in FORMATS:
        write_image(tmp_path / f"b.{suffix}", image, info=info, bit_depth=bits)
        found = read_image(tmp_path / f"b.{suffix}")[1]
        assert (found.metadata.xmp, found.metadata.iptc, found.metadata.text) == (None, None, {})


def test_damaged_exif_does_not_fail_a_picture(tmp_path, monkeypatch, caplog):
    def damaged(self):
        raise TypeError("a tuple of nothing")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=exif())
    monkeypatch.setattr(Image.Exif, "tobytes", damaged)
    pixels, info = read_image(tmp_path / "a.png")
    assert pixels.shape == (1, 4, 4, 3)
    assert info.metadata == Metadata()
    assert "a.png: its EXIF is damaged and left out: a tuple of nothing" in caplog.text
