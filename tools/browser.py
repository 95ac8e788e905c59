"""The real web interface: this pack in a ComfyUI server, seen by headless Chromium.

Needs playwright from the package index and a Chromium (Debian's `chromium`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.comfy_server import ROOT, ComfyServer, make_base, running_server

EXAMPLES = ROOT / "example_workflows"
FRONTEND = "comfyui-frontend-package==1.58.1"
"""The newest that is to be had; ComfyUI 0.30 brings 1.47."""
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
        upscalers = base / "models" / "upscale_models"
        upscalers.mkdir(parents=True)
        (upscalers / "RealESRGAN_x4plus.safetensors").touch()
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


def newest_frontend(folder: Path) -> Path:
    """The `static` folder of the newest interface, from the package index; `folder` keeps it."""
    target = folder / FRONTEND.replace("==", "-")
    static = target / "comfyui_frontend_package" / "static"
    if not static.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(target), FRONTEND], check=True)
    return static


def open_workflow(page: Any, path: Path) -> None:
    """Load a workflow as the template browser does."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, path.stem])
    page.wait_for_timeout(2000)


def run_workflow(page: Any, timeout_ms: float = 600_000) -> None:
    """Run what is open as the Run button does; raises RuntimeError if it fails."""
    page.evaluate(
        """() => {
          window.ended = null;
          const listen = (name, end) =>
            app.api.addEventListener(name, e => { window.ended = end(e); });
          listen('execution_success', () => 'done');
          listen('execution_error', e => e.detail.node_type + ': ' + e.detail.exception_message);
          listen('execution_interrupted', () => 'interrupted');
          app.queuePrompt(0, 1);
        }"""
    )
    page.wait_for_function("() => window.ended", timeout=timeout_ms)
    page.wait_for_timeout(1500)
    ended = page.evaluate("() => window.ended")
    if ended != "done":
        raise RuntimeError(ended)


def nodes_2(page: Any, on: bool) -> None:
    """Switch between classic nodes and Nodes 2.0."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
    page.wait_for_timeout(1000)


def boxes(page: Any) -> dict[str, list[float]]:
    """x, y, width and height of each node as drawn, title included, in px of the graph."""
    return page.evaluate(
        """() => {
          const scale = app.canvas.ds.scale, found = {};
          for (const node of app.graph._nodes) {
            const shown = document.querySelector(`[data-node-id="${node.id}"]`);
            const box = shown?.getBoundingClientRect();
            const [width, height] = box ? [box.width / scale, box.height / scale]
              : [node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT];
            const y = node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT;
            found[`${node.id} ${node.type}`] = [node.pos[0], y, width, height];
          }
          return found;
        }"""
    )
