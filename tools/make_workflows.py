"""Make the example workflows from their API copies: python -m tools.make_workflows [TITLE ...]

The graphs are those of tests/workflows; the real interface loads each, this lays its nodes out in
columns, adds the note, and writes what the interface would save, so that an example always has the
widgets of the present schemas. To add one: its graph into tests/workflows, a line into
`EXAMPLES_OF`.
Set INFDIT_COMFYUI to a ComfyUI's source folder.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tools.browser import CHECKPOINT, EXAMPLES, ROOT, interface

SUBGRAPHS = ROOT / "subgraphs"
BLUEPRINT = "Inf-DiT 4x"
API = ROOT / "tests" / "workflows"
SDXL_URL = (
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/" + CHECKPOINT
)
CORE_VERSION = "0.30.0"
OWN_PREFIXES = ("InfDiT", "HiDiffusion")
COLUMN_GAP, ROW_GAP, TITLE_HEIGHT = 80, 50, 40
WIDTH, PREVIEW_HEIGHT = 340, 360
PREVIEWS = ("LoadImage", "SaveImage", "ImageCompare")
NOTE = "MarkdownNote"

_MODEL_NOTE = (
    "`infdit_small.safetensors` comes with the pack and shows the method. The authors' released"
    " model gives far better pictures: put it into `models/infdit` and choose it in Load Inf-DiT"
    " Checkpoint."
)


class Example(NamedTuple):
    """An example workflow."""

    graph: str
    """Name in tests/workflows, without `.json`."""
    note: str


EXAMPLES_OF = {
    "Upscale a picture": Example(
        "upscale_picture",
        "**Two nodes to a result.**\n\nChoose a picture and press Run. `upscale_by` takes any"
        " number from 1 to 8; *fast* and *draft* save time.\n\n" + _MODEL_NOTE,
    ),
    "SDXL to 4K": Example(
        "sdxl_4k",
        "**SDXL draws 1024×1024, Inf-DiT makes 4096×4096 of it.**\n\n" + _MODEL_NOTE,
    ),
    "SDXL to 8K in two passes": Example(
        "sdxl_8k_two_passes",
        "**1024 → 4096 → 8192.**\n\nThe second pass sees the result of the first. To start from a"
        " base of 2048, see *SDXL 2048 with HiDiffusion, then Inf-DiT to 8K*.\n\n" + _MODEL_NOTE,
    ),
    "SDXL 2048 with HiDiffusion, then Inf-DiT to 8K": Example(
        "sdxl_hidiffusion_8k",
        "**SDXL draws 2048×2048 in one pass, Inf-DiT makes 8192×8192 of it.**\n\nHiDiffusion in"
        " *auto* finds the right steps for SDXL; SD 1.5 works, too, at 1024×1024. Take a sampler"
        " that adds noise, such as euler_ancestral, and 20 to 50 steps. 8192×8192 takes its time:"
        " `upscale_by` 2 gives 4096×4096, the preset *fast* takes a third of the evaluations."
        "\n\n" + _MODEL_NOTE,
    ),
    "Upscale a folder": Example(
        "upscale_folder",
        "**Every picture of a folder.**\n\nMake a folder in ComfyUI's `input` folder, put pictures"
        " into it, reload the page, and choose it here. They may differ in size: they are upscaled"
        " one after the other.\n\n" + _MODEL_NOTE,
    ),
    "Advanced sampling with KSampler": Example(
        "advanced_ksampler",
        "**Any core sampler.**\n\n`heun`, `karras`, 20 steps and cfg 1 are the authors' choice and"
        " give the same picture as Inf-DiT Upscale. Keep cfg at 1; guidance by text comes from"
        " Inf-DiT CLIP Guidance.\n\n" + _MODEL_NOTE,
    ),
    "Before and after": Example(
        "before_after",
        "**Inf-DiT beside bicubic enlargement.**\n\nBoth are saved side by side. Compare Images"
        " shows them under a slider where *Nodes 2.0* are switched on in the settings.\n\n"
        + _MODEL_NOTE,
    ),
}


def main() -> None:
    titles = sys.argv[1:] or [*EXAMPLES_OF, BLUEPRINT]
    with interface() as (_, page):
        if BLUEPRINT in titles:
            titles.remove(BLUEPRINT)
            graph = json.loads((API / "upscale_picture.json").read_text())
            SUBGRAPHS.mkdir(exist_ok=True)
            write(SUBGRAPHS / f"{BLUEPRINT}.json", BLUEPRINT, blueprint(page, graph))
        for title in titles:
            example = EXAMPLES_OF[title]
            graph = json.loads((API / f"{example.graph}.json").read_text())
            for node in graph.values():
                if node["class_type"] == "LoadImage":
                    node["inputs"]["image"] = "example.png"  # which every ComfyUI has
            page.evaluate("graph => app.loadApiJson(graph, 'example')", graph)
            page.wait_for_timeout(2000)
            sizes = page.evaluate(
                "() => Object.fromEntries(app.graph._nodes.map(n => [n.id, n.computeSize()]))"
            )
            positions = layout(graph, {k: size[1] for k, size in sizes.items()})
            saved = page.evaluate(_PLACE, [positions, note_place(positions, example.note)])
            write(EXAMPLES / f"{title}.json", title, saved)


def blueprint(page: Any, graph: dict[str, Any]) -> dict[str, Any]:
    """The loader and the upscaler of a graph as one node, as the interface would publish it."""
    page.evaluate("graph => app.loadApiJson(graph, 'blueprint')", graph)
    page.wait_for_timeout(2000)
    return page.evaluate(
        """([name, prefix]) => {
          const own = app.graph._nodes.filter(n => n.type.startsWith(prefix));
          const { node } = app.graph.convertToSubgraph(new Set(own));
          node.title = node.subgraph.name = name;
          for (const other of [...app.graph._nodes]) if (other !== node) app.graph.remove(other);
          node.pos = [0, 0];
          return app.graph.serialize();
        }""",
        [BLUEPRINT, OWN_PREFIXES[0]],
    )


def layout(graph: dict[str, Any], heights: dict[str, float]) -> dict[str, list[float]]:
    """Columns from inputs to results: x, y, width and height of each node by its id."""
    depths: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in depths:
            sources = [v[0] for v in graph[key]["inputs"].values() if isinstance(v, list)]
            depths[key] = 1 + max(map(depth, sources), default=-1)
        return depths[key]

    for key in graph:
        depth(key)
    for key in graph:  # loaders stand beside what uses them, not in the first column
        uses = [depths[k] for k, n in graph.items() if any(
            isinstance(v, list) and v[0] == key for v in n["inputs"].values()
        )]  # fmt: skip
        if depths[key] == 0 and uses:
            depths[key] = min(uses) - 1
    bottoms: dict[int, float] = {}
    places = {}
    for key, node in graph.items():
        column = depths[key]
        height = heights[key]
        if node["class_type"] in PREVIEWS:
            height = max(height, PREVIEW_HEIGHT)
        y = bottoms.get(column, 0.0)
        places[key] = [column * (WIDTH + COLUMN_GAP), y, WIDTH, height]
        bottoms[column] = y + height + TITLE_HEIGHT + ROW_GAP
    return places


def note_place(places: dict[str, list[float]], text: str) -> list[Any]:
    """Under the first column: x, y, width, height and the text."""
    bottom = max(y + height for x, y, _, height in places.values() if x == 0)
    return [0, bottom + TITLE_HEIGHT + ROW_GAP, WIDTH, 120 + len(text) / 2.2, text]


_PLACE = """([places, note]) => {
  for (const node of app.graph._nodes) {
    const [x, y, width, height] = places[String(node.id)];
    node.pos = [x, y];
    node.size = [width, height];
  }
  for (const node of app.graph._nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name === 'control_after_generate') widget.value = 'fixed';
  const text = LiteGraph.createNode('MarkdownNote');
  text.pos = [note[0], note[1]];
  text.size = [note[2], note[3]];
  app.graph.add(text);
  text.widgets[0].value = note[4];
  return app.graph.serialize();
}"""


def write(path: Path, title: str, workflow: dict[str, Any]) -> None:
    """Write what the interface saved, with what the registry asks of every node."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    version = found[1] if found else ""
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, title))  # the same in every run
    inner = [g["nodes"] for g in workflow.get("definitions", {}).get("subgraphs", [])]
    for node in chain(workflow["nodes"], *inner):
        own = node["type"].startswith(OWN_PREFIXES)
        node["pos"], node["size"] = ([round(v) for v in node[k]] for k in ("pos", "size"))
        if node["type"] == NOTE or "-" in node["type"]:  # a subgraph's type is its UUID
            node["properties"] = {}
            continue
        node["properties"] = {
            "cnr_id": "comfyui-infdit" if own else "comfy-core",
            "ver": version if own else CORE_VERSION,
            "Node name for S&R": node["type"],
        }
        if node["type"] == "CheckpointLoaderSimple":
            node["properties"]["models"] = [
                {"name": CHECKPOINT, "url": SDXL_URL, "directory": "checkpoints"}
            ]
    workflow.setdefault("extra", {}).pop("ds", None)
    path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
