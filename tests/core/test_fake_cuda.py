"""The engine on a GPU that is not there: no tensors that meet across devices, no races, no waits.

Each case runs in a process of its own, which finalizers of fake storages can crash late.
"""

from __future__ import annotations

import gc
import os
import pickle
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infdit_core import sampling
from infdit_core.blocks.host_buffer import HostBuffer
from infdit_core.blocks.host_store import HostStore
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.memory.adaptive import Adaptive
from infdit_core.memory.planner import Plan
from infdit_core.network.config import InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.network.residual_cache import ResidualCache
from infdit_core.network.run import Run
from infdit_core.pictures.colour_fix import COLOUR_FIXES, fix_colours
from infdit_core.pictures.prepare import prepare
from infdit_core.scratch import in_memory
from tests.fake_cuda import Machine
from tools.comfy_server import ROOT

DEVICE = "cuda:1"
"""Not cuda:0, so that index 0 is no luck."""
CONFIG = InfDiTConfig(64, 2, 4, 4, 8, 128, vector_size=16)
GRID = 3, 4
HOST = {"tokens_on_host": True}
CASES = {
    "full": {"schedule": Full()},
    "block-major": {"schedule": BlockMajor(2)},
    "layer-major": {"schedule": LayerMajor(2)},
    "layer-major, lines": {"schedule": LayerMajor(6)},
    "frontier on host": {"schedule": BlockMajor(1, True)},
    "frontier on host, larger chunks": {"schedule": BlockMajor(2, True, keep_lr=False)},
    "frontier on host, streamed": {"schedule": BlockMajor(2, True, False, "cpu", True)},
    "frontier on host, cancelled": {"schedule": BlockMajor(1, True), "cancel": 15},
    "pictures in files": {"schedule": BlockMajor(2, True, keep_lr=False), "files": True},
    "LR anew": {"schedule": LayerMajor(2, keep_lr=False)},
    "tokens on host": {"schedule": LayerMajor(2, **HOST)},
    "tokens on host, one chunk": {"schedule": LayerMajor(12, **HOST)},
    "tokens on host, two chunks": {"schedule": LayerMajor(6, **HOST)},
    "pictures on host": {"schedule": LayerMajor(2, keep_lr=False, pictures_device="cpu", **HOST)},
    "streamed": {"schedule": LayerMajor(2, True, False, "cpu", stream_weights=True)},
    "streamed, unpinned": {"schedule": LayerMajor(2, True, stream_weights=True), "unpinned": True},
    "residual cache": {"schedule": LayerMajor(2), "cache": 1},
    "residual cache on host": {"schedule": LayerMajor(2, **HOST), "cache": 1},
    "out of memory": {"out_of_memory": True},
    "cancelled": {"schedule": LayerMajor(2, **HOST), "cancel": 7},
    "fp16, tokens on host": {"schedule": LayerMajor(2, **HOST), "dtype": torch.float16},
    "fp32, tokens on host": {"schedule": LayerMajor(2, **HOST), "dtype": torch.float32},
}
GPU_OPERATORS = "infdit::place", "infdit::join", "aten::_addmm_activation"


@pytest.mark.parametrize("name", CASES)
def test_nothing_goes_wrong_on_a_gpu(name):
    assert apart(lambda: sampling_run(**CASES[name])) == {}


def test_the_ways_of_a_gpu_are_taken():
    """One kernel places, another joins the parts of the attention, gelu is part of a matmul."""
    pytest.importorskip("triton")
    counts = apart(lambda: sampling_run(schedule=LayerMajor(3), counts=True))
    assert counts == dict.fromkeys(GPU_OPERATORS, 1)


def test_pictures_may_live_on_the_device():
    assert apart(picture_run) == {}


def test_copies_to_and_from_the_host_do_not_wait_for_each_other():
    assert apart(duplex_run) == {}


def test_the_machine_sees_what_it_is_for():
    """A tensor of the host in the middle, a wait, a copy that only calls itself non-blocking."""
    found = apart(lambda: sampling_run(schedule=LayerMajor(1, **HOST), sabotage=True))
    assert any("non_blocking host to device copy of memory that is not pinned" in p for p in found)
    assert any(p.startswith("the host waits in the inner loop") for p in found)


def apart(case) -> dict[str, int]:
    """The problems of a case by description, with how often each came."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        gc.disable()
        try:
            problems = case()
        except Exception as error:
            problems = {f"{type(error).__name__}: {str(error).splitlines()[0]}": 1}
        with os.fdopen(writer, "wb") as file:
            pickle.dump(problems, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    assert content, "the process ended early"
    return pickle.loads(content)


def sampling_run(
    *, schedule=None, cache=0, out_of_memory=False, cancel=0,
    dtype=torch.bfloat16, sabotage=False, unpinned=False, counts=False,
    files=False,
) -> dict[str, int]:  # fmt: skip
    """Two evaluations of a small network, and what was wrong with them.

    With `counts` the calls in a layer of a chunk of what only a GPU does.
    """
    machine, cells, retry = Machine(str(ROOT)), 0, None
    machine.unpinnable = unpinned
    with machine.patches(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net = InfDiT(CONFIG, dtype=dtype, device=DEVICE).requires_grad_(False)
        height, width = (n * CONFIG.block_px for n in GRID)
        image = torch.rand(1, height // 4, width // 4, 4)
        with machine, ExitStack() as patches:
            canvas = prepare(image, 4.0, block_px=CONFIG.block_px)
            cond = canvas.condition(torch.randn(1, 16))
            layer, calls = InfDiT.layer, 0
            if out_of_memory:
                smaller = Plan(LayerMajor(2, **HOST), 1, 0, 2.0)
                retry = Adaptive([Plan(Full(), 3, 0, 1.0), smaller]).call

            def watched(self, *args):
                nonlocal calls
                calls += 1
                if out_of_memory and calls == 2:
                    raise torch.OutOfMemoryError("injected")
                if sabotage:
                    float(args[1].flatten()[0])
                    torch.ones(3).to(DEVICE, non_blocking=True)
                return layer(self, *args)

            patches.enter_context(mock.patch.object(InfDiT, "layer", watched))
            levels = mock.patch.object(sampling, "check_sigmas", return_value=[40.0, 1.0, 0.0])
            patches.enter_context(levels)  # which fake tensors have no values for

            def progress(done, total):
                nonlocal cells
                cells += 1
                if cells == cancel:
                    raise KeyboardInterrupt

            try:
                x = sampling.sample(
                    net,
                    cond,
                    torch.empty(3),
                    noise=torch.randn_like(cond.concat),
                    solver="euler",
                    schedule=schedule,
                    retry=retry,
                    run=Run(progress, ResidualCache(cache) if cache else None),
                    empty=(lambda shape, device: torch.empty(shape)) if files else in_memory,
                )
            except KeyboardInterrupt:
                return problems(machine, cells)
            on_host = files or (schedule is not None and schedule.pictures_device is not None)
            if x.device.type != ("cpu" if on_host else "cuda"):
                machine.problems[f"the result is on {x.device}"] += 1
            canvas.finish(x)
    if counts:
        return {op: round(machine.called[op] / cells) for op in GPU_OPERATORS}
    return problems(machine, cells)


def duplex_run() -> dict[str, int]:
    """What comes waits for its own way out, and not for what has just left."""
    machine = Machine(str(ROOT))
    with machine.patches(), FakeTensorMode(allow_non_fake_inputs=True), machine:
        keys = range(4)
        with HostStore(torch.device(DEVICE), dict.fromkeys(keys, 1), keys, HostBuffer()) as store:
            for key in keys:
                store[key] = torch.empty(8, device=DEVICE)
            store[0] = store.pop(0) + 1
            store.pop(1)  # which fetches what follows
            out = store._out._stream.name
            if store._in._stream.clock[out] >= store._left[0].clock[out]:
                machine.problems["what comes waits for what has just left"] += 1
    return dict(machine.problems)


def picture_run() -> dict[str, int]:
    """Preparation and colours of pictures on the device."""
    machine = Machine(str(ROOT))
    with machine.patches(), FakeTensorMode(allow_non_fake_inputs=True), machine:
        image = torch.rand(1, 40, 56, 4, device=DEVICE)
        canvas = prepare(image, 4.0, block_px=32)
        picture = canvas.finish(canvas.concat)
        for method in COLOUR_FIXES:
            fix_colours(picture, image, method)
            fix_colours(picture.cpu(), image, method)
    return dict(machine.problems)


def problems(machine: Machine, cells: int) -> dict[str, int]:
    """What was wrong; a wait once per chunk is no inner loop, once per chunk and layer is."""
    found = dict(machine.problems)
    for site, times in machine.syncs.items():
        if cells >= 24 and times >= cells * 0.75:
            found[f"the host waits in the inner loop: {site}"] = times
    return found
