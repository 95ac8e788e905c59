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
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tools.browser import CHECKPOINT, EXAMPLES, ROOT, UPSCALER, VAE, interface, settle
from tools.workflow_layout import NOTE, WIDTH, Row, layout, links_of, view

SUBGRAPHS = ROOT / "subgraphs"
BLUEPRINT = "Inf-DiT 4x"
API = ROOT / "tests" / "workflows"
ESRGAN_URL = "https://huggingface.co/Comfy-Org/Real-ESRGAN_repackaged/resolve/main/" + UPSCALER
SDXL_URL = (
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/" + CHECKPOINT
)
VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-mse-original/resolve/main/" + VAE
CORE_VERSION = "0.30.0"
OWN_PREFIXES = ("InfDiT", "HiDiffusion", "DiffuseHigh", "UpsampleGuidance", "DiMR")
ROOM = {
    "LoadImage": 30,
    "ImageCropV2": 320,
    "SaveImage": 330,
    "PreviewImage": 330,
    "InfDiTSampler": 260,
    "InfDiTUpscaleFolder": 260,
    "KSampler": 200,
    "SamplerCustom": 200,
    "DiffuseHigh": 200,
}
"""px below the widgets of a node for the picture that it shows during or after a run."""
STYLES = 40
"""px that any other node may be higher in Nodes 2.0 than in classic nodes."""
SHORT = {"CheckpointLoaderSimple": 100}
"""Heights of nodes that claim far more than they use."""
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
    "SDXL to 2K with DiffuseHigh, then Inf-DiT to 8K": Example(
        "sdxl_diffusehigh_8k",
        "**SDXL draws 1024×1024, DiffuseHigh draws it again at 1536 and 2048, Inf-DiT makes"
        " 8192×8192 of it.**\n\nDiffuseHigh keeps the large forms of the first picture and adds"
        " detail; it can begin with any finished picture, too. `cfg` 10 is right for SDXL itself;"
        " distilled models want their own. For a quick look set `scales` to *1.5* and `upscale_by`"
        " to 2.",
        (
            Row("1 Draw", (("1", "4"), ("2", "3"), ("5",), ("6",), (NOTE,))),
            Row("2 Draw larger, then upscale", (("7",), ("8",), ("9",), ("10",), ("11",))),
        ),
    ),
    "SDXL 2048 with Upsample Guidance, then Inf-DiT to 8K": Example(
        "sdxl_upsample_guidance_8k",
        "**SDXL draws 2048×2048 in one pass, Inf-DiT makes 8192×8192 of it.**\n\nIn the first,"
        " noisy steps Upsample Guidance also draws the picture at its native size, which leads the"
        " composition. Any sampler and scheduler will do. SD 1.5 works too, at 1024×1024."
        " `upscale_by` 2 gives 4096×4096.",
        (
            Row("1 Draw", (("1", "5"), ("2", "3"), ("4",), ("6",), ("7", "8"))),
            Row("2 Upscale", ((NOTE,), ("9",), ("10",), ("11",))),
        ),
    ),
    "DiMR class to 1024 with Inf-DiT": Example(
        "dimr_1024",
        "**DiMR draws 256×256 of a class of ImageNet, Inf-DiT makes 1024×1024 of it.**\n\nDiMR's"
        " weights do not come with the pack. They are for research, and their licence is the"
        " authors', who keep them at"
        " [huggingface.co/QHL067/DiMR](https://huggingface.co/QHL067/DiMR): put"
        " `DiMR-XL_2R_800epochs.pth` into `models/infdit` and press `R`. Any VAE of SD 1.5 goes"
        " with it.\n\nDiMR knows 1000 classes and no text, and one size. For several pictures"
        " raise `batch_size` and write several classes into `classes`.",
        (
            Row("1 Draw", (("1", "4"), ("2",), ("3", "6"), ("5",), ("7", "8"))),
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
        if node["type"] == "VAELoader":
            node["properties"]["models"] = [{"name": VAE, "url": VAE_URL, "directory": "vae"}]
    path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
