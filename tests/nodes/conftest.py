"""What the tests of the nodes share."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.nodes.photos import SIZES, put


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """ComfyUI's input and output folder, with pictures in input/photos."""
    folder_paths = importlib.import_module("folder_paths")
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    put(tmp_path / "input" / "photos", SIZES)
    return tmp_path / "input", tmp_path / "output"


@pytest.fixture
def bar(comfy, monkeypatch):
    """Everything that the progress bar was told: (value, total, preview)."""
    utils, told = importlib.import_module("comfy.utils"), []
    monkeypatch.setattr(
        utils, "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: told.append((value, total, preview)),
    )  # fmt: skip
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0)
    return told


@pytest.fixture
def evaluations(comfy, monkeypatch) -> list:
    """Grows by one with every evaluation of the network."""
    net = comfy.module("infdit_core.network.model").InfDiT
    forward, seen = net.forward, []

    def counted(self, *args, **kwargs):
        seen.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(net, "forward", counted)
    return seen


@pytest.fixture
def texts(comfy, monkeypatch) -> list[str]:
    """Every line that Inf-DiT Upscale or Inf-DiT Upscale Folder showed."""
    told, progress = [], comfy.module("nodes.infdit.progress")
    server = SimpleNamespace(
        instance=SimpleNamespace(send_progress_text=lambda text, node_id: told.append(text))
    )
    monkeypatch.setattr(progress, "PromptServer", server)
    hidden = SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)
    for node in ("InfDiTSampler", "InfDiTUpscaleFolder"):
        monkeypatch.setattr(comfy.nodes[node], "hidden", hidden, raising=False)
    return told


@pytest.fixture
def clock(comfy, monkeypatch) -> SimpleNamespace:
    """The time that progress sees: `clock.now` in seconds."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(comfy.module("nodes.infdit.progress"), "time", clock)
    return clock
