"""ImageNet's 1000 classes by name, as torchvision (BSD-3-Clause) lists them for its own models."""

from __future__ import annotations

from functools import cache

from ..errors import InfDiTError
from .config import NULL_CLASS

_LISTED = 10


@cache
def class_names() -> tuple[str, ...]:
    """The names of classes 0 to 999; a few, such as "crane", are those of two.

    Raises:
        InfDiTError: torchvision, which has them, is not installed.
    """
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError as error:
        raise InfDiTError(
            f"names of classes need torchvision, which is not usable here ({error}); expected a"
            f" number of 0 to {NULL_CLASS - 1}, or `python -m pip install torchvision`"
        ) from error
    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(text: str) -> int:
    """A class by its number, its name, or a part of a name that no other class has.

    Args:
        text: 0 to 999, 1000 for no class, or a name such as "golden retriever".

    Raises:
        InfDiTError: no such class, or several; lists them.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        if int(text) <= NULL_CLASS:
            return int(text)
        raise InfDiTError(f"expected a class of 0 to {NULL_CLASS}, got {text}")
    names = class_names()
    small = text.casefold()
    found: list[int] = []
    for fits in (
        lambda name: name == text,
        lambda name: name.casefold() == small,
        lambda name: bool(small) and small in name.casefold(),
    ):
        found = [number for number, name in enumerate(names) if fits(name)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    some = ", ".join(f"{number} {names[number]}" for number in found[:_LISTED])
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    got = f"{text!r} fits {len(found)}: {some}{more}" if found else f"got {text[:80]!r}"
    raise InfDiTError(
        f"expected the number or the name of one of ImageNet's classes, or a part of it; {got}"
    )
