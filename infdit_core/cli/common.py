"""What the commands share: lines for the terminal, and the machine to compute on."""

from __future__ import annotations

import sys

import torch

from ..network.config import DTYPES
from .jobs import CommandError


class UsageError(Exception):
    """Arguments that contradict each other."""


def choose_device(name: str | None) -> torch.device:
    """The device of a name; without one a GPU where there is one.

    Raises:
        CommandError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used here: {reason}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The number format of a name; without one what is fast on the device."""
    if name is not None:
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def say(line: str) -> None:
    """A line of the result."""
    sys.stdout.write(_printable(line) + "\n")


def warn(line: str) -> None:
    """A line beside the result."""
    sys.stderr.write(_printable(f"infdit: {line}") + "\n")


def _printable(line: str) -> str:
    # What a file says of itself must not drive the terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
