"""Look at the pack in the real interface: python -m tools.screenshot [--only TITLE] [--nodes]

Opens every example workflow in headless Chromium, fails on a missing node, a missing link or a
console error of ours, and runs "Upscale a picture" until its picture stands in Save Image. Writes
docs/templates.png, docs/interface.png, the nodes of the help pages, and the thumbnails: before and
after for the examples that the bundled model can run, the graph for the others. Set INFDIT_COMFYUI
to a ComfyUI's source folder.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tools.browser import EXAMPLES, PICTURE, ROOT, fit_view, interface

DOCS = ROOT / "docs"
HELP = ROOT / "web" / "docs"
RUN = "Upscale a picture"
PICTURES = {RUN, "Upscale a folder", "Advanced sampling with KSampler", "Before and after"}
THUMBNAIL = 768
_RUN_MS = 600_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one example, and nothing else")
    parser.add_argument("--nodes", action="store_true", help="the nodes, and nothing else")
    args = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    errors: list[str] = []
    with interface() as (server, page):
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if not args.only:
            for help_page in sorted(HELP.glob("InfDiT*.md")):
                node(page, help_page.stem)
        paths = [] if args.nodes else sorted(EXAMPLES.glob("*.json"))
        for path in paths if not args.only else [EXAMPLES / f"{args.only}.json"]:
            show(page, path)
            if path.stem in PICTURES:
                queue(page)
                before_after(server.input_dir.parent / "output", path.with_suffix(".jpg"))
            else:
                canvas(page, path.with_suffix(".jpg"))
        if not args.only and not args.nodes:
            show(page, EXAMPLES / f"{RUN}.json")
            queue(page)
            page.screenshot(path=DOCS / "interface.png")
            templates(page)
    ours = [error for error in errors if "infdit" in error.lower() or "inf-dit" in error.lower()]
    if ours:
        raise SystemExit("\n".join(ours))


def show(page: Any, path: Path) -> None:
    """Load a workflow and insist that every node and link of it is there."""
    workflow = json.loads(path.read_text())
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(2500)
    found = page.evaluate(
        """() => ({
          nodes: app.graph._nodes.map(n => [n.type, !!LiteGraph.registered_node_types[n.type]]),
          links: [...app.graph.links.values()].length,
          overlaps: app.graph._nodes.flatMap(a => app.graph._nodes.filter(b => a.id < b.id
            && a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0]
            && a.pos[1] - 30 < b.pos[1] + b.size[1] && b.pos[1] - 30 < a.pos[1] + a.size[1]
          ).map(b => [a.type, b.type])),
        })"""
    )
    missing = [kind for kind, known in found["nodes"] if not known]
    if missing or len(found["nodes"]) != len(workflow["nodes"]):
        raise SystemExit(f"{path.name}: missing nodes {missing}")
    if found["links"] != len(workflow["links"]):
        raise SystemExit(f"{path.name}: {found['links']} links of {len(workflow['links'])}")
    if found["overlaps"]:
        raise SystemExit(f"{path.name}: nodes over each other: {found['overlaps']}")
    fit_view(page)


def node(page: Any, kind: str) -> None:
    """A picture of a node for its help page."""
    box = page.evaluate(
        """kind => {
          app.graph.clear();
          const node = LiteGraph.createNode(kind);
          node.pos = [0, 0];
          app.graph.add(node);
          node.size = [360, node.computeSize()[1]];
          app.canvas.ds.scale = 1.25;
          app.canvas.ds.offset = [200, 200];
          app.canvas.setDirty(true, true);
          return [node.size[0], node.size[1]];
        }""",
        kind,
    )
    page.wait_for_timeout(1200)
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


def canvas(page: Any, path: Path) -> None:
    """A thumbnail of what the page shows of the graph."""
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot = shot.crop((60, 80, shot.width, shot.height))
    shot.thumbnail((THUMBNAIL, THUMBNAIL))
    shot.save(path, quality=85)


def before_after(output: Path, path: Path) -> None:
    """A thumbnail of the last result, its left half as it was."""
    newest = max(output.glob("*.png"), key=lambda p: p.stat().st_mtime)
    after = Image.open(newest).convert("RGB")
    if path.stem != "Before and after":  # which is so already
        before = Image.open(PICTURE).convert("RGB").resize(after.size, Image.Resampling.NEAREST)
        after.paste(before.crop((0, 0, after.width // 2, after.height)))
    after.thumbnail((THUMBNAIL, THUMBNAIL))
    after.save(path, quality=88)


def queue(page: Any) -> None:
    """Run the workflow as the Run button does and wait for the picture in Save Image."""
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function(
        "() => app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs && n.imgs.length)",
        timeout=_RUN_MS,
    )
    page.wait_for_timeout(1500)


def templates(page: Any) -> None:
    """The template browser at our workflows."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.wait_for_timeout(4000)
    page.get_by_text("comfyui-infdit").first.click()
    page.wait_for_timeout(3000)
    page.screenshot(path=DOCS / "templates.png")


if __name__ == "__main__":
    main()
