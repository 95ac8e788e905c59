"""What the tests of the nodes share."""

import importlib

import pytest


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
