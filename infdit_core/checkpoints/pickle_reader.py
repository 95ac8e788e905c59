"""Where the tensors of a `torch.save` file lie, read without building a single pickled object.

A pickle is a program. Python's own unpickler runs it, and even a restricted one still calls
whatever it lets through, sets attributes on it and allocates what the pickle declares. Here the
opcodes (as `pickletools` decodes them) move only plain containers, strings, numbers and the three
record types below; everything else becomes `OPAQUE`. Nothing is imported, called or instantiated.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

MAX_PICKLE_BYTES = 64 * 2**20
MAX_PICKLE_OPCODES = 500_000  # an SDXL checkpoint has 0.1 million; these take half a second
MAX_DIRECTORY_BYTES = 4 * 2**20  # of the archive: the released model has 0.1 MB
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**62  # shapes beyond overflow inside PyTorch
MAX_SHARING = 8  # all tensors together against the file: more means one storage sold many times
_MAX_BITS = 128
_MAX_REASON = 200
MAX_NAME = 512  # characters of a tensor's name, which messages show

OPAQUE = object()
"""Stands for every object that a pickle asks for and that is not part of a tensor."""

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Global:
    """The name of a class or function, never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class StorageRef:
    """A run of `numel` elements in the archive's entry `data/<key>`."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; offset and strides in elements, as the file declares them."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class TensorSlice:
    """Where a tensor lies in a file: `count` elements of `dtype` from byte `start`, strided."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    count: int


def read_index(path: Path) -> dict[str, TensorSlice]:
    """The tensors of the state dict in a zip-format `torch.save` file.

    The state dict is the entry `module` (DeepSpeed), `state_dict` or `model` of the pickled
    dictionary, or that dictionary itself.

    Raises:
        ValueError: the archive is damaged or holds something else; the message says what.
    """
    try:
        with _DirectoryFile(path) as directory, zipfile.ZipFile(directory) as archive:
            entries = {info.filename: info for info in archive.infolist()}
        with path.open("rb") as file:
            return _read_archive(entries, file)
    except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"the archive is truncated or damaged ({error}); "
            "expected a whole torch.save file: copy or download it again"
        ) from error


def read_pickle(data: bytes) -> object:
    """The plain containers, strings, numbers and records that a pickle describes.

    Raises:
        ValueError: not a pickle, or one that is too long.
    """
    try:
        return _interpret(data)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        reason = str(error)[:_MAX_REASON]  # pickletools cites the pickle itself
        raise ValueError(f"its pickle cannot be read: {reason}") from error


def _interpret(data: bytes) -> object:
    stack: list = []
    outer: list[list] = []  # the stacks below each open MARK
    memo: dict[object, object] = {}

    def pop_mark() -> list:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if count == MAX_PICKLE_OPCODES:
            raise ValueError(f"more than {MAX_PICKLE_OPCODES} opcodes")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "POP":
                stack.pop() if stack else pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                items = pop_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = pop_mark()
                stack.append(items)
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS":
                items = pop_mark()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = pop_mark()
                stack.append({})
                _update(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                items = pop_mark()
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(Global(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                named = isinstance(module, str) and isinstance(name, str)
                stack.append(Global(module, name) if named else OPAQUE)
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, args))
            case "BUILD":
                stack.pop()  # attributes of an object: never set
            case _ if arg is not None and opcode.stack_after[0] is not pickletools.anyobject:
                # A number or a string. Arithmetic with a number of megabytes would never end.
                vast = isinstance(arg, int) and arg.bit_length() > _MAX_BITS
                stack.append(OPAQUE if vast else arg)
            case _:  # NEWOBJ, INST, OBJ, EXT*, sets, buffers, ...
                before = opcode.stack_before
                if pickletools.markobject in before:
                    pop_mark()
                    before = before[: before.index(pickletools.markobject)]
                for _ in before:
                    stack.pop()
                stack.extend(OPAQUE for _ in opcode.stack_after)
    raise ValueError("no STOP opcode")


def _extend(target: object, items: list) -> None:
    if isinstance(target, list):
        target.extend(items)


def _update(target: object, items: list) -> None:
    """Set alternating keys and values. Hashing another kind of key could take for ever."""
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, str))


def _storage(persistent_id: object) -> object:
    match persistent_id:
        case ("storage", Global("torch", kind), str(key), str(), int(numel)):
            if kind in STORAGE_DTYPES:
                return StorageRef(STORAGE_DTYPES[kind], key, numel)
    return OPAQUE


def _reduce(function: object, args: object) -> object:
    match function, args:
        case (
            Global("torch._utils", "_rebuild_tensor_v2"),
            (StorageRef() as storage, int(offset), tuple(shape), tuple(stride), *_),
        ) if all(isinstance(n, int) for n in (*shape, *stride)):
            return TensorRef(storage, offset, shape, stride)
        case (
            Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"),
            (TensorRef() as tensor, *_),
        ):
            return tensor
        case Global("collections", "OrderedDict"), ():
            return {}
    return OPAQUE


class _DirectoryFile(io.FileIO):
    """For `zipfile`, which takes the size of the directory from the file and allocates it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(
                f"a directory of {size} bytes; expected at most {MAX_DIRECTORY_BYTES}"
            )
        return super().read(-1 if size is None else size)


def require_name(key: str) -> None:
    """Refuse a tensor's name that no message could show as it is.

    Raises:
        ValueError: longer than 512 characters, or with control characters.
    """
    if len(key) > MAX_NAME or not key.isprintable():
        raise ValueError(
            f"a tensor's name has {len(key)} characters and begins with {key[:40]!r};"
            f" expected at most {MAX_NAME} printable ones"
        )


def _read_archive(entries: dict[str, zipfile.ZipInfo], file: IO[bytes]) -> dict[str, TensorSlice]:
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        some = ", ".join(f"{name[:60]!a}" for name in list(entries)[:3])
        raise ValueError(
            f"a zip archive of {len(entries)} entries ({some}, ...) with {len(pickles)} "
            "entries named data.pkl; expected exactly one, as torch.save writes"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise ValueError("a TorchScript program; expected a state dict saved with torch.save")
    order = entries.get(f"{folder}byteorder")
    if order is not None and _read_stored(file, order, limit=16).strip() != b"little":
        raise ValueError("its tensors are big-endian; expected little-endian")
    content = read_pickle(_read_stored(file, entries[pickles[0]], MAX_PICKLE_BYTES))

    index: dict[str, TensorSlice] = {}
    for key, ref in _state_dict(content).items():
        require_name(key)
        entry = entries.get(f"{folder}data/{ref.storage.key}")
        if entry is None:
            raise ValueError(f"the data of tensor {key} is missing from the archive")
        index[key] = _locate(key, ref, _stored_range(file, entry))
    size = file.seek(0, io.SEEK_END)
    total = sum(math.prod(at.shape) * at.dtype.itemsize for at in index.values())
    if total > MAX_SHARING * size:
        raise ValueError(f"its tensors claim {total} bytes in a file of {size}")
    return index


def _state_dict(content: object) -> dict[str, TensorRef]:
    if not isinstance(content, dict):
        raise ValueError("its pickle holds no dictionary; expected a state dict")
    for candidate in (content.get("module"), content.get("state_dict"), content.get("model")):
        if isinstance(candidate, dict) and (tensors := _tensors(candidate)):
            return tensors
    return _tensors(content)


def _tensors(mapping: dict) -> dict[str, TensorRef]:
    return {key: value for key, value in mapping.items() if isinstance(value, TensorRef)}


def _require_stored(entry: zipfile.ZipInfo) -> None:
    encrypted = entry.flag_bits & 1
    if entry.compress_type != zipfile.ZIP_STORED or encrypted or entry.is_dir():
        raise ValueError(
            f"its entry {entry.filename[:60]!a} is compressed or encrypted; "
            "expected the uncompressed archive that torch.save writes"
        )


def _read_stored(file: IO[bytes], entry: zipfile.ZipInfo, limit: int) -> bytes:
    data = _stored_range(file, entry)
    if len(data) > limit:
        raise ValueError(
            f"its entry {entry.filename[:60]!a} has {len(data)} bytes; expected at most {limit}"
        )
    file.seek(data.start)
    content = file.read(len(data))
    if zlib.crc32(content) != entry.CRC:
        raise ValueError(f"its entry {entry.filename[:60]!a} is damaged: the checksum differs")
    return content


def _stored_range(file: IO[bytes], entry: zipfile.ZipInfo) -> range:
    """The bytes of an entry in the file. Only its local header knows where they begin."""
    _require_stored(entry)
    file.seek(entry.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    start = file.tell() + name_length + extra_length
    if signature != b"PK\x03\x04" or start + entry.file_size > file.seek(0, 2):
        raise ValueError(
            f"its entry {entry.filename[:60]!a} lies outside the file: truncated or damaged"
        )
    return range(start, start + entry.file_size)


def _locate(key: str, ref: TensorRef, data: range) -> TensorSlice:
    """Check that a tensor lies inside the bytes of its storage."""
    itemsize = ref.storage.dtype.itemsize
    available = min(ref.storage.numel, len(data) // itemsize)
    if not _fits(ref, available):
        raise ValueError(
            f"tensor {key} of shape {ref.shape} and strides {ref.stride} at offset {ref.offset} "
            f"does not fit its storage of {available} elements"
        )
    start = data.start + ref.offset * itemsize
    return TensorSlice(ref.storage.dtype, ref.shape, ref.stride, start, _extent(ref))


def _fits(ref: TensorRef, available: int) -> bool:
    return (
        len(ref.shape) == len(ref.stride) <= MAX_DIMENSIONS
        and min((ref.offset, *ref.shape, *ref.stride)) >= 0
        and max((0, *ref.shape, *ref.stride)) < MAX_ELEMENTS
        and math.prod(max(n, 1) for n in ref.shape) < MAX_ELEMENTS
        and math.prod(ref.shape) <= available  # no expanded tensor: tiny here, huge once copied
        and ref.offset + _extent(ref) <= available
    )


def _extent(ref: TensorRef) -> int:
    """Elements from the first to the last of a strided tensor."""
    if 0 in ref.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
