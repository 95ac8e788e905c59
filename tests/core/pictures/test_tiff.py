"""TIFF: every layout and depth, by value, and a writer that others read."""

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infdit_core.pictures import tiff_writer
from infdit_core.pictures.files import ImageError, picture_size, read_image, write_image
from tests.core.pictures.made import drawn, packed_bits, upright

RNG = np.random.default_rng(0)
COLOURS = {"minisblack": 1, "miniswhite": 1, "rgb": 3}
PILLOW_DEFLATE = {"compression": "tiff_adobe_deflate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@st.composite
def tiff_files(draw) -> tuple[np.ndarray, dict, np.ndarray]:
    """Pixels and options for tifffile, and the values, (H, W, C) upright in 0..1."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    photometric = draw(st.sampled_from(list(COLOURS)))
    alpha = draw(st.sampled_from([None, "unassalpha", "assocalpha", "unspecified"]))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.float16, np.float32]))
    full = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    seed = draw(st.integers(0, 99))
    channels = COLOURS[photometric] + (alpha is not None)
    values = np.random.default_rng(seed).random((*shape, channels))
    if alpha == "assocalpha":
        values[..., -1:] = values[..., -1:].round()  # so that no quotient is rounded twice
        values[..., :-1] *= values[..., -1:]
    pixels = (values * full).astype(dtype)
    expected = pixels.astype(np.float64) / full
    if photometric == "miniswhite":
        expected[..., 0] = 1 - expected[..., 0]
    if alpha == "unspecified":
        expected = expected[..., :-1]
    elif photometric == "miniswhite" and alpha == "assocalpha":
        expected[..., :-1] *= expected[..., -1:]
    if expected.shape[-1] == 2:
        expected = expected[..., [0, 0, 0, 1]]
    orientation = draw(st.integers(1, 8))
    options = {
        "photometric": photometric,
        "compression": draw(st.sampled_from([None, "zlib", "lzw", "packbits", "zstd", "lzma"])),
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
        "extrasamples": [alpha] if alpha else None,
        "extratags": [(274, 3, 1, orientation, True)],
        "metadata": None,
    }
    if options["compression"] in ("zlib", "lzw", "zstd") and dtype != np.float16:
        options["predictor"] = draw(st.booleans())
    options |= draw(st.sampled_from([{"rowsperstrip": 3}, {"tile": (16, 32)}, {}]))
    if channels > 1 and draw(st.booleans()):
        options["planarconfig"] = "separate"
        pixels = np.moveaxis(pixels, -1, 0)
    elif channels == 1:
        pixels = pixels[..., 0]
    return pixels, options, upright(expected, orientation)


@drawn(300)
@given(tiff_files())
def test_any_tiff_is_read_by_value(folder, file):
    pixels, options, expected = file
    path = folder / "a.tif"
    tifffile.imwrite(path, pixels, **options)
    image, info = read_image(path)
    assert image.shape[1:] == expected.shape
    np.testing.assert_allclose(image[0].numpy(), expected, atol=2**-24, rtol=0)
    assert info.bit_depth == (8 if pixels.dtype == np.uint8 else 16)
    assert picture_size(path) is not None


@drawn(60)
@given(st.data())
def test_bits_that_are_no_bytes(folder, data):
    """1 to 15 bits, black or white as 0, one after the other in rows of whole bytes."""
    bits = data.draw(st.sampled_from([1, 2, 4, 10, 12, 14]))
    white_is_zero = data.draw(st.booleans())
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = rng.integers(0, 2**bits, shape).astype(np.uint16)
    rows = [np.array([int(b) for v in row for b in f"{v:0{bits}b}"], np.uint8) for row in pixels]
    strip = b"".join(packed_bits(row, 1) for row in rows)
    values = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: int(not white_is_zero),
              273: 8, 277: 1, 278: shape[0], 279: len(strip)}  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in values.items()
    )
    head = b"II*\0" + (8 + len(strip)).to_bytes(4, "little")
    directory = len(values).to_bytes(2, "little") + entries + bytes(4)
    (folder / "a.tif").write_bytes(head + strip + directory)
    image, _ = read_image(folder / "a.tif")
    expected = pixels / (2**bits - 1)
    expected = 1 - expected if white_is_zero else expected
    # as many levels as 8 or 16 bits have
    step = 0.5 / (255 if bits < 8 else 65535)
    np.testing.assert_allclose(image[0, ..., 0], expected, atol=step + 1e-7, rtol=0)


def test_a_thumbnail_before_the_picture_is_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((2, 3, 3), np.uint8), photometric="rgb", subfiletype=1)
        file.write(np.full((20, 30, 3), 255, np.uint8), photometric="rgb")
    assert read_image(tmp_path / "a.tif")[0].shape == (1, 20, 30, 3)
    assert picture_size(tmp_path / "a.tif") == (20, 30)


def test_kinds_of_colours_that_are_pillows(tmp_path):
    Image.new("YCbCr", (8, 8), (100, 128, 128)).save(tmp_path / "video.tif", compression="jpeg")
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "lab.tif")
    indexed = Image.new("P", (8, 8), 1)
    indexed.putpalette([0, 0, 0, 10, 20, 30])
    indexed.save(tmp_path / "indexed.tif", **PILLOW_DEFLATE)
    expected = {"video": [100, 100, 100], "lab": [255, 255, 255], "indexed": [10, 20, 30]}
    for name, colour in expected.items():
        image, _ = read_image(tmp_path / f"{name}.tif")
        np.testing.assert_allclose(image[0, 0, 0] * 255, colour, atol=1.01)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), np.int16), "its 16 bits per channel have a sign; expected unsigned ones"),
        (np.full((4, 4), 7.5, np.float32), r"its values lie in 7\.5\.\.7\.5; expected 0\.\.1"),
        (np.full((4, 4), np.nan, np.float32), r"its values lie in nan\.\.nan; expected 0\.\.1"),
        (np.zeros((4, 4), np.complex64), "64 bits per channel of kind 6; expected 1 to 32"),
        (np.zeros((4, 4), np.float64), "64 bits per channel of kind 3; expected 1 to 32"),
    ],
)
def test_what_has_no_place_in_0_to_1_is_refused_by_name(tmp_path, pixels, message):
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(ImageError, match=f"a.tif cannot be read as a picture: .*{message}"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits"])
def test_a_file_that_is_cut_off(tmp_path, compression):
    pixels = RNG.integers(0, 2**16, (40, 30, 3), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression=compression, rowsperstrip=8)
    whole = (tmp_path / "a.tif").read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 9):
        (tmp_path / "a.tif").write_bytes(whole[:kept])
        with pytest.raises(ImageError, match=r"a\.tif cannot be read as a picture: "):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (700, 601)])
def test_what_is_written_is_read_by_others(tmp_path, channels, bits, size):
    pixels = RNG.integers(0, 2**bits, (*size, channels)).astype(f"u{bits // 8}")
    image = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1))[None]
    write_image(tmp_path / "a.tif", image, bit_depth=bits)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), pixels)
    found = Image.open(tmp_path / "a.tif")
    assert found.mode == {3: "RGB", 4: "RGBA"}[channels]
    # of 16 bits, Pillow reads the upper eight
    assert np.abs(np.array(found).astype(int) - (pixels >> (bits - 8))).max() <= bits // 16


def test_above_4_gb_offsets_have_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_writer, "_BIG_BYTES", 100)
    source = Image.new("RGB", (9, 8), (1, 2, 3))
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    source.save(tmp_path / "a.png", exif=exif)
    image, info = read_image(tmp_path / "a.png")
    write_image(tmp_path / "a.tif", image, info=info)
    assert (tmp_path / "a.tif").read_bytes().startswith(b"II+\0")
    again, info = read_image(tmp_path / "a.tif")
    assert torch.equal(again, image)
    with Image.open(tmp_path / "a.tif") as found:
        assert found.getexif()[0x010F] == "Camera"
        assert found.getexif().get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
    assert info.metadata.exif
