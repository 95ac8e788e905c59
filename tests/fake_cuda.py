"""A GPU that is not there: the engine's CUDA paths run with shapes, devices and no memory.

FakeTensorMode lets tensors claim to be on cuda:1. On top of it `Machine` watches every operation:

- devices: an operation that meets a CPU and a CUDA tensor is an error, as on a GPU;
- syncs: what makes the host wait for the device (item, bool, nonzero, a blocking copy) is counted
  by line of code;
- races: torch.cuda.Stream is replaced by one with a vector clock; every operation is taken as a
  read or write of storages at a time of its stream. Two that conflict without an order between
  them, a storage that is freed while another stream may be at work on it, and a copy that is
  called non-blocking from memory that is not pinned are problems.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infdit_core.blocks import host_buffer

HOST = "host"
aten = torch.ops.aten
SYNCING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
COPIES = {aten.copy_.default, aten._to_copy.default}


class FakeStream:
    """Stands for torch.cuda.Stream; its clock says what is known to be done of every stream."""

    made = 0

    def __init__(self, device=None, priority=0, name=None):
        self.device = torch.device(device) if device is not None else torch.device("cuda:0")
        if self.device.index is None:
            self.device = torch.device("cuda", 0)
        FakeStream.made += 1
        self.name = name or f"side-{FakeStream.made}"
        self.clock: Counter = Counter()
        Machine.now.streams.append(self)

    def tick(self) -> tuple[str, int]:
        self.clock[self.name] += 1
        return self.name, self.clock[self.name]

    def knows(self, event: tuple[str, int]) -> bool:
        return self.clock[event[0]] >= event[1]

    def wait_stream(self, other: FakeStream) -> None:
        self.clock |= other.clock

    def synchronize(self) -> None:
        Machine.now.host.clock |= self.clock

    def record_event(self, event=None):
        return FakeEvent(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.clock |= event.clock


class FakeEvent:
    def __init__(self, stream: FakeStream | None = None, **_):
        self.clock = Counter(stream.clock) if stream else Counter()

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = Counter((stream or Machine.now.current()).clock)

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or Machine.now.current()).wait_event(self)

    def synchronize(self) -> None:
        Machine.now.host.clock |= self.clock

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


class Machine(TorchDispatchMode):
    """One host and the streams of a GPU, watching every operation."""

    now: Machine

    def __init__(self, package: str) -> None:
        super().__init__()
        Machine.now = self
        self.streams: list[FakeStream] = []
        self._package = package
        self.host = FakeStream(name=HOST)
        self._default: dict[int, FakeStream] = {}
        self._stack: list[FakeStream] = []
        self.problems: Counter = Counter()
        self.syncs: Counter = Counter()
        self.copied: Counter = Counter()
        self.launches = 0
        self.called: Counter = Counter()
        self._pinned: set[int] = set()
        self.unpinnable = False
        self._writes: dict[tuple[int, ...], tuple[FakeStream, tuple[str, int], str]] = {}
        self._reads: dict[tuple[int, ...], list[tuple[FakeStream, tuple[str, int], str]]] = {}
        self._home: dict[int, tuple[FakeStream, weakref.ref]] = {}
        self._site = "?"

    def _register(self, memory: torch.Tensor, device: torch.device):
        """In place of pinning memory where it lies."""
        if self.unpinnable:
            raise torch.AcceleratorError("CUDA error: out of memory")
        self.pin(memory)

        def unregister() -> None:
            k = key(memory)
            self._pinned.discard(k)
            for _, event, label in self._events(k):
                if not self.host.knows(event):
                    self.problems[f"unpinned while in use: {label}"] += 1

        return unregister

    def pin(self, *tensors: torch.Tensor) -> None:
        self._pinned |= {key(t) for t in tensors}

    # ---- what replaces torch.cuda

    def current(self, device=None) -> FakeStream:
        if self._stack:
            return self._stack[-1]
        index = torch.device(device).index if device is not None else 0
        index = index or 0
        if index not in self._default:
            self._default[index] = FakeStream(torch.device("cuda", index), name=f"main-{index}")
        return self._default[index]

    @contextmanager
    def _on(self, stream: FakeStream):
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()

    def stream(self, stream):
        machine = self

        class Context:
            def __enter__(self):
                if stream is not None:
                    machine._stack.append(stream)

            def __exit__(self, *_):
                if stream is not None:
                    machine._stack.pop()

        return Context()

    def patches(self) -> ExitStack:
        stack = ExitStack()
        replaced = {
            "Stream": FakeStream,
            "Event": FakeEvent,
            "stream": self.stream,
            "current_stream": self.current,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: self._wait_for_all("synchronize"),
            "mem_get_info": lambda device=None: (8 * 10**9, 8 * 10**9),
            "get_device_capability": lambda device=None: (9, 0),
            "current_device": lambda: 0,
        }
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        nothing = mock.patch.object(fake_tensor, "init_gpu_context", return_value=None)
        stack.enter_context(nothing)
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(host_buffer, "pin", self._register))
        return stack

    # ---- the operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = [t for t in tensors if t.device.type == "cuda"]
        if func.namespace == "prim":  # asks for a device: no work on data
            return func(*args, **kwargs)
        self._site = self._where()
        if func in SYNCING and on_gpu:
            self._wait_for_all(func.name())
        if func is aten._local_scalar_dense.default:
            if not on_gpu:
                self._touch(func, [], tensors, HOST)
            return True if tensors[0].dtype == torch.bool else 1.0
        try:
            if func is aten._pin_memory.default:  # which fake tensors do not know
                out = aten.clone.default(args[0])
            else:
                out = func(*args, **kwargs)
        except Exception as error:
            self.problems[f"{self._site}: {func.name()}: {str(error).splitlines()[0]}"] += 1
            raise
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if kwargs.get("pin_memory") or func is aten._pin_memory.default:
            self._pinned |= {key(t) for t in made}
        if self._is_view(func, tensors, made):
            return out
        gpu_now = on_gpu or [t for t in made if t.device.type == "cuda"]
        if func in COPIES:
            self._copy(func, args, kwargs, made)
        elif gpu_now:
            self.launches += 1
            self.called[func.name()] += 1
            made += _mutated(func, args, kwargs)
            self._touch(func, made, tensors, self.current(gpu_now[0].device))
        else:
            self._touch(func, made + _mutated(func, args, kwargs), tensors, HOST)
        return out

    def _is_view(self, func, tensors, made) -> bool:
        if func._schema.is_mutable or not made:
            return False
        owned = {key(t) for t in tensors}
        return bool(owned) and all(key(t) in owned for t in made)

    def _copy(self, func, args, kwargs, made) -> None:
        target = args[0] if func is aten.copy_.default else made[0]
        source = args[1] if func is aten.copy_.default else args[0]
        non_blocking = kwargs.get("non_blocking", False) or (
            func is aten.copy_.default and len(args) > 2 and args[2]
        )
        devices = source.device.type, target.device.type
        if "meta" in devices:
            return
        if devices[0] == devices[1]:
            stream = HOST if devices[0] == "cpu" else self.current(target.device)
            self.launches += devices[0] == "cuda"
            self._touch(func, [target], [source], stream)
            return
        on_host = source if devices[0] == "cpu" else target
        stream = self.current((target if devices[0] == "cpu" else source).device)
        pinned = key(on_host) in self._pinned
        way = "host to device" if devices[0] == "cpu" else "device to host"
        size = source.numel() * source.element_size()
        self.copied[way] += size
        if non_blocking and not pinned:
            self.problems[
                f"{self._site}: non_blocking {way} copy of memory that is not pinned"
            ] += 1
        self._touch(func, [target], [source], stream)
        if not non_blocking:
            self._wait_for(stream, f"{way}, {size} bytes")

    def _wait_for(self, stream: FakeStream, why: str) -> None:
        self.host.clock |= stream.clock
        self.syncs[f"{self._site}: {why}"] += 1

    def _wait_for_all(self, why: str) -> None:
        for stream in self.streams:
            self.host.clock |= stream.clock
        self.syncs[f"{self._site}: {why}"] += 1

    def _touch(self, func, made, read, stream) -> None:
        on_host = stream is HOST
        stream = self.host if on_host else stream
        if not on_host:  # a launch comes after all that the host has done and knows
            stream.clock |= self.host.clock
        event = stream.tick()
        label = f"{self._site} ({func.name()}, {stream.name})"
        mutated = made
        if func._schema.is_mutable and func is not aten.copy_.default:
            mutated = [*made, read[0]] if read else made
        written = {self._place(t): t for t in mutated}
        for t in read:
            k = self._place(t)
            if k not in written:
                self._watch(t, stream)
                self._order(stream, self._writes.get(k), label, "reads what", "writes")
                self._reads.setdefault(k, []).append((stream, event, label))
        for k, t in written.items():
            self._watch(t, stream)
            self._order(stream, self._writes.get(k), label, "writes over what", "writes")
            for last in self._reads.get(k, ()):
                self._order(stream, last, label, "writes over what", "reads")
            self._writes[k] = (stream, event, label)
            self._reads[k] = []

    def _order(self, stream, last, label, what, other) -> None:
        if last is not None and not stream.knows(last[1]):
            self.problems[f"race: {label} {what} {last[2]} {other}"] += 1

    def _place(self, t) -> tuple[int, ...]:
        """What is read or written: a storage, of pinned memory the part of it."""
        if (k := key(t)) not in self._pinned:
            return (k,)
        return k, t.storage_offset() * t.itemsize, t.nbytes

    def _events(self, k: int) -> list:
        """All that was done with a storage and its parts, which is forgotten here."""
        parts = {place for place in (*self._reads, *self._writes) if place[0] == k}
        events = [event for place in parts for event in self._reads.pop(place, [])]
        return events + [self._writes.pop(place) for place in parts if place in self._writes]

    def _watch(self, t, stream) -> None:
        k, storage = key(t), t.untyped_storage()
        if k in self._home:
            if self._home[k][1]() is storage:
                return
            self._events(k)  # the address of one that is gone
        home = self.host if t.device.type == "cpu" else stream
        self._home[k] = home, (made := weakref.ref(storage))
        weakref.finalize(storage, self._freed, k, made)

    def _freed(self, k, made) -> None:
        if k not in self._home or self._home[k][1] is not made:
            return
        home, _ = self._home.pop(k)
        events = self._events(k)
        pinned = k in self._pinned
        self._pinned.discard(k)
        if pinned:  # the pinned allocator keeps events of its own
            return
        for stream, event, label in events:
            if stream is not home and not home.knows(event):
                self.problems[f"freed while in use: made on {home.name}, {label}"] += 1

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if self._package in name and "fake_cuda" not in name:
                return f"{name.split(self._package)[-1].lstrip('/')}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"


def _mutated(func, args, kwargs):
    """The tensors that an operation writes over."""
    arguments = func._schema.arguments
    given = {a.name: kwargs.get(a.name, args[i] if i < len(args) else None)
             for i, a in enumerate(arguments)}  # fmt: skip
    changed = [given[a.name] for a in arguments if a.alias_info and a.alias_info.is_write]
    return [t for t in tree_leaves(changed) if isinstance(t, torch.Tensor)]


def _apply(module, fn, recurse=True):
    """torch.nn.Module._apply, which cannot swap fake parameters."""
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def key(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
