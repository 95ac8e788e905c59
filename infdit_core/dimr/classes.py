"""The classes of ImageNet by number and by name."""

from __future__ import annotations

from functools import cache

from ..errors import InfDiTError
from .config import CLASSES, NULL_CLASS

_MAX_CANDIDATES = 10


@cache
def class_names() -> tuple[str, ...]:
    """The names of classes 0 to 999, each another, in the order of their sorted synset ids.

    From torchvision (BSD-3-Clause), the categories of its models trained on ImageNet.
    """
    from torchvision.models import ResNet18_Weights  # takes a second

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(text: str) -> int:
    """The class that a number, a name, a unique part of a name or "207 golden retriever" means.

    Args:
        text: numbers go to 1000, which stands for no class; names are searched for as they are
            written, then in any case, then as a part.

    Raises:
        InfDiTError: none or several are meant; the message lists some.
    """
    text = " ".join(text.split())
    if text.isascii() and text.isdigit():
        if int(text) <= NULL_CLASS:
            return int(text)
        raise InfDiTError(
            f"expected a class from 0 to {CLASSES - 1}, or {NULL_CLASS} for none; got {text}"
        )
    names = class_names()
    lower = text.lower()
    numbered = [f"{index} {name}".lower() for index, name in enumerate(names)]
    if lower in numbered:
        return numbered.index(lower)
    found: list[int] = []
    for matches in (
        lambda name: name == text,
        lambda name: name.lower() == lower,
        lambda name: bool(lower) and lower in name.lower(),
    ):
        found = [index for index, name in enumerate(names) if matches(name)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    expected = f"expected the number or the name of an ImageNet class; got {text[:80]!r}"
    if not found:
        raise InfDiTError(f"{expected}, which no name contains")
    some = ", ".join(f"{index} {names[index]}" for index in found[:_MAX_CANDIDATES])
    more = ", ..." if len(found) > _MAX_CANDIDATES else ""
    raise InfDiTError(f"{expected}, which {len(found)} names contain: {some}{more}")
