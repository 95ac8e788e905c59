"""Pictures of the real interface: python -m tools.screenshot [nodes] [interface]

nodes: web/docs/NODE.png for the help pages. interface: docs/interface.png, the first template in
the middle of its run. Both without arguments.
tools/thumbnails.py makes the thumbnails and the README's before and after. Fails on a console error
of ours. Set INFDIT_COMFYUI to a ComfyUI's source folder.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from tools.browser import EXAMPLES, ROOT, interface, open_workflow, settle
from tools.make_workflows import START

DOCS = ROOT / "docs"
HELP = ROOT / "web" / "docs"
NODE_WIDTH = 300
"""px; a help panel shows 312."""
CLIP = {"x": 0, "y": 0, "width": 1800, "height": 940}
"""px of the page of the interface's picture."""
_RUN_MS = 600_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=["nodes", "interface", []])
    wanted = parser.parse_args().what or ["nodes", "interface"]
    errors: list[str] = []
    with interface() as shown:
        page = shown.page
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if "nodes" in wanted:
            for folder in sorted(HELP.glob("*/")):
                node(page, folder.name)
        if "interface" in wanted:
            mid_run(page, EXAMPLES / f"{START}.json", DOCS / "interface.png")
    ours = [error for error in errors if "infdit" in error.lower() or "inf-dit" in error.lower()]
    if ours:
        raise SystemExit("\n".join(ours))


def node(page: Any, kind: str) -> None:
    """A picture of a node for its help page."""
    box = page.evaluate(
        """([kind, width, number]) => {
          app.graph.clear();
          app.graph.state.lastNodeId = number;  // what an id was shown with stays with it
          const node = LiteGraph.createNode(kind);
          node.pos = [0, 0];
          app.graph.add(node);
          node.size = [width, node.computeSize()[1]];
          app.canvas.ds.scale = 1.25;
          app.canvas.ds.offset = [200, 200];
          app.canvas.setDirty(true, true);
          return [node.size[0], node.size[1]];
        }""",
        [kind, NODE_WIDTH, 1000 + sum(kind.encode())],
    )
    settle(page)
    x, y, margin = 250, 250, 12
    width, height, title = (round(1.25 * n) for n in (*box, 30))
    clip = {
        "x": x - margin,
        "y": y - title - 1,
        "width": width + 2 * margin,
        "height": height + title + margin,
    }
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip)))
    shot.convert("RGB").quantize(64).save(HELP / f"{kind}.png", optimize=True)


def mid_run(page: Any, path: Path, target: Path) -> None:
    """The interface while Inf-DiT Upscale shows the preview of a step past the middle.

    The detail is larger than the template's, so that the run lasts until the picture is taken.
    """
    open_workflow(page, path)
    page.evaluate(
        """() => {
          const crop = app.graph._nodes.find(n => n.type === 'ImageCropV2');
          const detail = { x: 128, y: 0, width: 512, height: 512 };
          for (const widget of crop.widgets) {
            const [key] = widget.name.split('.').slice(-1);
            if (key in detail) widget.value = detail[key];
            else widget.value = detail;
          }
          window.ended = false;
          app.api.addEventListener('execution_success', () => { window.ended = true; });
          app.queuePrompt(0, 1);
        }"""
    )
    page.wait_for_function(
        "() => app.graph._nodes.find(n => n.type === 'InfDiTSampler').progress >= 0.5",
        timeout=_RUN_MS,
        polling=100,
    )
    page.screenshot(path=target, clip=CLIP)
    if page.evaluate("() => window.ended"):
        raise SystemExit(f"{target}: the run was over before the picture was taken; try again")
    page.evaluate("() => app.api.interrupt()")


if __name__ == "__main__":
    main()
