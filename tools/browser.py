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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file

from tools.comfy_server import ROOT, ComfyServer, make_base, running_server

EXAMPLES = ROOT / "example_workflows"
FRONTEND = "comfyui-frontend-package==1.58.1"
"""The newest that is to be had; ComfyUI 0.30 brings 1.47."""
CHECKPOINT = "sd_xl_base_1.0.safetensors"
UPSCALER = "RealESRGAN_x4plus.safetensors"
DIMR = "DiMR-XL_2R_800epochs.pth"
VAE = "vae-ft-mse-840000-ema-pruned.safetensors"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-gpu-watchdog", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-extensions"]  # fmt: skip
"""On a busy machine the watchdog takes a slow drawing process for a dead one."""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False,
            "LiteGraph.Canvas.MaximumFps": 15}  # fmt: skip
"""No dialog that a new user gets, nothing over the graph, and time left for the server."""
_LOADING_MS = 180_000
_SETTLED = 6
"""Looks, a quarter of a second apart, in which nothing may have moved."""
_TRIES = 3

T = TypeVar("T")


class Interface:
    """A server, and a page of headless Chromium that shows it; one that died is started again."""

    def __init__(self, playwright: Any, server: ComfyServer, width: int, height: int) -> None:
        self.server = server
        self.nodes_2 = False
        """Whether a new page shows Nodes 2.0."""
        self._playwright = playwright
        self._size = {"width": width, "height": height}
        self._browser: Any = None
        self._page: Any = None
        self._crashed = False

    @property
    def page(self) -> Any:
        """The page, with the interface loaded."""
        if self._page is None or not self.alive:
            self._start()
        return self._page

    @property
    def alive(self) -> bool:
        """Whether the browser and its page are there."""
        return bool(self._browser and self._browser.is_connected()) and not self._crashed

    def attempt(self, steps: Callable[[Any], T]) -> T:
        """What `steps` return of the page; again from their start if the browser dies in them."""
        for _ in range(_TRIES - 1):
            try:
                return steps(self.page)
            except Exception:
                if self.alive:
                    raise
        return steps(self.page)

    def close(self) -> None:
        """End the browser."""
        if self._browser is not None and self._browser.is_connected():
            self._browser.close()

    def _start(self) -> None:
        self.close()
        self._browser = self._playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=FLAGS, timeout=_LOADING_MS
        )
        page = self._page = self._browser.new_page(viewport=self._size)
        self._crashed = False

        def crash(_: Any) -> None:
            self._crashed = True

        page.on("crash", crash)
        page.set_default_timeout(_LOADING_MS)
        page.goto(self.server.url)
        page.wait_for_function("() => window.app?.extensionManager?.setting && app.graph")
        page.wait_for_function("() => LiteGraph.registered_node_types.InfDiTSampler")
        settle(page)
        nodes_2(page, self.nodes_2)


@contextmanager
def interface(
    width: int = 1800, height: int = 1000, frontend: Path | None = None
) -> Iterator[Interface]:
    """A server in the base of `dev.py comfyui`, with models for all examples, and its interface.

    The source of ComfyUI is taken from the environment variable INFDIT_COMFYUI; `frontend` is the
    `static` folder of another interface than the one that goes with it.
    """
    from playwright.sync_api import sync_playwright

    source = Path(os.environ["INFDIT_COMFYUI"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = make_base(Path(folder), source)
        user = base / "user" / "default"
        user.mkdir(parents=True, exist_ok=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        kinds = {"checkpoints": CHECKPOINT, "upscale_models": UPSCALER, "vae": VAE}
        for kind, name in kinds.items():
            (base / "models" / kind).mkdir(parents=True)
            (base / "models" / kind / name).touch()  # only its name is needed
        (base / "models" / "infdit").mkdir()
        # What DiMR Loader knows such a file by, in the format that needs no torch
        weights = {"stages.0.input_layer.1.weight": np.zeros(1, np.float32)}
        save_file(weights, base / "models" / "infdit" / DIMR)
        python = Path(sys.executable)
        arguments = ["--cpu", *(["--front-end-root", str(frontend)] if frontend else [])]
        with (
            running_server(python, source, base, arguments=arguments, threads=2) as server,
            sync_playwright() as playwright,
        ):
            shown = Interface(playwright, server, width, height)
            try:
                yield shown
            finally:
                shown.close()


def newest_frontend(folder: Path) -> Path:
    """The `static` folder of the newest interface, from the package index; `folder` keeps it."""
    target = folder / FRONTEND.replace("==", "-")
    static = target / "comfyui_frontend_package" / "static"
    if not static.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(target), FRONTEND], check=True)
    return static


_BOXES = """() => {
  const scale = app.canvas.ds.scale, found = {};
  for (const node of app.graph._nodes) {
    const shown = document.querySelector(`[data-node-id="${node.id}"]`);
    const box = shown?.getBoundingClientRect();
    const [width, height] = box ? [box.width / scale, box.height / scale]
      : [node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT];
    const y = node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT;
    found[`${node.id} ${node.type}`] = [node.pos[0], y, width, height].map(Math.round);
  }
  return found;
}"""


def settle(page: Any) -> None:
    """Return when the nodes that are shown have stopped moving and growing."""
    page.evaluate("() => { window.looks = []; }")
    page.wait_for_function(
        f"""() => {{
          const now = JSON.stringify(({_BOXES})());
          looks = looks.length && looks[0] !== now ? [now] : [...looks, now];
          return looks.length > {_SETTLED};
        }}""",
        polling=250,
    )


def open_workflow(page: Any, path: Path) -> None:
    """Load a workflow as the template browser does."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, path.stem])
    settle(page)


def run_workflow(page: Any, timeout_ms: float = 900_000) -> None:
    """Run what is open as the Run button does; raises RuntimeError if it fails."""
    page.evaluate(
        """() => {
          window.ended = null;
          const listen = (name, end) =>
            app.api.addEventListener(name, e => { window.ended = end(e); }, { once: true });
          listen('execution_success', () => 'done');
          listen('execution_error', e => e.detail.node_type + ': ' + e.detail.exception_message);
          listen('execution_interrupted', () => 'interrupted');
          app.queuePrompt(0, 1);
        }"""
    )
    page.wait_for_function("() => window.ended", timeout=timeout_ms, polling=250)
    settle(page)
    ended = page.evaluate("() => window.ended")
    if ended != "done":
        raise RuntimeError(ended)


def nodes_2(page: Any, on: bool) -> None:
    """Switch between classic nodes and Nodes 2.0."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
    settle(page)


def boxes(page: Any) -> dict[str, list[float]]:
    """x, y, width and height of each node as drawn, title included, in px of the graph."""
    return page.evaluate(_BOXES)
