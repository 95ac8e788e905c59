"""Checkpoint files, whatever network they are of: opened lazily, tensors read when asked for."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InfDiTError
from .foreign import describe_bytes, is_text
from .pickle_reader import TensorSlice, read_index, require_name

EXPECTED = "expected a .safetensors file, or a .pt file that torch.save wrote"
MAX_LISTED = 20
"""Tensors that a message names."""
_MAX_HEADER_BYTES = 4 * 2**20  # of a .safetensors file: the released model's has 0.1 MB

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(InfDiTError):
    """A file that cannot be used; the message says which, what was expected and what it got."""


class Checkpoint:
    """The tensors of a file, each read when asked for. Made by `open_checkpoint`.

    Leaving the `with` block (or `close`) lets go of the file. Tensors already read stay valid: they
    may be views of a private memory map, which goes with the last of them.

    Attributes:
        path: the file.
        shapes, dtypes: by key, for every tensor of the state dict.
        metadata: text that a .safetensors file carries; empty for others.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self.metadata = dict(metadata or {})
        self._read: Callable[[str], Tensor] | None = read

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, on the CPU in the file's dtype."""
        if self._read is None:
            raise RuntimeError(f"{self.path.name} was closed before {key} was read")
        return self._read(key)

    def close(self) -> None:
        self._read = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .pt/.pth/.bin/.ckpt or .safetensors file; the content decides which it is.

    Nothing that a pickle names is imported or run, and no tensor is read yet.

    Raises:
        CheckpointError: no such file, or not one of these formats.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            # Opening a pipe waits for its other end.
            raise ValueError(f"it is a pipe or a device; {EXPECTED}")
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            return _open_torch(path)
        # A header of JSON follows the eight bytes of its length.
        if head[8:9] == b"{" or (path.suffix == ".safetensors" and head and not is_text(head)):
            return _open_safetensors(path, int.from_bytes(head[:8], "little"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {EXPECTED}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {EXPECTED}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    raise CheckpointError(f"{path.name} {describe_bytes(head)}; {EXPECTED}")


def require_tensors(
    checkpoint: Checkpoint, needed: Mapping[str, tuple[int, ...]], network: str
) -> list[str]:
    """Insist on every tensor of a network; return the keys that it does not have.

    Args:
        needed: shapes by key.
        network: what it is, for the message.

    Raises:
        CheckpointError: tensors are missing, or have another shape or an integer dtype. Lists them.
    """
    faults = []
    for key, expected in needed.items():
        if key not in checkpoint.shapes:
            faults.append(f"{key}: missing, expected shape {expected}")
        elif (shape := checkpoint.shapes[key]) != expected:
            faults.append(f"{key}: shape {shape}, expected {expected}")
        elif not (dtype := checkpoint.dtypes[key]).is_floating_point:
            faults.append(f"{key}: dtype {dtype}, expected floating point")
    if faults:
        more = len(faults) - MAX_LISTED
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(faults)} of the {len(needed)} tensors of {network} are"
            " missing or wrong:\n  "
            + "\n  ".join(faults[:MAX_LISTED])
            + (f"\n  ... and {more} more" if more > 0 else "")
        )
    return [key for key in checkpoint.shapes if key not in needed]


def _open_torch(path: Path) -> Checkpoint:
    index = read_index(path)
    with path.open("rb") as file:
        # Copy on write: a tensor changed in place never reaches the file.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return Checkpoint(
        path,
        {key: at.shape for key, at in index.items()},
        {key: at.dtype for key, at in index.items()},
        lambda key: _mapped_tensor(mapped, index[key]),
    )


def _mapped_tensor(mapped: mmap.mmap, at: TensorSlice) -> Tensor:
    """A view of the map, which lives as long as the view; a copy where the file is misaligned."""
    if at.count == 0:
        return torch.empty(at.shape, dtype=at.dtype)
    size = at.count * at.dtype.itemsize
    data = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=at.start)
    if at.start % at.dtype.itemsize:
        data = data.clone()
    return data.view(at.dtype).as_strided(at.shape, at.stride)


def _open_safetensors(path: Path, header_bytes: int) -> Checkpoint:
    if _MAX_HEADER_BYTES < header_bytes < path.stat().st_size:
        raise ValueError(
            f"its safetensors header has {header_bytes} bytes; expected at most {_MAX_HEADER_BYTES}"
        )
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"its safetensors header does not fit the file, which has {path.stat().st_size} bytes "
            f"({error}); expected a whole .safetensors file: copy or download it again"
        ) from error
    shapes, dtypes = {}, {}
    for key in file.keys():  # noqa: SIM118 - not a dict: iterating it is not supported
        view = file.get_slice(key)
        kind = view.get_dtype()
        require_name(key)
        if kind not in SAFETENSORS_DTYPES:
            raise ValueError(f"tensor {key} has dtype {kind}, expected a floating-point one")
        shapes[key], dtypes[key] = tuple(view.get_shape()), SAFETENSORS_DTYPES[kind]
    return Checkpoint(path, shapes, dtypes, file.get_tensor, file.metadata())
