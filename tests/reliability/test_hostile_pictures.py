"""Pictures that are too large, or no pictures at all, are refused before they do harm."""

import io
import sys
import zlib

import pytest
from PIL import Image

from infdit_core.memory import host as host_memory
from infdit_core.pictures import png as png_format
from infdit_core.pictures.files import ImageError, read_image
from tests.reliability import fuzz, hostile_pictures

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
%%EndComments
(executed) (w) file closefile
showpage
%%EOF
"""


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory):
    fuzz.warm_up(tmp_path_factory.mktemp("warm"))


@pytest.fixture
def refused(tmp_path):
    def read(data: bytes) -> str:
        path = tmp_path / "a.png"
        path.write_bytes(data)
        message = fuzz.attempt(read_image, path, ImageError)
        assert message is not None
        assert [found.name for found in tmp_path.iterdir()] == ["a.png"]
        return message

    return read


def png(width: int, height: int, depth: int, chunks: bytes = b"") -> bytes:
    pixels = hostile_pictures.chunk(b"IDAT", zlib.compress(bytes(1000)))
    end = hostile_pictures.chunk(b"IEND", b"")
    return hostile_pictures.png_header(width, height, depth) + chunks + pixels + end


def test_whole_pictures_are_read(tmp_path):
    for name, data in hostile_pictures.pictures().items():
        path = tmp_path / name
        path.write_bytes(data)
        assert fuzz.attempt(read_image, path, ImageError) is None


def test_only_formats_that_decode_are_opened(refused):
    """Pillow hands EPS to Ghostscript, a program that runs what the file says."""
    assert Image.open(io.BytesIO(EPS)).format == "EPS"
    assert "cannot be read as a picture: expected a picture as JPEG, WEBP, TIFF" in refused(EPS)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_picture_larger_than_the_memory_is_not_decoded(refused, monkeypatch, depth):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1e9)
    monkeypatch.setattr(png_format, "_decode", None)
    assert refused(png(9000, 9500, depth)) == (
        "a.png is too large to read: 9000×9500 px need at least 1.0 GB of RAM; 1.0 GB are"
        " free. Expected a smaller picture"
    )


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("side", [100_000, 2**31 - 1])
def test_declared_sizes_that_nobody_means(refused, monkeypatch, side, depth):
    monkeypatch.setattr(png_format, "_decode", None)
    assert "a.png is too large to read: " in refused(png(side, side, depth))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_texts_are_not_unpacked_at_large(tmp_path, caplog, kind):
    prefix = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
    packed = zlib.compress(bytes(300_000_000))
    bomb = hostile_pictures.chunk(kind, prefix + packed)
    (tmp_path / "a.png").write_bytes(png(9, 9, 8, bomb))
    with fuzz.bounded_memory():
        assert fuzz.attempt(read_image, tmp_path / "a.png", ImageError) is None
    assert f"its {kind.decode()} is damaged and left out: expected at most" in caplog.text
