"""Conversion of a checkpoint to .safetensors, under the release's key names.

The file is written tensor by tensor in the safetensors format (an eight-byte length, a JSON header,
the data without gaps), so that a conversion needs the memory of one tensor, not of all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..network.config import DTYPES
from ..whole_files import whole_file
from .checkpoint import SAFETENSORS_DTYPES, Checkpoint, CheckpointError, open_checkpoint
from .load import check, read_config
from .names import CLIP_PREFIX, release_shapes

FORMAT_VERSION = "1"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Contents:
    """What of a checkpoint is converted."""

    network: str
    """Short name, which the keys of the metadata begin with."""
    config: Any
    """A dataclass."""
    kept: list[str]
    """Keys of the tensors that are written."""
    unknown: list[str]
    """Keys that no network uses and the release does not save either."""


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did."""

    target: Path
    config: Any
    tensors: int
    """Tensors written."""
    size: int
    """Bytes written."""
    dropped: list[str]
    """Keys of the source that no network uses."""
    unknown: list[str]
    """Those among them that the release does not save either."""
    source_sha256: str


def infdit_contents(checkpoint: Checkpoint) -> Contents:
    """The network and the CLIP tower of an Inf-DiT.

    Raises:
        CheckpointError: not a complete Inf-DiT checkpoint.
    """
    config = read_config(checkpoint)
    unknown = check(checkpoint, config)
    needed = release_shapes(config)
    kept = [key for key in checkpoint.shapes if key in needed or key.startswith(CLIP_PREFIX)]
    return Contents("infdit", config, kept, unknown)


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    contents: Callable[[Checkpoint], Contents] = infdit_contents,
) -> ConvertReport:
    """Write what a network needs of a checkpoint to a .safetensors file.

    The target appears whole or not at all.

    Args:
        source: a file that `open_checkpoint` reads.
        target: ends in .safetensors.
        dtype: of the floating-point tensors written, one of DTYPES; None keeps theirs.
        overwrite: whether an existing target may be replaced.
        contents: insists on a complete network, and says what is written.

    Raises:
        CheckpointError: the source is unusable, the target exists or cannot be written, the disk is
            too small, or a value does not fit the dtype.
        ValueError: another dtype.
    """
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype: expected None or one of {(*DTYPES.values(),)}, got {dtype}")
    source, target = Path(source), Path(target)
    with open_checkpoint(source) as checkpoint:
        found = contents(checkpoint)
        _check_target(source, target, overwrite)
        dtypes = {key: _target_dtype(checkpoint.dtypes[key], dtype) for key in found.kept}
        # Widest first keeps every tensor aligned.
        kept = sorted(found.kept, key=lambda key: (-dtypes[key].itemsize, key))
        sha256 = _sha256(source)
        about = {
            "format_version": FORMAT_VERSION,
            "config": json.dumps(asdict(found.config)),
            "dtype": ", ".join(sorted({str(d).split(".")[1] for d in dtypes.values()})),
            "source": source.name,
            "source_sha256": sha256,
        }
        metadata = {**checkpoint.metadata, "format": "pt"}
        metadata |= {f"{found.network}.{name}": value for name, value in about.items()}
        header, size = _header(
            {key: (dtypes[key], checkpoint.shapes[key]) for key in kept}, metadata
        )
        _check_space(target, size)
        try:
            with whole_file(target, overwrite=overwrite) as file:
                file.write(header)
                for key in kept:
                    tensor = _cast(key, checkpoint.tensor(key), dtypes[key])
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        dropped = [key for key in checkpoint.shapes if key not in dtypes]
    return ConvertReport(target, found.config, len(kept), size, dropped, found.unknown, sha256)


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target.name}: expected a target name that ends in .safetensors")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder; expected one to write to")
    if target.resolve() == source.resolve():
        raise CheckpointError(f"{target.name} is the source itself; expected another target name")
    if target.exists() and not (overwrite and target.is_file()):
        raise CheckpointError(f"{target} already exists; expected a new name or overwrite=True")


def _check_space(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise CheckpointError(
            f"{target.name} needs {size / 2**20:.1f} MiB of disk space; "
            f"{free / 2**20:.1f} MiB are free in {target.parent}"
        )


def _target_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _header(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """The header of a safetensors file with its length, and the size of the whole file in bytes."""
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, len(header) + end


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if cast is not tensor and cast.isinf().any() and not tensor.isinf().any():
        raise CheckpointError(
            f"{key} has values up to {tensor.abs().max().item():.3g}, "
            f"too large for {dtype}: expected float32 or bfloat16 as the target dtype"
        )
    return cast
