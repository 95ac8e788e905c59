"""Inf-DiT checkpoint files: opened lazily, checked strictly, mapped to this package's modules.

The release's network loads with `strict=False`, and missing weights then give pure noise without
a word. Here every tensor of `InfDiTConfig.parameter_shapes` must be there with its shape.
"""

from __future__ import annotations

import codecs
import logging
import mmap
import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InfDiTError
from ..network.config import InfDiTConfig
from ..network.model import InfDiT
from .pickle_reader import TensorSlice, read_index, require_name

logger = logging.getLogger(__name__)

BUNDLED_FOLDER = Path(__file__).parents[2] / "models"
"""Where the small model lies that comes with the pack."""
EXPECTED = (
    "expected an Inf-DiT checkpoint: the release's mp_rank_00_model_states.pt (or another .pt "
    "file that torch.save wrote), or a .safetensors file"
)
CLIP_PREFIX = "image_encoder."
_CLIP_MODEL = CLIP_PREFIX + "model."
_MAX_LISTED = 20
_MAX_HEADER_BYTES = 4 * 2**20  # of a .safetensors file: the released model's has 0.1 MB
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6

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

_UNUSED = re.compile(
    r"mixins\.adaln_layer\.k_layer_norm\.\d+\.(weight|bias)"  # keys use q_layer_norm
    r"|mixins\.adaln_layer\.rope\.freqs_(cos|sin)"  # derived, 0.7 GB in fp32
    r"|transformer\.position_embeddings\.weight"
)

_FOREIGN = (
    (re.compile(r"lora_|\.lora\."), "a LoRA, which changes another model"),
    (re.compile(r"^model\.diffusion_model\."), "a Stable Diffusion checkpoint (SD, SDXL, ...)"),
    (re.compile(r"^(module\.)?visual\.|^text_model\.|^vision_model\."), "a CLIP model"),
)

_ADALN = "mixins.adaln_layer."
_LAYER = "transformer.layers.{n}."
_SEGMENTS = _ADALN + "re_pos_embed"  # (L, 4, A, d): one tensor for all layers, here one for each
_MODULATION = _ADALN + "adaLN_modulations.{n}.1.{leaf}"  # one for each layer, here one for all

MODULE_NAMES = {
    "mixins.patch_embed.proj": "patch_embed",
    "time_embed.mlp.0": "time_embed.mlp.0",
    "time_embed.mlp.2": "time_embed.mlp.2",
    "cond_embed.map_vector.0": "vector_embed.mlp.0",
    "cond_embed.map_vector.2": "vector_embed.mlp.2",
    _ADALN + "proj_lr": "lr_embed",
    _LAYER + "attention.query_key_value": "layers.{n}.attention.qkv",
    _LAYER + "attention.dense": "layers.{n}.attention.dense",
    _ADALN + "q_layer_norm.{n}": "layers.{n}.attention.qk_norm",
    _LAYER + "mlp.dense_h_to_4h": "layers.{n}.mlp.fc1",
    _LAYER + "mlp.dense_4h_to_h": "layers.{n}.mlp.fc2",
    _ADALN + "cross_attention.query": "cross_attention.query",
    _ADALN + "cross_attention.key_value": "cross_attention.key_value",
    _ADALN + "cross_attention.dense": "cross_attention.dense",
    _ADALN + "cross_q_ln": "cross_attention.query_norm",
    _ADALN + "cross_k_ln": "cross_attention.key_norm",
    _ADALN + "lr_query_position_embedding": "cross_attention.query_position",
    _ADALN + "lr_key_position_embedding": "cross_attention.key_position",
    _ADALN + "post_cross_attention_layernorm": "cross_attention.output_norm",
    "mixins.final_layer.adaLN_modulation.1": "final.modulation",
    "mixins.final_layer.linear": "final.linear",
}
"""Modules and bare parameters: the release's name to ours; `{n}` is the layer."""


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
        if head[8:9] == b"{" or (path.suffix == ".safetensors" and head and not _is_text(head)):
            return _open_safetensors(path, int.from_bytes(head[:8], "little"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {EXPECTED}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {EXPECTED}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    raise CheckpointError(f"{path.name} {_describe(head)}; {EXPECTED}")


def read_config(checkpoint: Checkpoint) -> InfDiTConfig:
    """The hyper-parameters that the shapes of a checkpoint fix.

    Raises:
        CheckpointError: some other kind of model, or sizes that contradict each other.
    """
    name, shapes = checkpoint.path.name, checkpoint.shapes
    if "mixins.patch_embed.proj.weight" not in shapes:
        raise CheckpointError(f"{name} {_describe_model(shapes)}; {EXPECTED}")
    try:
        config = InfDiTConfig.from_shapes(shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{name} has no tensor {error.args[0]}, which every Inf-DiT checkpoint has; "
            "the file is incomplete"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{name} is not a usable Inf-DiT checkpoint: {error}") from error
    if config.num_layers > len(shapes):
        raise CheckpointError(
            f"{name} claims {config.num_layers} layers with {len(shapes)} tensors in all"
        )
    return config


def check(checkpoint: Checkpoint, config: InfDiTConfig) -> list[str]:
    """Insist on every tensor of the network; return the keys that nothing is known about.

    Raises:
        CheckpointError: tensors are missing, or have another shape or an integer dtype. Lists them.
    """
    needed = config.parameter_shapes()
    faults = []
    for key, expected in needed.items():
        if key not in checkpoint.shapes:
            faults.append(f"{key}: missing, expected shape {expected}")
        elif (shape := checkpoint.shapes[key]) != expected:
            faults.append(f"{key}: shape {shape}, expected {expected}")
        elif not (dtype := checkpoint.dtypes[key]).is_floating_point:
            faults.append(f"{key}: dtype {dtype}, expected floating point")
    if faults:
        more = len(faults) - _MAX_LISTED
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(faults)} of the {len(needed)} tensors of an Inf-DiT "
            "of this size are missing or wrong:\n  "
            + "\n  ".join(faults[:_MAX_LISTED])
            + (f"\n  ... and {more} more" if more > 0 else "")
        )
    return [key for key in checkpoint.shapes if key not in needed and not is_known_extra(key)]


def is_known_extra(key: str) -> bool:
    """Whether the release saves this tensor although its network never uses it, or CLIP does."""
    return key.startswith(CLIP_PREFIX) or _UNUSED.fullmatch(key) is not None


def network_state_dict(checkpoint: Checkpoint, config: InfDiTConfig) -> dict[str, Tensor]:
    """The tensors of the network under the names of `InfDiT`; reads nothing else of the file."""
    state = {ours: checkpoint.tensor(key) for key, ours in _renames(config).items()}
    for n, segments in enumerate(checkpoint.tensor(_SEGMENTS)):
        state[_segment_name(n)] = segments
    for leaf, keys in _modulation_keys(config).items():
        state[f"modulations.{leaf}"] = torch.cat([checkpoint.tensor(key) for key in keys])
    return state


def release_state_dict(state_dict: Mapping[str, Tensor], config: InfDiTConfig) -> dict[str, Tensor]:
    """The inverse of `network_state_dict`: from the names of `InfDiT` to the release's."""
    state = {key: state_dict[ours] for key, ours in _renames(config).items()}
    segments = [state_dict[_segment_name(n)] for n in range(config.num_layers)]
    state[_SEGMENTS] = torch.stack(segments)
    for leaf, keys in _modulation_keys(config).items():
        parts = state_dict[f"modulations.{leaf}"].chunk(config.num_layers)
        state.update(zip(keys, parts, strict=True))
    return state


def clip_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The CLIP tower that came with the model, under open_clip's names; None where absent."""
    keys = [key for key in checkpoint.shapes if key.startswith(_CLIP_MODEL)]
    return {key.removeprefix(_CLIP_MODEL): checkpoint.tensor(key) for key in keys} or None


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> InfDiT:
    """Load a checkpoint for inference.

    On the CPU in the file's own dtype, the weights stay views of the memory-mapped file.

    Raises:
        CheckpointError: not a complete Inf-DiT checkpoint.
    """
    with open_checkpoint(path) as checkpoint:
        config = read_config(checkpoint)
        if unknown := check(checkpoint, config):
            logger.warning(
                "%s has %d tensors that Inf-DiT does not know: %s",
                checkpoint.path.name,
                len(unknown),
                ", ".join(unknown[:_MAX_LISTED]),
            )
        model = InfDiT(config, dtype=dtype, device="meta")
        state = network_state_dict(checkpoint, config)
        state = {key: tensor.to(device, dtype) for key, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _renames(config: InfDiTConfig) -> dict[str, str]:
    """The release's key to ours, for every tensor that has one counterpart."""
    modules = {
        release.format(n=n): ours.format(n=n)
        for release, ours in MODULE_NAMES.items()
        for n in range(config.num_layers)
    }
    several = {_SEGMENTS, *chain.from_iterable(_modulation_keys(config).values())}
    renames = {}
    for key in config.parameter_shapes():
        module, _, leaf = key.rpartition(".")
        if key not in several:
            renames[key] = modules[key] if key in modules else f"{modules[module]}.{leaf}"
    return renames


def _modulation_keys(config: InfDiTConfig) -> dict[str, list[str]]:
    """The release's weights and biases that make the modulations of all layers."""
    layers = range(config.num_layers)
    return {
        leaf: [_MODULATION.format(n=n, leaf=leaf) for n in layers] for leaf in ("weight", "bias")
    }


def _segment_name(layer: int) -> str:
    return f"layers.{layer}.attention.segment_embed"


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


def _is_text(head: bytes) -> bool:
    try:  # a character cut off at the end is no error to an incremental decoder
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)


def _describe(head: bytes) -> str:
    """What a file is that begins with `head` and is no checkpoint."""
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(_LEGACY_MAGIC):
        return (
            "is in the format of PyTorch before 1.6; load it and save it again with a newer "
            "PyTorch (torch.save)"
        )
    if _is_text(head):
        first = head.decode("utf-8", errors="replace").splitlines()[0][:60]
        return (
            f"is a text file that begins with {first!r} (a failed download can leave a web page "
            "or a Git LFS pointer)"
        )
    return f"is in no known format (it begins with bytes {head[:8].hex(' ')})"


def _describe_model(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a state dict without the tensors of an Inf-DiT is."""
    for pattern, kind in _FOREIGN:
        if any(pattern.search(key) for key in shapes):
            return f"is {kind}"
    some = ", ".join(list(shapes)[:3]) or "none"
    return f"holds {len(shapes)} tensors ({some}), none of them an Inf-DiT's patch embedding"
