"""The interface that ComfyUI brings and the newest one, each in one browser for all tests."""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.browser.files import put_files
from tools.browser import Interface, interface, newest_frontend
from tools.environment import cache_dir


@pytest.fixture(scope="session", params=["shipped", "newest"])
def shown(request, comfy_source) -> Iterator[Interface]:
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium: apt-get install chromium")
    os.environ["INFDIT_COMFYUI"] = str(comfy_source)
    frontend = newest_frontend(cache_dir() / "frontend") if request.param == "newest" else None
    with interface(frontend=frontend) as shown:
        put_files(shown.server)
        yield shown
