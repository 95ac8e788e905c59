"""What the values of options are read with; each says what it expects."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..dimr.sampling import STEPS
from ..scratch import Scratch, ScratchError


def byte_count(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected an amount of memory such as 8GB, got {text!r}")
    unit = {"mb": 1e6, "mib": 2**20, "gib": 2**30}.get((match[2] or "GB").lower(), 1e9)
    return float(match[1]) * unit


def scratch_folder(text: str) -> Scratch:
    try:
        return Scratch(text)
    except ScratchError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size_in_pixels(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text)
    if not match or not int(match[1]) * int(match[2]):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, got {text!r}")
    return int(match[1]), int(match[2])


def number(kind: Callable, fits: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """What reads an int or a float, and says what was `expected` where it does not fit."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


share = number(float, lambda n: 0 <= n <= 1, "a number from 0 to 1")
count = number(int, lambda n: n >= 0, "a whole number of at least 0")
positive = number(int, lambda n: n >= 1, "a whole number of at least 1")
few = number(int, lambda n: 1 <= n <= 10_000, "a whole number of 1 to 10000")
evaluation_count = number(int, lambda n: 1 <= n <= STEPS, f"a whole number of 1 to {STEPS}")
up_to_100 = number(float, lambda n: 0 <= n <= 100, "a number from 0 to 100")
seed = number(int, lambda n: 0 <= n <= 2**64 - 1, "a number from 0 to 2^64 - 1")
