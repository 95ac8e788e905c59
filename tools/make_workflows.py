"""Make the example workflows from their API copies: python -m tools.make_workflows [TITLE ...]

The graphs are those of tests/workflows; the real interface loads each, this lays its nodes out in
the rows of `EXAMPLES_OF`, adds the note, and writes what the interface would save, so that an
example always has the widgets of the present schemas. To add one: its graph into tests/workflows,
an entry into `EXAMPLES_OF`, a detail of a photograph into `tools/thumbnails.py`.
Set INFDIT_COMFYUI to a ComfyUI's source folder.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tools.browser import CHECKPOINT, EXAMPLES, ROOT, UPSCALER, interface, settle

SUBGRAPHS = ROOT / "subgraphs"
BLUEPRINT = "Inf-DiT 4x"
API = ROOT / "tests" / "workflows"
ESRGAN_URL = "https://huggingface.co/Comfy-Org/Real-ESRGAN_repackaged/resolve/main/" + UPSCALER
SDXL_URL = (
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/" + CHECKPOINT
)
CORE_VERSION = "0.30.0"
OWN_PREFIXES = ("InfDiT", "HiDiffusion", "UpsampleGuidance")
MAX_WIDTH = 1700
"""px; a wider graph opens so small that the interface draws no text."""
SCREEN = 1700, 880
"""px of the canvas that an example fills when it is opened, on a screen of 1800x1000."""
SCALES = 0.65, 1.0
WIDTH, GAP, TITLE_HEIGHT, GROUP_TITLE, LANE = 300, 50, 40, 50, 16
ROOM = {
    "LoadImage": 30,
    "ImageCropV2": 320,
    "SaveImage": 330,
    "PreviewImage": 330,
    "InfDiTSampler": 260,
    "InfDiTUpscaleFolder": 260,
    "KSampler": 200,
}
"""px below the widgets of a node for the picture that it shows during or after a run."""
STYLES = 40
"""px that any other node may be higher in Nodes 2.0 than in classic nodes."""
SHORT = {"CheckpointLoaderSimple": 100}
"""Heights of nodes that claim far more than they use."""
NOTE = "MarkdownNote"
NOTE_HEIGHT = 500

_MODEL_NOTE = """

---
**The model**

`infdit_small.safetensors` comes with the pack: small, for a first look. The authors' model makes \
far better pictures. The README of \
[github.com/THUDM/Inf-DiT](https://github.com/THUDM/Inf-DiT) links its file, \
`mp_rank_00_model_states.pt`, about 2.5 GB. Put it here as it is, press `R`, and choose it in \
*Load Inf-DiT Checkpoint*:

```
ComfyUI/
└ models/
  └ infdit/
    └ mp_rank_00_model_states.pt
```"""


class Row(NamedTuple):
    """Nodes side by side."""

    title: str
    """Of the group around them; none around them if empty."""
    columns: tuple[tuple[str, ...], ...]
    """Ids in the graph from top to bottom, column by column; `NOTE` is the note."""


class Example(NamedTuple):
    """An example workflow."""

    graph: str
    """Name in tests/workflows, without `.json`."""
    note: str
    rows: tuple[Row, ...]
    titles: dict[str, str] = {}  # noqa: RUF012 (never changed)
    """Names of nodes that say more than their own."""


_BYPASS = (
    " To stay quick, *Crop Image* cuts out a detail. Move its frame, or type `x` and `y`; to"
    " upscale the whole picture, select the node and press `Ctrl+B`."
)
START = "Inf-DiT upscale (start here)"
EXAMPLES_OF = {
    START: Example(
        "start_here",
        "**Choose a picture and press Run.**\n\n" + _BYPASS.strip() + "\n\n`upscale_by` takes any"
        " number from 1 to 8. `denoise` 0 keeps what is there and sharpens it, 1 invents most.",
        (Row("", (("1",), ("5", "2"), ("3",), ("4",), (NOTE,))),),
        {"5": "Crop Image (off: Ctrl+B)"},
    ),
    "SDXL to 4K": Example(
        "sdxl_4k",
        "**SDXL draws 1024×1024, Inf-DiT makes 4096×4096 of it.**\n\nFor a quick look set `preset`"
        " to *draft* or `upscale_by` to 2.",
        (
            Row("1 Draw", (("1", "4"), ("2", "3"), ("5",), ("6",))),
            Row("2 Upscale", ((NOTE,), ("7",), ("8",), ("9",))),
        ),
    ),
    "SDXL to 8K in two passes": Example(
        "sdxl_8k_two_passes",
        "**1024 → 4096 → 8192.**\n\nThe second pass sees the result of the first. To start from a"
        " base of 2048, see *SDXL 2048 with HiDiffusion, then Inf-DiT to 8K*.",
        (
            Row("1 Draw", ((NOTE,), ("1", "4"), ("2", "3"), ("5",), ("6",))),
            Row("2 Upscale", (("7",), ("8",), ("9",), ("10",), ("11",))),
        ),
    ),
    "SDXL 2048 with HiDiffusion, then Inf-DiT to 8K": Example(
        "sdxl_hidiffusion_8k",
        "**SDXL draws 2048×2048 in one pass, Inf-DiT makes 8192×8192 of it.**\n\nHiDiffusion in"
        " *auto* finds the right steps for SDXL; SD 1.5 works too, at 1024×1024. Take a sampler"
        " that adds noise, such as euler_ancestral, and 20 to 50 steps. 8192×8192 takes its time:"
        " `upscale_by` 2 gives 4096×4096, the preset *fast* takes a third of the evaluations.",
        (
            Row("1 Draw", (("1", "5"), ("2", "3"), ("4",), ("6",), ("7", "8"))),
            Row("2 Upscale", ((NOTE,), ("9",), ("10",), ("11",))),
        ),
    ),
    "Upscale a folder": Example(
        "upscale_folder",
        "**Every picture of a folder.**\n\nMake a folder in ComfyUI's `input` folder, put pictures"
        " into it, reload the page, and choose it here. They may differ in size. Each result is"
        " written as soon as it is done, into a folder of the same name in `output`; after a"
        " cancel, queue again and it goes on.",
        (Row("", (("1",), ("2",), (NOTE,))),),
    ),
    "Advanced sampling with KSampler": Example(
        "advanced_ksampler",
        "**Any core sampler.**\n\n`heun`, `karras`, 20 steps and cfg 1 are the authors' choice and"
        " give the same picture as Inf-DiT Upscale. Keep cfg at 1; guidance by text comes from"
        " Inf-DiT CLIP Guidance." + "\n\n" + _BYPASS.strip(),
        (
            Row("1 Prepare", (("1",), ("7",), ("2", "3"), (NOTE,))),
            Row("2 Sample", (("4",), ("5",), ("6",))),
        ),
    ),
    "Before and after": Example(
        "before_after",
        "**Inf-DiT beside bicubic enlargement.**\n\nThe picture that is saved shows bicubic on the"
        " left and Inf-DiT on the right." + _BYPASS + "\n\nWith *Nodes 2.0* switched on in the"
        " settings, core's *Compare Images* shows the two under a slider.",
        (Row("", (("1", NOTE), ("5", "2"), ("3", "4"), ("6", "7"))),),
        {"4": "Bicubic, for the left side", "7": "Left: bicubic. Right: Inf-DiT"},
    ),
    "Which setting": Example(
        "which_setting",
        "**One detail, three settings.**\n\nFrom left to right: little noise keeps what is there;"
        " *fast* invents; *exact* is the authors' solver. Move the frame of *Crop Image* to a"
        " detail that matters to you, run, and take the setting that you like best.",
        (Row("", (("1", "2"), ("3", NOTE), ("4", "5"), ("6", "7"), ("8", "9"))),),
        {
            "4": "fast, denoise 0.4: 5 evaluations",
            "5": "fast, denoise 0.4",
            "6": "fast: 12 evaluations",
            "7": "fast",
            "8": "exact: 39 evaluations",
            "9": "exact",
        },
    ),
    "Refine another upscaler's picture": Example(
        "refine_picture",
        "**Another upscaler first, Inf-DiT after it.**\n\nAny model of *Load Upscale Model*, such"
        " as an ESRGAN, makes the first picture. It is `start_image`; `denoise` says how much of it"
        " is drawn anew: 0.2 keeps most, 0.6 little." + _BYPASS,
        (Row("", (("1", "2"), ("3", "4", "5"), ("6", "7"), ("8", NOTE))),),
        {"5": "The other upscaler's picture", "8": "Refined by Inf-DiT"},
    ),
}


def main() -> None:
    with interface() as shown:
        make(shown.page, sys.argv[1:] or [*EXAMPLES_OF, BLUEPRINT])


def make(page: Any, titles: list[str]) -> None:
    """Write the examples, and the blueprint if it is among the titles."""
    if BLUEPRINT in titles:
        titles.remove(BLUEPRINT)
        graph = json.loads((API / f"{EXAMPLES_OF[START].graph}.json").read_text())
        SUBGRAPHS.mkdir(exist_ok=True)
        write(SUBGRAPHS / f"{BLUEPRINT}.json", BLUEPRINT, blueprint(page, graph))
    for title in titles:
        example = EXAMPLES_OF[title]
        graph = json.loads((API / f"{example.graph}.json").read_text())
        for node in graph.values():
            if node["class_type"] == "LoadImage":
                node["inputs"]["image"] = "example.png"  # which every ComfyUI has
        page.evaluate("graph => { app.clean(); app.loadApiJson(graph, 'example'); }", graph)
        settle(page)
        page.evaluate(_DEFAULTS, graph)
        needed: dict[str, float] = page.evaluate(
            "() => Object.fromEntries(app.graph._nodes.map(n => [n.id, n.computeSize()[1]]))"
        )
        kinds: dict[str, str] = {key: node["class_type"] for key, node in graph.items()}
        heights: dict[str, float] = {
            key: SHORT.get(kinds[key], height) + ROOM.get(kinds[key], STYLES)
            for key, height in needed.items()
        }
        heights[NOTE] = NOTE_HEIGHT
        places, groups, buses = layout(example.rows, heights, links_of(graph))
        assert places.keys() == graph.keys() | {NOTE}, (title, places.keys())
        saved = page.evaluate(_PLACE, [places, groups, note_of(example), example.titles, buses])
        saved.setdefault("extra", {})["ds"] = view(places, groups)
        write(EXAMPLES / f"{title}.json", title, saved)


EXPOSED = {
    "InfDiTCheckpointLoader": ["model_name"],
    "InfDiTSampler": ["upscale_by", "preset", "denoise", "seed", "$$canvas-image-preview"],
}
"""Widgets of the inner nodes that stand on the blueprint; the last is the inner preview."""


def blueprint(page: Any, graph: dict[str, Any]) -> dict[str, Any]:
    """The loader and the upscaler of a graph as one node, as the interface would publish it."""
    page.evaluate("graph => app.loadApiJson(graph, 'blueprint')", graph)
    settle(page)
    saved = page.evaluate(
        """([name, prefix]) => {
          const own = app.graph._nodes.filter(n => n.type.startsWith(prefix));
          const upscale = own.find(n => n.type === 'InfDiTSampler');
          // A link from each output to be published
          const mask = LiteGraph.createNode('MaskPreview');
          app.graph.add(mask);
          upscale.connect(1, mask, 0);
          const { node } = app.graph.convertToSubgraph(new Set(own));
          node.title = node.subgraph.name = name;
          for (const other of [...app.graph._nodes]) if (other !== node) app.graph.remove(other);
          node.pos = [0, 0];
          node.size = [WIDTH, 560];
          return JSON.parse(JSON.stringify(app.graph.serialize()));
        }""".replace("WIDTH", str(WIDTH)),
        [BLUEPRINT, OWN_PREFIXES[0]],
    )
    (inner,) = saved["definitions"]["subgraphs"]
    inner["description"] = "Upscales pictures of any size with Inf-DiT: loader and upscaler in one."
    inner["category"] = "Inf-DiT"
    ids = {node["type"]: str(node["id"]) for node in inner["nodes"]}
    saved["nodes"][0]["properties"]["proxyWidgets"] = [
        [ids[kind], name] for kind, names in EXPOSED.items() for name in names
    ]
    saved["nodes"][0]["widgets_values"] = []
    return saved


def note_of(example: Example) -> str:
    """The text of the note; Nodes 2.0 draws code within a line too dark to be read."""
    return re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"**\1**", example.note + _MODEL_NOTE)


class Bus(NamedTuple):
    """The way of one output's links around the nodes that lie between."""

    source: tuple[str, int]
    """Id and output."""
    points: list[tuple[float, float]]
    """Where the links bend, the first one for all of them."""
    targets: list[tuple[str, str]]
    """Id and input that a link leaves the bus for after each point but the first."""


def links_of(graph: dict[str, Any]) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(id, input) of what each (id, output) of an API graph goes to."""
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for key, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                found.setdefault((value[0], value[1]), []).append((key, name))
    return found


def layout(
    rows: tuple[Row, ...],
    heights: Mapping[str, float],
    links: Mapping[tuple[str, int], list[tuple[str, str]]],
) -> tuple[dict[str, list[float]], list[dict[str, Any]], list[Bus]]:
    """x, y, width and height of each node by its id, the groups around the rows, and the buses.

    A link to the next column needs no way of its own; one beyond it runs above the nodes of its
    row, and one to the next row between the rows.
    """
    at = {
        key: (row, column)
        for row, (_, columns) in enumerate(rows)
        for column, keys in enumerate(columns)
        for key in keys
    }
    within: dict[int, list] = {}
    between: dict[int, list] = {}
    for source, targets in links.items():
        row, column = at[source[0]]
        far = [t for t in targets if at[t[0]][0] == row and at[t[0]][1] > column + 1]
        if far:
            within.setdefault(row, []).append((source, far))
        if below := [t for t in targets if at[t[0]][0] > row]:
            between.setdefault(row, []).append((source, below))

    places, groups, buses, top = {}, [], [], 0.0

    def add_buses(found: list, y: float) -> None:
        for lane, (source, targets) in enumerate(found):
            level, shift = y + lane * LANE, 5 * lane
            points: list[tuple[float, float]] = [
                (at[source[0]][1] * (WIDTH + GAP) + WIDTH + 8 + shift, level)
            ]
            targets = sorted(targets, key=lambda target: at[target[0]][1])
            columns = [at[key][1] * (WIDTH + GAP) for key, _ in targets]
            if columns[0] < points[0][0]:  # back to the left
                targets, columns = targets[::-1], columns[::-1]
            points += [(x - 14 - shift, level) for x in columns]
            buses.append(Bus(source, points, targets))

    for number, row in enumerate(rows):
        start = top + (GROUP_TITLE if row.title else 0)
        add_buses(within.get(number, []), start)
        start += LANE * len(within.get(number, [])) + TITLE_HEIGHT
        bottom = start
        for column, keys in enumerate(row.columns):
            y = start
            for key in keys:
                places[key] = [column * (WIDTH + GAP), y, WIDTH, heights[key]]
                y += heights[key] + TITLE_HEIGHT + GAP / 2
            bottom = max(bottom, y - TITLE_HEIGHT - GAP / 2)
        if row.title:
            width = len(row.columns) * (WIDTH + GAP)
            box = [-GAP / 2, top, width, bottom + GAP / 2 - top]
            groups.append({"title": row.title, "bounding": box, "color": "#3f789e"})
        add_buses(between.get(number, []), bottom + GAP / 2 + LANE)
        top = bottom + GAP + LANE * len(between.get(number, []))
    return places, groups, buses


def view(places: dict[str, list[float]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Scale and offset that show all of it, and text that can be read in any case."""
    left = min(place[0] for place in places.values())
    right, bottom = (max(place[i] + place[i + 2] for place in places.values()) for i in (0, 1))
    tops = [place[1] - TITLE_HEIGHT for place in places.values()]
    top = min(tops + [group["bounding"][1] for group in groups])
    assert right - left <= MAX_WIDTH, right - left
    fit = min(SCREEN[0] / (right - left + 2 * GAP), SCREEN[1] / (bottom - top + GAP))
    scale = min(max(fit, SCALES[0]), SCALES[1])
    # The menu at the left and the bars above cover 60 and 105 px
    return {"scale": scale, "offset": [60 / scale + GAP - left, 110 / scale - top]}


_DEFAULTS = """graph => {
  for (const node of app.graph._nodes) {
    const { required, optional } = node.constructor.nodeData.input;
    const specs = { ...required, ...optional }, set = graph[String(node.id)].inputs;
    for (const widget of node.widgets ?? []) {
      const value = specs[widget.name]?.[1]?.default;
      if (!(widget.name in set) && value !== undefined) widget.value = value;
    }
  }
}"""
"""The interface gives a new node values of the one before it with the same id."""

_PLACE = """([places, groups, note, titles, buses]) => {
  const text = LiteGraph.createNode('MarkdownNote');
  app.graph.add(text);
  text.widgets[0].value = note;
  for (const node of app.graph._nodes) {
    const [x, y, width, height] = places[node === text ? 'MarkdownNote' : String(node.id)];
    node.pos = [x, y];
    node.size = [width, height];
    node.title = titles[String(node.id)] ?? node.title;
    for (const widget of node.widgets ?? [])
      if (widget.name === 'control_after_generate') widget.value = 'fixed';
  }
  for (const [[id, output], points, targets] of buses) {
    const linkOf = ([key, name]) => {
      const node = app.graph.getNodeById(Number(key));
      return app.graph.getLink(node.inputs.find(i => i.name === name).link);
    };
    const last = linkOf(targets.at(-1));
    const bends = points.map(point => app.graph.createReroute(point, last));
    targets.slice(0, -1).forEach((target, n) => {
      const link = linkOf(target), own = bends.slice(0, n + 2);
      link.parentId = own.at(-1).id;
      for (const bend of own) bend.linkIds.add(link.id);
    });
  }
  const saved = JSON.parse(JSON.stringify(app.graph.serialize()));  // without what is undefined
  saved.groups = groups.map((g, i) => ({ id: i + 1, font_size: 24, flags: {}, ...g }));
  return saved;
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
            kept = node.get("properties", {}).get("proxyWidgets")
            node["properties"] = {"proxyWidgets": kept} if kept else {}
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
        if node["type"] == "UpscaleModelLoader":
            node["properties"]["models"] = [
                {"name": UPSCALER, "url": ESRGAN_URL, "directory": "upscale_models"}
            ]
    path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
