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
