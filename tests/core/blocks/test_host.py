"""What waits on the host comes in order, in memory that is taken once and given back."""

import gc

import pytest
import torch

from infdit_core.blocks.grid import Grid
from infdit_core.blocks.host_buffer import HostBuffer
from infdit_core.blocks.host_store import HostStore
from infdit_core.blocks.schedules import BlockMajor, LayerMajor
from infdit_core.edm import edm_sigmas
from infdit_core.network.run import Run
from infdit_core.sampling import sample
from tests.goldens import golden_model, random_condition

CPU = torch.device("cpu")


def test_tokens_come_and_go_in_order():
    """Whatever the number of chunks, each read gives what was written last; few are on the way."""
    for count in (1, 2, 3, 5):
        chunks = list(Grid(count, 1).chunks(1, 1))
        cells = [(n, chunk) for n in range(4) for chunk in chunks]
        sizes = {chunk: 1 + (chunk.top < 2) for chunk in chunks}
        buffer = HostBuffer()
        order = [chunk for n, chunk in cells if n]
        with HostStore(CPU, sizes, order, buffer) as tokens:
            for n, chunk in cells:
                i = chunk.top
                if n == 0:
                    tokens[chunk] = torch.full((1, 1, 1 + (i < 2), 4, 2), float(i))
                    continue
                taken = tokens.pop(chunk)
                assert taken.shape[2] == 1 + (i < 2)
                assert (taken == i + 100 * (n - 1)).all(), (count, n, i)
                tokens[chunk] = taken + 100
            assert len(tokens._slots) == min(2, count)
        size = 4 * 8 * sum(sizes.values())
        assert buffer.take(size, CPU).nbytes == size
        assert buffer._memory is not None
        assert buffer._memory.nbytes == size


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_waits_on_the_host_gives_the_same_bits(grid, dtype):
    model, run = golden_model("xs", dtype), Run()
    x, cond = random_condition(model, *grid, batch=2)
    sigma = torch.tensor([0.3, 5.0])
    for there, here in (
        (BlockMajor(1, frontier_on_host=True), BlockMajor(1)),
        (BlockMajor(2, frontier_on_host=True, keep_lr=False), BlockMajor(2, keep_lr=False)),
        (LayerMajor(2, tokens_on_host=True), LayerMajor(2)),
    ):
        expected = model.denoise(x, sigma, cond, here)
        for _ in range(2):  # the second evaluation in the memory of the first
            assert torch.equal(model.denoise(x, sigma, cond, there, run=run), expected)


@pytest.fixture
def pinned(monkeypatch):
    """Addresses of memory that a GPU would know."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return set()


@pytest.fixture
def pin(pinned):
    def pin(memory, device):
        assert device.type == "cuda"
        pinned.add((memory.data_ptr(), memory.nbytes))
        return lambda: pinned.remove((memory.data_ptr(), memory.nbytes))

    return pin


def test_host_memory_is_exact_used_again_and_given_back(pinned, pin):
    gpu = torch.device("cuda", 0)
    buffer = HostBuffer(pin)
    first = buffer.take(1000, gpu)
    assert buffer.pinned
    assert pinned == {(first.data_ptr(), 1000)}
    assert buffer.take(900, gpu).data_ptr() == first.data_ptr()
    assert buffer.take(1100, gpu).nbytes == 1100
    assert [size for _, size in pinned] == [1100]
    buffer.release()
    assert not pinned
    assert not buffer.pinned
    buffer.take(10, gpu)
    del buffer, first
    gc.collect()
    assert not pinned
    assert not HostBuffer(pin).take(10, CPU).is_pinned()


@pytest.mark.parametrize("failure", [None, torch.AcceleratorError("CUDA error"), RuntimeError()])
def test_memory_that_cannot_be_pinned_is_used_as_it_is(failure):
    def pin(memory, device):
        if failure is not None:
            raise failure

    buffer = HostBuffer(pin)
    assert buffer.take(100, torch.device("cuda", 0)).nbytes == 100
    assert not buffer.pinned


def test_a_sampling_run_takes_memory_once_and_gives_it_back(monkeypatch):
    made, released = [], []
    take, release = HostBuffer.take, HostBuffer.release

    def watched(self, size, device):
        made.append(take(self, size, device).data_ptr())
        return take(self, size, device)

    monkeypatch.setattr(HostBuffer, "take", watched)
    monkeypatch.setattr(HostBuffer, "release", lambda self: (released.append(1), release(self)))
    model = golden_model("xs")
    noise, cond = random_condition(model, 2, 3)
    sample(model, cond, edm_sigmas(2), noise=noise, schedule=LayerMajor(2, tokens_on_host=True))
    assert len(made) == 3
    assert len(set(made)) == 1
    assert len(released) == 2  # before it was taken, and at the end
