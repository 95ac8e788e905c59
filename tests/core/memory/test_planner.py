"""Predicted memory is what is counted, and the plan fits."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from infdit_core import bands
from infdit_core.blocks.grid import Grid
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.checkpoints.load import BUNDLED_FOLDER, load_model
from infdit_core.edm import edm_sigmas
from infdit_core.memory import host, planner
from infdit_core.memory.adaptive import Adaptive, is_out_of_memory, memory_budget
from infdit_core.memory.live_bytes import LiveBytes
from infdit_core.memory.planner import (
    Plan,
    PlanError,
    Workload,
    check_host,
    evaluation_bytes,
    evaluation_flop,
    host_bytes,
    lean_plan,
    peak_bytes,
    plan,
    plans,
    weight_bytes,
)
from infdit_core.network.condition import Condition
from infdit_core.network.config import RELEASED
from infdit_core.network.model import InfDiT
from infdit_core.network.residual_cache import ResidualCache
from infdit_core.network.run import Run
from infdit_core.sampling import SOLVER_PICTURES, Preset, sample
from tests.goldens import (
    TINY,
    TINY_PRIOR,
    fail_at,
    golden_model,
    random_condition,
    random_model,
)

SCHEDULES = [
    Full(),
    BlockMajor(1),
    BlockMajor(3),
    LayerMajor(1),
    LayerMajor(3),
    LayerMajor(8),
    LayerMajor(2, keep_lr=False),
    LayerMajor(2, tokens_on_host=True),
    BlockMajor(1, frontier_on_host=True),
    BlockMajor(2, frontier_on_host=True, keep_lr=False),
]


@pytest.mark.parametrize("grid", [Grid(4, 12), Grid(9, 3), Grid(2, 2)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_evaluation_takes_what_is_predicted(grid, schedule, dtype):
    model = golden_model("xs", dtype)
    x, cond = random_condition(model, grid.rows, grid.columns)
    run = Run()
    if schedule.keep_lr:
        run.lr_kv = model.lr_keys_values(cond.lr.to(dtype))
    with LiveBytes() as live:
        model(x, torch.ones(1), cond, schedule, run=run, dtype=dtype)
    counted = live.peak - x.nbytes  # the result is one of the solver's pictures
    work = Workload(model.config, *x.shape[-2:], dtype)
    predicted = evaluation_bytes(work, schedule)
    predicted += host_bytes(work, schedule)  # which here is the same memory
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("residual", [False, True], ids=["exact", "residual"])
@pytest.mark.parametrize("schedule", [Full(), LayerMajor(4), BlockMajor(2)], ids=str)
def test_sampling_takes_what_is_predicted(schedule, residual):
    model = golden_model("xs")
    with LiveBytes() as live:
        noise, cond = random_condition(model, 6, 6)
        cache = ResidualCache(1) if residual else None
        sample(model, cond, edm_sigmas(2), noise=noise, schedule=schedule, run=Run(cache=cache))
    side = 6 * model.config.block_px
    work = Workload(model.config, side, side, torch.float32, weights=False, residual=residual)
    predicted = peak_bytes(work, schedule)
    assert predicted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_solver_keeps_as_many_pictures_as_are_counted(solver, monkeypatch):
    """A network whose own memory is small beside them."""
    monkeypatch.setattr(bands, "_BAND", 2**12)
    model, schedule = random_model(TINY, 0.05), BlockMajor(2)
    noise, cond = random_condition(model, 12, 12)
    with LiveBytes() as live:
        concat = cond.concat.clone()
        cond = Condition(concat, cond.lr.clone())
        sigmas = Preset(solver, 5).sigmas()
        sample(model, cond, sigmas, noise=noise, solver=solver, schedule=schedule)
    work = Workload(TINY, 384, 384, torch.float32, weights=False)
    work = replace(work, pictures=1 + SOLVER_PICTURES[solver])
    assert peak_bytes(work, schedule) == pytest.approx(live.peak, rel=0.1)


def test_the_keys_of_a_large_lr_picture_are_made_in_what_is_predicted():
    config = replace(RELEASED, num_layers=2)
    work = Workload(config, 2048, 2048, torch.bfloat16)
    net = InfDiT(config, dtype=torch.bfloat16, device="meta", attend=lambda q, k, v: q)
    x = torch.empty(1, 3, 2048, 2048, device="meta")
    cond = Condition(x, x[..., ::4, ::4], torch.empty(1, config.vector_size, device="meta"))
    schedule, run = BlockMajor(2), Run()
    with torch.no_grad(), LiveBytes() as live:
        result = net(x, torch.ones(1, device="meta"), cond, schedule, run=run, dtype=work.dtype)
    assert run.lr_kv is not None
    predicted = evaluation_bytes(work, schedule) + run.lr_kv.nbytes
    assert predicted == pytest.approx(live.peak - result.nbytes, rel=0.05)


def test_sizes_of_the_released_model():
    assert weight_bytes(RELEASED, torch.bfloat16) / 2 == pytest.approx(753.4e6, rel=1e-3)
    assert evaluation_flop(RELEASED, 4096, 4096) == pytest.approx(1.8e15, rel=0.02)


@pytest.mark.parametrize("side", [512, 2048, 4096, 8192, 16384])
def test_any_picture_fits_from_6_gb_and_more_memory_is_never_slower(side):
    found = plans(Workload(RELEASED, side, side, torch.bfloat16))
    fitting = [next(p for p in found if p.peak_bytes <= n * 1e9) for n in (6, 8, 12, 24, 80)]
    costs = [p.cost for p in fitting]
    assert costs == sorted(costs, reverse=True)
    assert len({str(p.schedule) for p in found}) == len(found)


def test_the_schedule_for_a_memory_is_that_of_the_first_plan_that_fits():
    schedule = plan(RELEASED, 2048, 2048, torch.bfloat16, 6e9)
    assert peak_bytes(Workload(RELEASED, 2048, 2048, torch.bfloat16), schedule) <= 6e9
    found = plans(Workload(RELEASED, 2048, 2048, torch.bfloat16))
    assert schedule == next(p.schedule for p in found if p.peak_bytes <= 6e9)


def test_a_plan_leaves_the_ram_what_it_needs():
    """16384² in bf16: lines of keys and values wait in RAM in place of all tokens."""
    work = Workload(RELEASED, 16384, 16384, torch.bfloat16, pictures=0)
    found = plans(work)
    ample = Adaptive(found, 8e9, host_bytes=64e9).plan
    assert isinstance(ample.schedule, BlockMajor)
    assert ample.schedule.frontier_on_host
    assert ample.peak_bytes <= 8e9
    assert ample.host_bytes == 128 * RELEASED.num_layers * 2 * work.block_bytes
    assert ample.host_bytes / 1e9 == pytest.approx(18.8, abs=0.05)
    assert Adaptive(found, 8e9, host_bytes=18e9).plan.host_bytes <= 18e9
    schedule = plan(RELEASED, 16384, 16384, torch.bfloat16, 8e9, host_bytes=64e9)
    assert host_bytes(work, schedule) <= 64e9
    with pytest.raises(PlanError, match=r"got 8.0 GB; or .* in RAM, of which 10.0 GB are free"):
        plan(RELEASED, 16384, 16384, torch.bfloat16, 8e9, host_bytes=10e9)


@pytest.mark.parametrize(
    ("side", "gpu", "ram", "waiting"), [(16384, 8e9, 24e9, 18.8e9), (32768, 12e9, 48e9, 37.6e9)]
)
def test_a_gigapixel_fits_with_pictures_in_files(side, gpu, ram, waiting):
    """Only the line of keys and values grows, with the side."""
    work = Workload(RELEASED, side, side, torch.bfloat16, scratch=True)
    found = lean_plan(plans(work), gpu, ram)
    assert found is not None
    assert found.schedule == BlockMajor(8, frontier_on_host=True, keep_lr=False)
    assert found.host_bytes == pytest.approx(waiting, rel=0.01)
    assert found.peak_bytes <= 5e9
    assert lean_plan(plans(work), gpu, 10e9) is None


def test_layers_come_in_turn_where_that_is_faster():
    found = plans(Workload(RELEASED, 4096, 4096, torch.bfloat16, scratch=True))
    assert found[0].schedule == LayerMajor(32)
    lean = lean_plan(found, 80e9, 64e9)
    assert lean is not None
    assert lean.schedule == LayerMajor(32, keep_lr=False)
    assert lean.peak_bytes < found[0].peak_bytes < 8e9


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("mps", False), ("xpu", True)])
def test_nothing_waits_in_ram_that_is_the_devices_own(device, waits):
    found = plans(Workload(TINY_PRIOR, 512, 256, torch.float32, 1, device))
    assert any(p.host_bytes for p in found) == waits


def test_the_ram_of_the_machine_counts(monkeypatch):
    monkeypatch.setattr(host, "available_bytes", lambda *, swap: 10e9 if not swap else 1e12)
    with pytest.raises(PlanError, match=r"of which 9.0 GB are free"):
        plan(RELEASED, 16384, 16384, torch.bfloat16, 8e9)
    work = Workload(RELEASED, 8192, 8192, torch.bfloat16)
    with pytest.raises(PlanError, match=r"tokens in RAM: 10.7 GB would wait in RAM, of which 9.0"):
        check_host(work, LayerMajor(32, tokens_on_host=True))
    check_host(work, LayerMajor(32))


def test_a_smaller_plan_neither_takes_more_ram_than_there_is_nor_moves_the_pictures():
    made = [
        Plan(LayerMajor(4), 100, 0, 1.0),
        Plan(LayerMajor(3, True), 50, 30, 1.1),
        Plan(LayerMajor(2, pictures_device="cpu"), 40, 10, 1.2),
        Plan(LayerMajor(2, True), 30, 20, 1.3),
    ]
    tried = []

    def evaluate(schedule):
        tried.append(schedule)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return schedule

    with pytest.raises(torch.OutOfMemoryError):
        Adaptive(made, free_memory=lambda: None, host_bytes=25).call(evaluate)
    assert tried == [made[0].schedule, made[3].schedule]


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e9, 8e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2e9)
    weight = SimpleNamespace(device=torch.device("cuda", 0), nbytes=1e9)
    net = SimpleNamespace(device=weight.device, parameters=lambda: [weight])
    assert memory_budget(cast("InfDiT", net)) == pytest.approx(0.9 * 5e9 + 1e9)


def test_what_fits_nowhere_is_refused_with_the_least_that_is_needed():
    with pytest.raises(PlanError, match=r"2048×2048 px needs at least .* got 0.1 GB"):
        plan(RELEASED, 2048, 2048, torch.bfloat16, 1e8)


def test_out_of_memory_at_any_cell_gives_the_same_picture(monkeypatch, caplog):
    model = golden_model("xs")
    noise, cond = random_condition(model, 2, 3)
    found = plans(Workload(model.config, 64, 96, torch.float32, device="cpu"))
    expected = sample(model, cond, edm_sigmas(2), noise=noise, schedule=found[0].schedule)
    first = len(found[0].schedule.cells(Grid(2, 3), model.config.num_layers))
    for cell in range(1, 3 * first + 1):
        with monkeypatch.context() as patch:
            fail_at(patch, cell)
            freed: list[int] = []
            adaptive = Adaptive(found, free_memory=partial(freed.append, 1))
            before = adaptive.plan
            caplog.clear()
            result = sample(model, cond, edm_sigmas(2), noise=noise, retry=adaptive.call)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        assert adaptive.plan.peak_bytes < before.peak_bytes
        assert len(freed) == 1
        assert "out of memory with" in caplog.text


def test_the_failed_attempt_is_let_go_before_the_next(monkeypatch):
    """The tensors of the failed chunk must not live on in a traceback."""
    model = golden_model("xs")
    x, cond = random_condition(model, 4, 4)
    found = plans(Workload(model.config, 128, 128, torch.float32, device="cpu"))
    fail_at(monkeypatch, 2)
    live_when_freed = []
    with LiveBytes() as live:
        adaptive = Adaptive(found, free_memory=lambda: live_when_freed.append(live.live))
        adaptive.call(lambda schedule: model(x, torch.ones(1), cond, schedule))
    assert live_when_freed[0] < 0.3 * live.peak


def test_without_a_smaller_plan_the_error_is_raised(monkeypatch):
    model = golden_model("xs")
    x, cond = random_condition(model, 1, 1)
    found = plans(Workload(model.config, 32, 32, torch.float32, device="cpu"))
    smallest = min(found, key=lambda p: p.peak_bytes)
    fail_at(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        Adaptive([smallest]).call(lambda schedule: model(x, torch.ones(1), cond, schedule))


def test_other_errors_are_not_taken_for_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    for said in (
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 9.0 GB)",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(KeyboardInterrupt())


def test_a_budget_chooses_the_first_plan_that_fits():
    found = plans(Workload(RELEASED, 4096, 4096, torch.bfloat16))
    assert Adaptive(found).plan is found[0]
    assert Adaptive(found, 7e9).plan.peak_bytes <= 7e9
    assert Adaptive(found, 1.0).plan.peak_bytes == min(p.peak_bytes for p in found)


@pytest.mark.parametrize("side", [32, 160, 512])
def test_a_small_picture_needs_no_measuring(side, monkeypatch):
    work = Workload(TINY_PRIOR, side, side, torch.float32, device="cpu")
    measured = plans(work)
    monkeypatch.setattr(planner, "_chunk_bytes", None)
    small = planner.small_plan(work, 1e12)
    assert small is not None
    assert small.cost == measured[0].cost
    assert small.peak_bytes >= max(p.peak_bytes for p in measured)
    assert planner.small_plan(work, 3 * small.peak_bytes) is None
    assert str(small).startswith(f"{small.schedule}, at most ")


@pytest.mark.parametrize("side", [2048, 4096])
def test_a_bound_grows_with_the_chunk_and_not_with_the_picture(side):
    config = load_model(BUNDLED_FOLDER / "infdit_small.safetensors").config
    work = Workload(config, side, side, torch.bfloat16)
    small = planner.small_plan(work, 1e12)
    assert small is not None
    counted = peak_bytes(work, small.schedule)
    assert counted < small.peak_bytes < counted + 1.1e9


SEEN = {
    Full(): 5419499520,
    LayerMajor(16): 1267793920,
    LayerMajor(16, tokens_on_host=True): 806420480,
    BlockMajor(4): 3470196736,
    BlockMajor(4, frontier_on_host=True): 1184038912,
}
"""Peaks of an evaluation by an H200: benchmarks/results/evaluation_cuda_released_bf16_2048.json."""


@pytest.mark.parametrize(("schedule", "seen"), SEEN.items(), ids=str)
def test_a_gpu_took_what_is_predicted(schedule, seen):
    pytest.importorskip("triton")
    config = replace(RELEASED, vector_size=0)
    work = Workload(config, 2048, 2048, torch.bfloat16, fused=True)
    denoised = 4 * 3 * 2048**2
    assert evaluation_bytes(work, schedule) + denoised == pytest.approx(seen, rel=0.05)
    plainly = evaluation_bytes(replace(work, fused=False), schedule)
    assert plainly >= evaluation_bytes(work, schedule)
