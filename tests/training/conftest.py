"""What tests of training share."""

import pytest
import torch
from safetensors.torch import save_file

from training import features


@pytest.fixture(scope="session")
def lite0_file(tmp_path_factory):
    """A file as training.features writes it, of random weights."""
    expansion, shapes = {}, {"stem": (32, 3, 3, 3)}
    channels = (32, 16, 24, 24, 40, 40, 80, 80)
    for n, (wider, kernel, _) in enumerate(features._BLOCKS):
        wide = channels[n] * wider
        if wider > 1:
            shapes[f"{n}_expand"] = (wide, channels[n], 1, 1)
        shapes[f"{n}_depthwise"] = (wide, 1, kernel, kernel)
        shapes[f"{n}_project"] = (channels[n + 1], wide, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        fan = shape[1] * shape[2] * shape[3]
        expansion[f"{name}.weight"] = torch.randn(shape, generator=generator) * fan**-0.5
        expansion[f"{name}.bias"] = torch.zeros(shape[0])
    path = tmp_path_factory.mktemp("features") / "lite0.safetensors"
    save_file(expansion, path)
    return path
