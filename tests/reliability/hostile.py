"""Checkpoints that nobody should be able to do harm with, made from whole ones by chance.

`checkpoint(random)` returns what was done and the bytes. The same `Random` gives the same file, so
an input is named by its seed.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random

import torch
from safetensors.torch import save

from tests.goldens import TINY, random_tensors

SMALLEST = replace(TINY, hidden_size=4, num_heads=1, block_patches=2, mlp_size=4, time_features=2)
"""A whole Inf-DiT in a few kilobytes."""

HUGE = (-1, 0, 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**200)
NAMES = ("../evil", "/etc/evil", "..\\evil", "a/../../evil", "con", "\x1b[2J", "\u202e", "n" * 999)
DTYPES = ("F64", "F16", "I64", "U64", "F4", "C64", "BOOL", "f32", "", None, 7, ["F32"])
DEEP = 3000

# What a pickle can call by, each with the command to run in place of {command}.
CALLS = {
    "GLOBAL REDUCE": b"cos\nsystem\n(V{command}\ntR",
    "GLOBAL BINUNICODE REDUCE": b"cposix\nsystem\nX\x07\x00\x00\x00{command}\x85R",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93(V{command}\ntR",
    "INST": b"(V{command}\nios\nsystem\n",
    "OBJ": b"(cos\nsystem\nV{command}\no",
    "NEWOBJ": b"csubprocess\nPopen\n(V{command}\nt\x81",
    "NEWOBJ_EX": b"csubprocess\nPopen\n(V{command}\nt}\x92",
    "SETITEM": b"cos\nenviron\nVINFDIT_EVIL\nVa\ns",
    "SETITEMS": b"cos\nenviron\n(VINFDIT_EVIL\nVa\nu",
    "APPEND": b"csys\npath\nVevil\na",
    "APPENDS": b"csys\npath\n(Vevil\ne",
    "BUILD": b"ctypes\nSimpleNamespace\n)\x81}Va\nVb\nsb",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pos.system\n",
    "BINPERSID": b"cos\nsystem\nQ",
    "eval": b"cbuiltins\neval\n(V__import__('os').system('{command}')\ntR",
    "torch.load": b"ctorch\nload\n(V{command}\ntR",
    "hub": b"ctorch.hub\nload\n(V{command}\nVa\ntR",
    "rebuild from numpy": b"cnumpy\nfromfile\n(V{command}\ntR",
    "setattr": b"cbuiltins\nsetattr\n(cos\nsep\nVa\nVb\ntR",
}


@cache
def whole_safetensors() -> bytes:
    return save(random_tensors(SMALLEST), metadata={"format": "pt"})


@cache
def whole_pt() -> bytes:
    buffer = io.BytesIO()
    torch.save({"module": random_tensors(SMALLEST)}, buffer)
    return buffer.getvalue()


@cache
def entries() -> dict[str, bytes]:
    """The files in the archive of `whole_pt`."""
    with zipfile.ZipFile(io.BytesIO(whole_pt())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    """The whole archive with another pickle."""
    return archive_of({k: data if k.endswith("data.pkl") else v for k, v in entries().items()})


def original_pickle() -> bytes:
    return next(data for name, data in entries().items() if name.endswith("data.pkl"))


def planted(payload: bytes) -> bytes:
    """The whole pickle with one more entry, which `payload` pushes, in its dictionary."""
    return original_pickle()[:-1] + b"Vevil\n" + payload + b"s."


def with_header(header: object, data: bytes | None = None) -> bytes:
    """A .safetensors file with a header, given as bytes or as what JSON can hold."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (_data() if data is None else data)


def _header() -> dict:
    whole = whole_safetensors()
    return json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])


def _data() -> bytes:
    whole = whole_safetensors()
    return whole[8 + int.from_bytes(whole[:8], "little") :]


def truncated(random: Random, whole: bytes) -> bytes:
    """The beginning of a file."""
    return whole[: random.randrange(len(whole))]


def flipped(random: Random, whole: bytes) -> bytes:
    """Some bits, mostly near the ends, where the formats keep what they know."""
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        near = min(len(data), random.choice((64, 4096, len(data))))
        at = random.randrange(near)
        data[at if random.random() < 0.6 else -1 - at] ^= 1 << random.randrange(8)
    return bytes(data)


def spliced(random: Random, whole: bytes) -> bytes:
    """A run cut out, doubled, or replaced by noise."""
    start = random.randrange(len(whole))
    end = min(len(whole), start + random.choice((1, 4, 30, 500)))
    middle = random.choice((b"", whole[start:end] * 2, random.randbytes(end - start)))
    return whole[:start] + middle + whole[end:]


def _number(random: Random) -> object:
    return random.choice((*HUGE, 1.5, 1e308, "4", None, [], {}))


def _safetensors_header(random: Random) -> bytes:
    """A header that lies about a tensor."""
    header = _header()
    for _ in range(random.choice((1, 1, 3))):
        key = random.choice(list(header))
        entry = header[key]
        if not isinstance(entry, dict) or "shape" not in entry:
            header[key] = random.choice(({"a": 1}, [], "x", {"format": "n" * 9999}, None))
            continue
        match random.randrange(8):
            case 0:
                entry["dtype"] = random.choice(DTYPES)
            case 1:
                shape = entry["shape"] or [1]
                shape[random.randrange(len(shape))] = _number(random)
            case 2:
                entry["shape"] = [_number(random) for _ in range(random.choice((0, 1, 4, 70)))]
            case 3:
                entry["data_offsets"][random.randrange(2)] = _number(random)
            case 4:
                entry["data_offsets"].reverse()
            case 5:
                other = header[random.choice(list(header))]
                entry["data_offsets"] = other.get("data_offsets", [0, 0])
            case 6:
                header[random.choice(NAMES)] = header.pop(key)
            case 7:
                del header[key]
    return with_header(header)


def _safetensors_frame(random: Random) -> bytes:
    """A header that lies about itself."""
    text = json.dumps(_header()).encode()
    match random.randrange(4):
        case 0:
            length = random.choice([n for n in HUGE if 0 <= n < 2**64])
            return struct.pack("<Q", length) + text + _data()
        case 1:
            return with_header(b"[" * DEEP + b"]" * DEEP)
        case 2:
            return with_header(b'{"a":' * DEEP + b"1" + b"}" * DEEP)
    return with_header(flipped(random, text))


def _program(random: Random) -> bytes:
    """A pickle of opcodes in any order with arguments that are well formed, mostly."""
    out = bytearray(b"\x80\x02" if random.random() < 0.5 else b"")
    for _ in range(random.choice((1, 5, 30, 200))):
        code = random.choice(pickletools.opcodes)
        out += code.code.encode("latin-1")
        if code.arg is None:
            continue
        size = code.arg.n
        if size >= 0:
            out += random.choice((bytes(size), random.randbytes(size), b"\x01" + bytes(size)[1:]))
        elif size == pickletools.UP_TO_NEWLINE:
            out += random.choice((b"os\n", b"1\n", b"'a'\n", b"os\nsystem\n", b"1L\n", b"\n"))
        else:
            width = {-2: 1, -3: 4, -4: 4, -5: 8}[size]
            text = random.choice((b"", b"os", b"system", random.randbytes(9)))
            length = len(text) if random.random() < 0.8 else random.choice((0, 255))
            out += length.to_bytes(width, "little") + text
    return with_pickle(bytes(out) + (b"." if random.random() < 0.9 else b""))


def _call(random: Random) -> bytes:
    payload = random.choice(list(CALLS.values())).replace(b"{command}", b"touch a")
    return with_pickle(random.choice((planted(payload), payload + b".")))


def _geometry(random: Random) -> bytes:
    """Tensors whose numbers are others."""
    data = original_pickle()
    numbers = [
        (at, opcode.name, arg)
        for opcode, arg, at in pickletools.genops(data)
        if opcode.name in ("BININT1", "BININT2", "BININT")
    ]
    for at, name, _ in sorted(random.sample(numbers, random.choice((1, 1, 4))), reverse=True):
        size = {"BININT1": 2, "BININT2": 3, "BININT": 5}[name]
        value = random.choice((*HUGE, random.randrange(300)))
        data = data[:at] + pickle.dumps(value, 2)[2:-1] + data[at + size :]
    return with_pickle(data)


def _names(random: Random) -> bytes:
    """Entries that want to lie elsewhere, twice, or compressed."""
    files = dict(entries())
    for _ in range(random.choice((1, 3))):
        name = random.choice(list(files))
        data = files.pop(name)
        new = random.choice((*NAMES, name + "/", name.upper(), name.split("/", 1)[-1]))
        files[new] = data
    return archive_of(files, random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _links(random: Random) -> bytes:
    """Entries that are symbolic links."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries().items():
            info = zipfile.ZipInfo(name)
            if random.random() < 0.2:
                info.create_system = 3
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                data = b"/etc/passwd"
            archive.writestr(info, data)
    return buffer.getvalue()


def _directory(random: Random) -> bytes:
    """A central directory whose numbers are others."""
    data = bytearray(whole_pt())
    record = data.rfind(b"PK\x05\x06")
    start = data.find(b"PK\x01\x02")
    places = [record + n for n in (8, 10, 12, 16, 20)] + [
        start + n for n in (8, 10, 16, 20, 24, 28, 30, 32, 42)
    ]
    for _ in range(random.choice((1, 2))):
        at, width = random.choice(places), random.choice((2, 4))
        value = random.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(data)))
        new = (value & (2 ** (8 * width) - 1)).to_bytes(width, "little")
        data[at : at + width] = new[: max(0, len(data) - at)]
    return bytes(data)


def _bomb(random: Random) -> bytes:
    """A compressed pickle, a thousand times larger unpacked."""
    files = dict(entries())
    name = next(n for n in files if n.endswith("data.pkl"))
    files[name] = b"N0" * random.choice((1000, 1_000_000)) + files[name]
    return archive_of(files, zipfile.ZIP_DEFLATED)


_CHECKPOINTS: dict[str, Callable[[Random], bytes]] = {
    "safetensors truncated": lambda r: truncated(r, whole_safetensors()),
    "safetensors flipped": lambda r: flipped(r, whole_safetensors()),
    "safetensors spliced": lambda r: spliced(r, whole_safetensors()),
    "safetensors header": _safetensors_header,
    "safetensors frame": _safetensors_frame,
    "pt truncated": lambda r: truncated(r, whole_pt()),
    "pt flipped": lambda r: flipped(r, whole_pt()),
    "pt spliced": lambda r: spliced(r, whole_pt()),
    "pt pickle flipped": lambda r: with_pickle(flipped(r, original_pickle())),
    "pt pickle spliced": lambda r: with_pickle(spliced(r, original_pickle())),
    "pt program": _program,
    "pt call": _call,
    "pt geometry": _geometry,
    "pt names": _names,
    "pt links": _links,
    "pt directory": _directory,
    "pt bomb": _bomb,
    "noise": lambda r: r.choice((b"", b"PK\x03\x04", b"\x08" + bytes(7) + b"{")) + r.randbytes(99),
}


def checkpoint(random: Random) -> tuple[str, bytes]:
    """What was done to a checkpoint, and the file."""
    kind = random.choice(list(_CHECKPOINTS))
    return kind, _CHECKPOINTS[kind](random)
