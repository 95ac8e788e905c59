"""PNG: every kind of pixels exactly, and the chunks around them."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infdit_core.pictures.files import ImageError, ImageInfo, read_image, write_image
from tests.core.pictures.made import chunk, drawn, exif, png, upright

RNG = np.random.default_rng(0)
WORKFLOW = '{"nodes": ["é"]}'
LINEAR = chunk(b"gAMA", struct.pack(">I", 100_000))
P3 = chunk(b"cHRM", struct.pack(">8I", *(31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@st.composite
def png_files(draw) -> tuple[bytes, np.ndarray]:
    """A PNG file and the pixels, (H, W, C) upright in full range, that it stands for."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    channels = draw(st.integers(1, 4))
    bits = draw(st.sampled_from([1, 2, 4, 8, 16] if channels == 1 else [8, 16]))
    dtype = np.uint16 if bits == 16 else np.uint8
    full = np.iinfo(dtype).max
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = rng.integers(0, 2**bits, (*shape, channels)).astype(dtype)
    orientation = draw(st.integers(1, 8))
    chunks, palette = b"", None
    if channels == 1 and bits <= 8 and draw(st.booleans()):
        palette = rng.integers(0, 256, (2**bits, 3)).astype(np.uint8)
        expected = palette[pixels[..., 0]]
        if draw(st.booleans()):
            alphas = rng.integers(0, 256, draw(st.integers(1, 2**bits))).astype(np.uint8)
            chunks += chunk(b"tRNS", alphas.tobytes())
            alphas = np.pad(alphas, (0, 2**bits - len(alphas)), constant_values=255)
            expected = np.concatenate([expected, alphas[pixels]], axis=-1)
    else:
        expected = (pixels * (full / (2**bits - 1))).astype(dtype)
        if channels in (1, 3) and draw(st.booleans()):
            transparent = pixels[0, 0]
            chunks += chunk(b"tRNS", transparent.astype(">u2").tobytes())
            opaque = (pixels != transparent).any(-1, keepdims=True) * full
            expected = np.concatenate([expected, opaque.astype(dtype)], axis=-1)
    turned = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunks += chunk(b"eXIf", turned)
    if expected.shape[-1] == 2:
        expected = expected[..., [0, 0, 0, 1]]
    return png(pixels, draw(st.booleans()), chunks, bits, palette), upright(expected, orientation)


@drawn(300)
@given(png_files())
def test_any_png_is_read_exactly(folder, file):
    data, expected = file
    (folder / "a.png").write_bytes(data)
    image, info = read_image(folder / "a.png")
    levels = np.iinfo(expected.dtype).max
    assert image.dtype == torch.float32
    assert np.array_equal(image[0].numpy(), expected.astype(np.float32) / levels)
    assert (info.bit_depth, info.icc_profile) == (8 * expected.itemsize, None)


def test_a_text_that_is_too_long_costs_neither_the_picture_nor_its_orientation(tmp_path, caplog):
    bomb = chunk(b"zTXt", b"big\0\0" + zlib.compress(bytes(20_000_000)))
    turned = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png(np.zeros((2, 5, 3), np.uint8), chunks=bomb + turned))
    image, info = read_image(tmp_path / "a.png")
    assert image.shape == (1, 5, 2, 3)
    assert info.metadata.exif
    assert info.metadata.text == {}
    assert "a.png: its zTXt is damaged and left out" in caplog.text


@pytest.mark.parametrize("bits", [8, 16])
def test_texts_are_kept(tmp_path, bits):
    texts = PngInfo()
    texts.add_text("workflow", WORKFLOW)
    texts.add_text("Comment", "plain é")
    texts.add_text("Long", "long " * 100, zip=True)
    texts.add_itxt("Title", "ü", "de", "Titel", zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=texts)
    image, info = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", image, info=info, bit_depth=bits)
    expected = {"workflow": WORKFLOW, "Comment": "plain é", "Long": "long " * 100, "Title": "ü"}
    assert Image.open(tmp_path / "b.png").text == expected


def test_a_name_that_png_cannot_hold_costs_that_text_alone(tmp_path, caplog):
    texts = {"日本": "a", "": "b", "x" * 80: "c", "fine": "日本"}
    metadata = type(ImageInfo().metadata)(text=texts)
    write_image(tmp_path / "a.png", torch.zeros(1, 2, 2, 3), info=ImageInfo(metadata=metadata))
    assert Image.open(tmp_path / "a.png").text == {"fine": "日本"}
    assert "a.png is written without the text '日本'" in caplog.text


def shown(path, values) -> list:
    """sRGB of pixels, as a viewer shows them that takes the profile of a file."""
    with Image.open(path) as found:
        profile = found.info["icc_profile"]
    pixels = np.array([values], np.uint8)
    out = imagecodecs.cms_transform(
        pixels, profile, imagecodecs.cms_profile("srgb"), colorspace="rgb", outcolorspace="rgb"
    )
    return out[0].tolist()


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_gamma_and_primaries_become_a_profile(tmp_path, suffix):
    picture = np.full((3, 4, 3), 55, np.uint8)
    (tmp_path / "linear.png").write_bytes(png(picture, chunks=LINEAR))
    (tmp_path / "wide.png").write_bytes(png(picture, chunks=P3))
    for name in ("linear", "wide"):
        image, info = read_image(tmp_path / f"{name}.png")
        write_image(tmp_path / f"{name}_.{suffix}", image, info=info)
    # sRGB encodes the light 55/255 as 128; saturated red of P3 lies beyond sRGB, grey is grey
    assert shown(tmp_path / f"linear_.{suffix}", [(55, 55, 55)]) == [[128, 128, 128]]
    greys, reds = shown(tmp_path / f"wide_.{suffix}", [(55, 55, 55), (200, 100, 50)])
    assert greys == [55, 55, 55]
    np.testing.assert_allclose(reds, [215, 93, 31], atol=1)


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"gAMA", struct.pack(">I", 45455)),
        LINEAR + P3 + chunk(b"sRGB", b"\0"),
        chunk(b"cICP", bytes((1, 13, 0, 1))),
    ],
)
def test_what_says_srgb_gets_no_profile(tmp_path, chunks):
    (tmp_path / "a.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8), chunks=chunks))
    assert read_image(tmp_path / "a.png")[1].icc_profile is None


def test_code_points_are_kept_and_rule(tmp_path):
    icc = chunk(b"iCCP", b"a\0\0" + zlib.compress(imagecodecs.cms_profile("srgb")))
    wide = chunk(b"cICP", bytes((12, 13, 0, 1)))
    (tmp_path / "a.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8), chunks=icc + wide))
    image, info = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", image, info=info)
    write_image(tmp_path / "b.jpg", image, info=info)
    assert chunk(b"cICP", bytes((12, 13, 0, 1))) in (tmp_path / "b.png").read_bytes()
    (found,) = shown(tmp_path / "b.jpg", [(200, 100, 50)])
    np.testing.assert_allclose(found, [215, 93, 31], atol=1)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_kept_in_png_and_refused_elsewhere(tmp_path, transfer):
    hdr = chunk(b"cICP", bytes((9, transfer, 0, 1)))
    (tmp_path / "a.png").write_bytes(png(np.zeros((2, 2, 3), np.uint16), chunks=hdr))
    image, info = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", image, info=info, bit_depth=16)
    assert hdr in (tmp_path / "b.png").read_bytes()
    for suffix in ("tif", "jpg", "webp"):
        with pytest.raises(ImageError, match=r"its colours are (PQ|HLG), which only \.png can"):
            write_image(tmp_path / f"b.{suffix}", image, info=info)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_damaged_files(tmp_path, channels, dtype):
    path = tmp_path / "a.png"
    whole = png(RNG.integers(0, 256, (13, 17, channels)).astype(dtype))
    for broken in (
        *(whole[:n] for n in range(10, len(whole) - 12, 37)),
        whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
    ):
        path.write_bytes(broken)
        with pytest.raises(ImageError, match=r"a\.png cannot be read as a picture: "):
            read_image(path)


def test_an_animation_gives_its_first_picture_and_a_word(tmp_path, caplog):
    frames = [Image.new("RGB", (4, 4), (n, n, n)) for n in (10, 200)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    image, _ = read_image(tmp_path / "a.png")
    assert (image * 255).round().unique().tolist() == [10]
    assert "a.png holds more than one picture; the first is taken" in caplog.text
