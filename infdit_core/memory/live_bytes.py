"""Counting the bytes of live tensors: unlike RSS exact, and on the meta device too."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside the context make, until they are freed.

    Not those that are files, whose pages are the system's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # storages on the meta device have no address: the object itself is their identity
        inputs = {id(s) for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:
            return out
        for storage in _storages(out):
            if id(storage) not in inputs and id(storage) not in self._counted:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)]
