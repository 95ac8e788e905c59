"""The example workflows: complete, of the present schemas, and those that can be run do run."""

import json
import urllib.request

import pytest
from PIL import Image

from tools.comfy_server import ROOT, ComfyError, ComfyServer
from tools.dev import PHOTO, png_size
from tools.make_workflows import (
    API,
    BLUEPRINT,
    EXAMPLES_OF,
    EXPOSED,
    NOTE,
    OWN_PREFIXES,
    START,
    SUBGRAPHS,
)

pytestmark = pytest.mark.comfy

EXAMPLES = ROOT / "example_workflows"
RUNNABLE = {
    START: [(40, 32)],
    "Advanced sampling with KSampler": [(40, 32)],
    "Before and after": [(2 * 40 + 8, 32)],
    "Upscale a folder": [(40, 32), (40, 32)],
    "Which setting": [],  # it previews and saves nothing
}
"""Examples that the bundled model can run, with the sizes of their pictures for one of 10×8."""


def example(title: str) -> dict:
    return json.loads((EXAMPLES / f"{title}.json").read_text())


def widgets_of(info: dict) -> list[str]:
    """The widgets of a node in the order of their values, as object_info describes it."""
    names = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            spec = info["input"][kind][name]
            options = spec[1] if len(spec) > 1 else {}
            basic = isinstance(spec[0], list) or spec[0] in (
                "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR",
            )  # fmt: skip
            if spec[0] == "BOUNDING_BOX":  # beside the whole box its four numbers
                names += [name, *(f"{name}.{key}" for key in ("x", "y", "width", "height"))]
            if basic and not options.get("forceInput"):
                names.append(name)
                if options.get("control_after_generate"):
                    names.append("control_after_generate")
                if options.get("image_upload"):
                    names.append("upload")
    return names


def test_every_example_has_a_graph_to_test_and_a_thumbnail():
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(EXAMPLES_OF)
    for title, made in EXAMPLES_OF.items():
        assert (API / f"{made.graph}.json").exists()
        with Image.open(EXAMPLES / f"{title}.jpg") as thumbnail:
            assert (thumbnail.format, thumbnail.width) == ("JPEG", thumbnail.height), title
    pictures = [path.read_bytes() for path in EXAMPLES.glob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == len(EXAMPLES_OF)


@pytest.mark.parametrize("title", EXAMPLES_OF)
def test_the_example_is_its_graph_with_complete_links_and_metadata(title):
    workflow, graph = (
        example(title),
        json.loads((API / f"{EXAMPLES_OF[title].graph}.json").read_text()),
    )
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, target_slot, _ in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == link
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    shown = {str(n["id"]): n for n in workflow["nodes"] if n["type"] != NOTE}
    assert set(shown) == set(graph)
    for key, node in graph.items():
        assert shown[key]["type"] == node["class_type"]
        found = {i["name"]: links[i["link"]] for i in shown[key]["inputs"] if i["link"] is not None}
        assert found == {k: v for k, v in node["inputs"].items() if isinstance(v, list)}, key
        own = node["class_type"].startswith(OWN_PREFIXES)
        properties = shown[key]["properties"]
        assert properties["cnr_id"] == ("comfyui-infdit" if own else "comfy-core")
        assert properties["ver"]
        assert properties["Node name for S&R"] == node["class_type"]


@pytest.mark.parametrize("title", EXAMPLES_OF)
def test_every_widget_has_its_value(comfy_server: ComfyServer, title):
    graph = json.loads((API / f"{EXAMPLES_OF[title].graph}.json").read_text())
    for node in example(title)["nodes"]:
        if node["type"] == NOTE:
            continue
        info = comfy_server.object_info(node["type"])[node["type"]]
        names = widgets_of(info)
        values = node.get("widgets_values", [])  # absent in a node without widgets
        assert len(names) == len(values), (node["type"], names, values)
        inputs = graph[str(node["id"])]["inputs"]
        specs = info["input"]["required"] | info["input"].get("optional", {})
        defaults = {name: spec[1].get("default") for name, spec in specs.items() if len(spec) > 1}
        for name, value in zip(names, values, strict=True):
            if name == "control_after_generate":
                assert value == "fixed"
            elif name in inputs and name != "image":
                assert value == inputs[name], (node["type"], name)
            elif (default := defaults.get(name)) is not None:
                assert value == default, (node["type"], name)


@pytest.mark.parametrize("title", RUNNABLE)
def test_the_example_runs(comfy_server: ComfyServer, title, tmp_path):
    graph = json.loads((API / f"{EXAMPLES_OF[title].graph}.json").read_text())
    grey = {"width": 10, "height": 8, "batch_size": 1, "color": 0x406080}
    made = comfy_server.output_files(
        comfy_server.submit(
            {
                "grey": {"class_type": "EmptyImage", "inputs": grey},
                "save": {
                    "class_type": "SaveImage",
                    "inputs": {"images": ["grey", 0], "filename_prefix": "tiny"},
                },
            },
            timeout=60,
        )
    )
    folder = comfy_server.input_dir / "photos"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(made[0].read_bytes())
    for node in graph.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = comfy_server.upload_image(made[0])
        if "crop_region" in node["inputs"]:
            node["inputs"]["crop_region"] = {"x": 0, "y": 0, "width": 10, "height": 8}
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    files = comfy_server.output_files(comfy_server.submit(graph, timeout=120))
    saved = [path for path in files if "compare" not in path.name]
    assert [png_size(path) for path in saved] == RUNNABLE[title]


@pytest.mark.parametrize("title", sorted(set(EXAMPLES_OF) - set(RUNNABLE)))
def test_of_the_others_nothing_is_missing_but_the_models(comfy_server: ComfyServer, title):
    graph = json.loads((API / f"{EXAMPLES_OF[title].graph}.json").read_text())
    for node in graph.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = comfy_server.upload_image(PHOTO)
    with pytest.raises(ComfyError) as refusal:
        comfy_server.submit(graph)
    complaints = [line for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert complaints
    files = ("ckpt_name", "model_name", "vae_name")
    assert all(any(name in line for name in files) for line in complaints), complaints


def test_the_blueprint_is_served_and_whole(comfy_server: ComfyServer):
    with urllib.request.urlopen(f"{comfy_server.url}/global_subgraphs", timeout=30) as answer:
        served = json.load(answer).values()
    assert [entry["source"] for entry in served if entry["name"] == BLUEPRINT] == ["custom_node"]
    workflow = json.loads((SUBGRAPHS / f"{BLUEPRINT}.json").read_text())
    (subgraph,) = workflow["definitions"]["subgraphs"]
    assert [node["type"] for node in workflow["nodes"]] == [subgraph["id"]]
    assert subgraph["name"] == BLUEPRINT
    kinds = {node["id"]: node["type"] for node in subgraph["nodes"]}
    assert sorted(kinds.values()) == ["InfDiTCheckpointLoader", "InfDiTSampler"]
    exposed = [[str(i), name] for i, kind in kinds.items() for name in EXPOSED[kind]]
    assert sorted(workflow["nodes"][0]["properties"]["proxyWidgets"]) == sorted(exposed)
    assert [output["name"] for output in subgraph["outputs"]] == ["IMAGE", "MASK"]
    between = {(link["origin_id"], link["target_id"], link["type"]) for link in subgraph["links"]}
    loader, upscale = sorted(kinds, key=lambda i: kinds[i])
    outside_in, outside_out = subgraph["inputNode"]["id"], subgraph["outputNode"]["id"]
    assert between >= {
        (loader, upscale, "MODEL"), (outside_in, upscale, "IMAGE"), (upscale, outside_out, "IMAGE"),
    }  # fmt: skip
