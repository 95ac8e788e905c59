"""Pictures that nobody should be able to do harm with, made as in `hostile`."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from infdit_core.pictures import png
from infdit_core.pictures.decoded import Colour
from tests.core.pictures.made import chunk
from tests.core.pictures.made import png as png_file
from tests.reliability.hostile import flipped, spliced, truncated

NUMBERS = (0, 1, 2, 255, 3000, 16383, 65535, 2**17, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
BOMB_BYTES = 50_000_000
_TURNED = (274, 3, 1, 6, True)
_TIFFS: list[tuple[type, dict[str, Any]]] = [
    (np.uint16, {"rowsperstrip": 4}),
    (np.uint16, {"compression": "lzw", "predictor": True}),
    (np.uint16, {"compression": "zlib", "predictor": True, "bigtiff": True}),
    (np.uint16, {"compression": "packbits", "tile": (16, 16), "byteorder": ">"}),
    (np.uint16, {"compression": "zstd", "bigtiff": True, "byteorder": ">"}),
    (np.float32, {"compression": "lzma", "planarconfig": "separate"}),
    (np.uint8, {"compression": "jpeg"}),
]
"""Kinds of pixels, and options of tifffile."""


@cache
def pictures() -> dict[str, bytes]:
    """Whole files of every kind that is read, each with an orientation and a profile."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    made = {}
    kinds = "PNG RGBA, PNG P, TIFF P, TIFF CMYK, JPEG RGB, WEBP RGBA, BMP RGB, GIF P"
    for kind, mode in (name.split() for name in kinds.split(", ")):
        buffer = io.BytesIO()
        compression = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(pixels).convert("RGB").convert(mode)
        picture.save(buffer, kind, exif=exif, icc_profile=bytes(200), **compression)
        made[f"{kind} {mode}"] = buffer.getvalue()
    buffer = io.BytesIO()
    png.write(buffer, pixels.astype(np.uint16) * 257, Colour())
    made["PNG 16"] = buffer.getvalue()
    made["PNG interlaced"] = png_file(pixels[..., :1] % 4, True, bits=2)
    made["AVIF 10"] = imagecodecs.avif_encode(pixels[..., :3].astype(np.uint16), bitspersample=10)
    for n, (dtype, options) in enumerate(_TIFFS):
        buffer = io.BytesIO()
        deep = (pixels[..., :3] // (255 if dtype == np.float32 else 1)).astype(dtype)
        if "planarconfig" in options:
            deep = np.moveaxis(deep, -1, 0)
        tifffile.imwrite(buffer, deep, photometric="rgb", extratags=[_TURNED], **options)
        made[f"TIFF {n}"] = buffer.getvalue()
    return made


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


def _numbers(data: bytes) -> list[tuple[int, str]]:
    """Where a file says how large it is and where its parts lie, and how as in `struct`."""
    if data.startswith(b"GIF"):
        frame = data.index(b"\x2c")
        return [(at, "<H") for at in (6, 8, frame + 1, frame + 3, frame + 5, frame + 7)]
    if data.startswith(b"BM"):
        return [(at, "<I") for at in (2, 10, 14, 18, 22, 28, 30, 34, 46)]
    if data.startswith(b"RIFF"):
        frame = data.index(b"VP8 ")
        extended = [(4, "<I"), (16, "<I"), (24, "<H"), (27, "<H")]
        return [*extended, (frame + 4, "<I"), (frame + 14, "<H"), (frame + 16, "<H")]
    if data.startswith(b"\xff\xd8"):
        frame = data.index(b"\xff\xc0")
        return [(frame + at, ">H") for at in (2, 5, 7)]
    if data[4:8] == b"ftyp":
        sizes = data.index(b"ispe") + 8
        return [(sizes, ">I"), (sizes + 4, ">I"), *((at, ">I") for at in range(0, sizes, 4))]
    order = "<" if data.startswith(b"II") else ">"
    if 43 in data[2:4]:
        (directory,) = struct.unpack_from(f"{order}Q", data, 8)
        (count,) = struct.unpack_from(f"{order}Q", data, directory)
        first, step, parts, kind = directory + 8, 20, (4, 12), f"{order}Q"
    else:
        (directory,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, directory)
        first, step, parts, kind = directory + 2, 12, (4, 8), f"{order}I"
    entries = range(first, first + step * count, step)
    kinds = [(at, f"{order}H") for at in entries] + [(at + 2, f"{order}H") for at in entries]
    return [*kinds, *((at + part, kind) for at in entries for part in parts)]


def misnumbered(random: Random, whole: bytes) -> bytes:
    """Sizes and places that are others, mostly huge ones."""
    if whole.startswith(b"\x89PNG"):
        sizes = random.choice(NUMBERS), random.choice((*NUMBERS, 9))
        depth, colour = whole[24], whole[25]
        if random.random() < 0.2:
            depth, colour = random.choice((1, 8, 16)), random.choice((0, 2, 3, 4, 6))
        return png_header(*sizes, depth, colour) + whole[33:]
    data = bytearray(whole)
    places = _numbers(whole)
    for at, how in random.sample(places, random.choice((1, 1, 2, 3))):
        limit = 256 ** struct.calcsize(how) - 1
        struct.pack_into(how, data, at, min(limit, random.choice(NUMBERS)))
    return bytes(data)


def bomb(random: Random) -> bytes:
    """A PNG file whose pixels or texts are a thousand times larger than the file."""
    side = random.choice((3000, 13000, 65535, 2**17, 2**20))
    width, height = random.choice(((side, side), (1, side), (side, 1)))
    depth = random.choice((8, 16))
    where = random.choice(("IDAT", "zTXt", "iCCP", "iTXt"))
    zeros = _zeros()
    parts = {
        "IDAT": b"",
        "zTXt": chunk(b"zTXt", b"a\0\0" + zeros),
        "iCCP": chunk(b"iCCP", b"a\0\0" + zeros),
        "iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
    }
    pixels = chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return png_header(width, height, depth) + parts[where] + pixels


@cache
def _zeros() -> bytes:
    return zlib.compress(bytes(BOMB_BYTES), 9)


_DAMAGE: tuple[Callable[[Random, bytes], bytes], ...]
_DAMAGE = truncated, flipped, spliced, misnumbered


def picture(random: Random) -> tuple[str, bytes]:
    """What was done to a picture, and the file."""
    if random.random() < 0.02:
        return "PNG bomb", bomb(random)
    kind = random.choice(list(pictures()))
    how = random.choice(_DAMAGE)
    return f"{kind} {how.__name__}", how(random, pictures()[kind])
