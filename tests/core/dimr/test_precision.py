"""Half precision: its distance from float32 stays near what benchmarks.dimr_precision measured."""

import pytest
import torch

from infdit_core.dimr.load import load_model
from tests.goldens import golden_path


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.5e-2), (torch.float16, 1.5e-3)])
def test_half_precision_is_as_near_as_measured(dtype, bound):
    path = golden_path("dimr/tiny_2r.safetensors")
    exact, half = (load_model(path, dtype=d, heads=4) for d in (torch.float32, dtype))
    x, classes = torch.randn(1, 4, 32, 32), torch.tensor([207])
    for t in (1.0, 0.5, 0.001):
        expected = exact(x, torch.tensor([t]), classes)
        found = half(x.to(dtype), torch.tensor([t]), classes)
        distance = (found - expected).norm() / expected.norm()
        assert bound / 3 < distance < bound, "less would not be half precision"
