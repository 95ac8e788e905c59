"""Schemas that older versions of ComfyUI take as well."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

_NEWER = ("search_aliases",)
"""Keywords that 0.3.64, the oldest ComfyUI supported, does not know and that can be left out."""


def schema(**fields: Any) -> io.Schema:
    """An `io.Schema` of these fields, without those newer than the ComfyUI that runs this."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{k: v for k, v in fields.items() if k in known or k not in _NEWER})
