"""Degradations after Real-ESRGAN: sizes, reproducibility, kernels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("kornia")
from training.degrade import FIRST, gaussian_kernel, reduce_as, reduce_realistic, sinc_kernel
from training.train import Settings, Trainer


@pytest.mark.parametrize("size", [(64, 64), (32, 128)])
def test_a_quarter_of_the_size_in_eight_bits(size):
    pictures = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reduced = reduce_realistic(pictures, np.random.default_rng(0))
    assert reduced.shape == (6, 3, size[0] // 4, size[1] // 4)
    assert reduced.min() >= -1
    assert reduced.max() <= 1
    levels = (reduced + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_the_generator_decides_everything():
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, again, other = (reduce_realistic(pictures, np.random.default_rng(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_picture_stays_in_place_and_keeps_its_brightness():
    ramp = torch.linspace(-0.6, 0.6, 64).expand(64, 3, 64, 64)
    mean = reduce_realistic(ramp, np.random.default_rng(0)).mean(dim=(0, 1, 2))
    expected = torch.linspace(-0.6, 0.6, 64).reshape(16, 4).mean(dim=1)
    torch.testing.assert_close(mean[2:-2], expected[2:-2], atol=0.03, rtol=0)


def test_kernels():
    kernel = gaussian_kernel(21, (1.5, 3.0), 0.0)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    x = torch.arange(21) - 10.0
    assert (kernel.sum(dim=0) * x**2).sum() == pytest.approx(1.5**2, rel=0.02)  # along x
    assert (kernel.sum(dim=1) * x**2).sum() == pytest.approx(3.0**2, rel=0.02)
    turned = gaussian_kernel(21, (1.5, 3.0), math.pi / 2)
    torch.testing.assert_close(turned, kernel.T, atol=1e-6, rtol=0)
    flat = gaussian_kernel(21, (3.0, 3.0), 0.0, beta=2.0, plateau=True)
    assert (
        flat[10, 12] / flat[10, 10]
        > gaussian_kernel(21, (3.0, 3.0), 0.0)[10, 12]
        / (gaussian_kernel(21, (3.0, 3.0), 0.0)[10, 10])
    )


def test_sinc_passes_below_its_cutoff_and_stops_above():
    kernel = sinc_kernel(21, math.pi / 3)
    x = torch.arange(21) - 10.0

    def gain(frequency: float) -> float:
        return float((kernel.sum(dim=0) * torch.cos(frequency * x)).sum())

    assert gain(0.0) == pytest.approx(1, abs=1e-5)
    assert gain(math.pi / 6) == pytest.approx(1, abs=0.15)
    assert abs(gain(2.5)) < 0.1
    assert kernel.min() < 0  # it rings


def test_probabilities_of_a_stage_are_complete():
    assert sum(FIRST.resize) == pytest.approx(1)


def test_of_a_mixed_batch_the_second_half_is_degraded():
    settings = Settings(hidden_size=16, num_layers=1, num_heads=2, crop_px=32, batch_size=2)

    class Grey:
        def batch(self, size, generator):
            return torch.zeros(size, 3, 32, 32)

    def reduced(degradation: str) -> torch.Tensor:
        run = Trainer(replace(settings, degradation=degradation), Grey(), torch.device("cpu"))  # type: ignore[arg-type] - Grey for Photos
        assert run.train_step()[1].isfinite().all()
        return reduce_as(degradation, torch.zeros(5, 3, 32, 32), run.numpy).std(dim=(1, 2, 3))

    assert (reduced("realesrgan") > 0).all()
    assert (reduced("bicubic") == 0).all()
    assert ((reduced("mixed") > 0) == torch.tensor([False, False, False, True, True])).all()
