"""TIFF: every layout and depth, by value, and a writer that others read."""

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from imagecodecs import cms_profile
from PIL import Image

from infdit_core.memory import host
from infdit_core.pictures import tiff_writer
from infdit_core.pictures.files import ImageError, picture_size, read_image, write_image
from tests.core.pictures.made import TAKEN, drawn, exif, packed_bits, upright

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
    room = torch.full((1, *expected.shape), torch.nan)
    given, _ = read_image(path, lambda shape: room.view(shape))
    assert given.data_ptr() == room.data_ptr()
    assert torch.equal(given, image)


@pytest.mark.parametrize(
    "layout", [{"tile": (16, 16), "compression": "zlib"}, {}, {"planarconfig": "separate"}]
)
def test_what_comes_in_pieces_needs_no_memory_of_its_size(tmp_path, monkeypatch, layout):
    pixels = RNG.integers(0, 256, (64, 80, 3), np.uint8)
    stored = np.moveaxis(pixels, -1, 0) if layout.get("planarconfig") else pixels
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **layout)
    monkeypatch.setattr(host, "available_bytes", lambda: 16 * 16 * 3 * 4)
    with pytest.raises(ImageError, match=r"a\.tif is too large to read: 80×64 px need"):
        read_image(tmp_path / "a.tif")
    image, _ = read_image(tmp_path / "a.tif", torch.empty)
    assert torch.equal((image[0] * 255).round(), torch.from_numpy(pixels).float())
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="zlib", rowsperstrip=64)
    with pytest.raises(ImageError, match=r"a\.tif is too large to read: 80×64 px need"):
        read_image(tmp_path / "a.tif", torch.empty)


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


@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (4, 16)])
def test_what_is_large_is_tiled(tmp_path, monkeypatch, channels, bits):
    monkeypatch.setattr(tiff_writer, "_TILED_BYTES", 100)
    pixels = RNG.integers(0, 2**bits, (300, 530, channels)).astype(f"u{bits // 8}")
    image = torch.from_numpy(pixels.astype(np.float32) / (2**bits - 1))[None]
    write_image(tmp_path / "a.tif", image, bit_depth=bits)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        (page,) = file.pages
        assert page.tile == (256, 256)
        assert np.array_equal(page.asarray(), pixels)
    with Image.open(tmp_path / "a.tif") as found:
        assert np.abs(np.array(found).astype(int) - (pixels >> (bits - 8))).max() <= bits // 16
    assert torch.equal(read_image(tmp_path / "a.tif")[0], image)


def test_a_pyramid_holds_means_of_means(tmp_path):
    source = Image.new("RGB", (9, 8))
    source.save(tmp_path / "a.png", exif=exif(1), icc_profile=cms_profile("adobergb"))
    info = read_image(tmp_path / "a.png")[1]
    pixels = RNG.integers(0, 256, (522, 301, 3), np.uint8)
    image = torch.from_numpy(pixels)[None] / 255
    write_image(tmp_path / "a.tif", image, info=info, pyramid=True)
    padded = np.pad(pixels, [(0, 0), (0, 1), (0, 0)], mode="edge").astype(float)
    half = padded.reshape(261, 2, 151, 2, 3).mean((1, 3)).round()
    padded = np.pad(half, [(0, 1), (0, 1), (0, 0)], mode="edge")
    quarter = padded.reshape(131, 2, 76, 2, 3).mean((1, 3)).round()
    with tifffile.TiffFile(tmp_path / "a.tif") as file, Image.open(tmp_path / "a.tif") as found:
        assert [page.subfiletype for page in file.pages] == [0, 1, 1]
        assert [level.shape for level in file.series[0].levels] == [
            (522, 301, 3), (261, 151, 3), (131, 76, 3)
        ]  # fmt: skip
        for n, level in enumerate((pixels, half, quarter)):
            found.seek(n)
            assert np.array_equal(np.array(found), level)
            assert np.array_equal(file.pages[n].asarray(), level)
            assert found.info["icc_profile"] == info.icc_profile
    again, kept = read_image(tmp_path / "a.tif")
    assert torch.equal(again, image)
    tags = Image.Exif()
    tags.load(kept.metadata.exif or b"")
    assert (tags[0x010F], tags.get_ifd(0x8769)[0x9003]) == ("Camera", TAKEN)
    assert [path.name for path in tmp_path.glob("*.tif*")] == ["a.tif"]
    with pytest.raises(ImageError, match=r"a\.png: expected \.tif for a pyramid"):
        write_image(tmp_path / "a.png", image, pyramid=True)


def test_colours_of_invisible_pixels_are_in_no_mean(tmp_path):
    image = torch.zeros(1, 2, 258, 4)
    image[..., 3] = torch.tensor([1.0, 0.0]).repeat(129)
    image[:, :, ::2, 0] = 0.4
    write_image(tmp_path / "a.tif", image, pyramid=True)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert np.array_equal(np.unique(file.pages[1].asarray(), axis=1), [[[102, 0, 0, 128]]])


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
