"""What a file is that cannot be used, for the message that refuses it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6

_KINDS = (
    (re.compile(r"lora_|\.lora\."), "a LoRA, which changes another model"),
    (re.compile(r"^mixins\.patch_embed\."), "an Inf-DiT checkpoint"),
    (re.compile(r"^stages\.\d+\.input_layer\."), "a DiMR checkpoint"),
    (re.compile(r"^model\.diffusion_model\."), "a Stable Diffusion checkpoint (SD, SDXL, ...)"),
    (re.compile(r"^(module\.)?visual\.|^text_model\.|^vision_model\."), "a CLIP model"),
)


def describe_bytes(head: bytes) -> str:
    """What a file is that begins with `head` and is in no format of checkpoints."""
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(_LEGACY_MAGIC):
        return (
            "is in the format of PyTorch before 1.6; load it and save it again with a newer "
            "PyTorch (torch.save)"
        )
    if is_text(head):
        first = head.decode("utf-8", errors="replace").splitlines()[0][:60]
        return (
            f"is a text file that begins with {first!r} (a failed download can leave a web page "
            "or a Git LFS pointer)"
        )
    return f"is in no known format (it begins with bytes {head[:8].hex(' ')})"


def describe_tensors(keys: Collection[str]) -> str:
    """What a checkpoint is whose tensors are not those of the network asked for."""
    for pattern, kind in _KINDS:
        if any(pattern.search(key) for key in keys):
            return f"is {kind}"
    some = ", ".join(list(keys)[:3]) or "none"
    return f"holds {len(keys)} tensors ({some})"


def is_text(head: bytes) -> bool:
    """Whether a file that begins with `head` is a text."""
    try:  # a character cut off at the end is no error to an incremental decoder
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)
