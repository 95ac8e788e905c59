"""Picture files straight from their specifications, and what Pillow cannot write."""

import struct
import zlib

import numpy as np
from hypothesis import Phase, settings
from PIL import Image

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
TAKEN = "2020:01:02 03:04:05"


def drawn(examples: int) -> settings:
    """The same examples in every run; a failing one is shown as it was drawn."""
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=phases
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file, with a right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: np.ndarray,
    interlaced: bool = False,
    chunks: bytes = b"",
    bits: int = 0,
    palette: np.ndarray | None = None,
) -> bytes:
    """Encode (H, W, C) pixels; with a palette, (H, W, 1) indices into its (N, 3) colours.

    Args:
        bits: per channel; those of the pixels' type if 0.
    """
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    bits = bits or 8 * pixels.itemsize
    if palette is not None:
        colour_type, chunks = 3, chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunks
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    passes = [pixels[y::down, x::right] for x, y, right, down in ADAM7] if interlaced else [pixels]
    rows = (row for part in passes if part.size for row in part)
    packed = zlib.compress(b"".join(b"\0" + packed_bits(row.ravel(), bits) for row in rows))
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def packed_bits(row: np.ndarray, bits: int) -> bytes:
    """Values of a row side by side, the first in the highest bits."""
    if bits >= 8:
        return row.astype(f">u{bits // 8}").tobytes()
    places = np.arange(bits - 1, -1, -1, dtype=row.dtype)
    return np.packbits((row[:, None] >> places & 1).astype(np.uint8)).tobytes()


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as a viewer shows pixels that lie in a file with an EXIF orientation."""
    turns = {3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}.get(orientation, 0)
    mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    return np.rot90(mirrored, turns)


def exif(orientation: int = 6) -> Image.Exif:
    """EXIF with what is kept and what is not."""
    found = Image.Exif()
    found[0x010F], found[0x8298], found[0x0112] = "Camera", "Somebody", orientation
    found[0x011A] = 72.0  # resolution, which is another afterwards
    found.get_ifd(0x8769).update({0x9003: TAKEN, 0xA002: 11, 0x927C: b"maker's"})
    found.get_ifd(0x8825).update({1: "N", 2: (47.0, 1.0, 2.0)})
    return found


def ink_profile(corners: np.ndarray) -> bytes:
    """A profile for CMYK: a table of Lab for 16 corners, (2, 2, 2, 2, 3) in 0..100 and -128..127.

    The table's axes are cyan, magenta, yellow, black. ICC.1:2022, tags of version 2 (lut8Type).
    """
    lab = np.stack(
        [corners[..., 0] * 255 / 100, corners[..., 1] + 128, corners[..., 2] + 128], axis=-1
    )
    ramp = bytes(range(256))
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = struct.pack(">4sIBBBB", b"mft1", 0, 4, 3, 2, 0) + unit + ramp * 4
    table += lab.round().clip(0, 255).astype(np.uint8).tobytes() + ramp * 3
    white = struct.pack(">4sI3i", b"XYZ ", 0, 63190, 65536, 54061)
    text = struct.pack(">4sII", b"desc", 0, 4) + b"ink\0" + bytes(78)
    words = struct.pack(">4sI", b"text", 0) + b"none\0"
    tags = {b"desc": text, b"cprt": words, b"wtpt": white, b"A2B0": table}
    at = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        directory += struct.pack(">4sII", name, at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02100000, b"prtr", b"CMYK", b"Lab ",
                       bytes(12), b"acsp")  # fmt: skip
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + directory + body
