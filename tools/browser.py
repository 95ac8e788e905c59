"""The real web interface: this pack in a ComfyUI server, seen by headless Chromium.

Needs playwright from the package index and a Chromium (Debian's `chromium`).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.comfy_server import ROOT, ComfyServer, make_base, running_server

EXAMPLES = ROOT / "example_workflows"
PICTURE = ROOT / "examples" / "demo_photo.png"
CHECKPOINT = "sd_xl_base_1.0.safetensors"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
_LOADING_MS = 120_000


@contextmanager
def interface(
    width: int = 1800, height: int = 1000, frontend: Path | None = None
) -> Iterator[tuple[ComfyServer, Any]]:
    """A server in the base of `dev.py comfyui`, with the name of SDXL, and a page that shows it.

    The source of ComfyUI is taken from the environment variable INFDIT_COMFYUI; `frontend` is the
    `static` folder of another interface than the one that goes with it.
    """
    from playwright.sync_api import sync_playwright

    source = Path(os.environ["INFDIT_COMFYUI"])
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), source)
        checkpoints = base / "models" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / CHECKPOINT).touch()  # only its name is needed
        python = Path(sys.executable)
        arguments = ["--cpu", *(["--front-end-root", str(frontend)] if frontend else [])]
        with (
            running_server(python, source, base, arguments=arguments, threads=2) as server,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=FLAGS
            )
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(server.url)
            page.wait_for_function("() => window.app?.extensionManager", timeout=_LOADING_MS)
            page.wait_for_function("() => LiteGraph.registered_node_types.InfDiTSampler")
            page.wait_for_timeout(3000)
            page.keyboard.press("Escape")  # the dialog that an empty profile gets
            page.evaluate("() => app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
            page.wait_for_timeout(500)
            yield server, page
            browser.close()


def fit_view(page: Any) -> None:
    """Scale and move the canvas so that every node is seen."""
    page.evaluate(
        """() => {
          const nodes = app.graph._nodes, canvas = app.canvas;
          const left = Math.min(...nodes.map(n => n.pos[0]));
          const top = Math.min(...nodes.map(n => n.pos[1])) - 40;
          const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
          const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
          const menu = 70, bar = 90;
          const width = window.innerWidth - menu - 40, height = window.innerHeight - bar - 40;
          const scale = Math.min(1.1, width / (right - left), height / (bottom - top));
          canvas.ds.scale = scale;
          canvas.ds.offset = [
            (menu + 20 + (width - scale * (right - left)) / 2) / scale - left,
            (bar + (height - scale * (bottom - top)) / 2) / scale - top,
          ];
          canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(1500)
