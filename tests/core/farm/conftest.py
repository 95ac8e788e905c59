"""The tiny network that needs no CLIP."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.goldens import golden


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    weights = golden("xs/model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("cond_embed.")}, path)
    return path
