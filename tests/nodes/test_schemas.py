"""Schemas that saved workflows rely on."""

import copy
import importlib
import os

import pytest

from tests.nodes.schemas import FILE, GOLDEN_FILE, breaking_changes, freeze, read_golden, write_json

HOW_TO_APPEND = f"""
Workflows that people saved hold widget values by position and options by their text. So
- new widgets and outputs go to the end, with a default and optional=True;
- nothing is ever renamed, reordered or removed, ids and options included.
After such an addition (or another harmless change, such as a display name) regenerate the file with
    INFDIT_FREEZE=1 python3 tools/dev.py test tests/nodes/test_schemas.py
and commit {GOLDEN_FILE.name} with it. Breaking changes are not written: of a node that was never
released, delete the entry in the file by hand first.
"""


@pytest.fixture
def schemas(comfy, monkeypatch):
    """What the golden file would hold now, by node id."""
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda _: [FILE])
    monkeypatch.setattr(folder_paths, "get_input_subfolders", lambda: [FILE])
    return {node_id: freeze(node) for node_id, node in comfy.nodes.items()}


@pytest.mark.comfy
def test_schemas_are_frozen(schemas):
    golden = read_golden()
    broken = breaking_changes(golden, schemas)
    assert not broken, "\n".join([*broken, HOW_TO_APPEND])
    if os.environ.get("INFDIT_FREEZE"):
        write_json(GOLDEN_FILE, schemas)
        return
    changed = [i for i in schemas if schemas[i] != golden.get(i)]
    assert not changed, f"{GOLDEN_FILE.name} is out of date for {changed}.\n{HOW_TO_APPEND}"


@pytest.mark.comfy
def test_every_text_is_there(comfy):
    lacking = []
    for node_id, node in comfy.nodes.items():
        schema = node.GET_SCHEMA()
        texts = {"description": schema.description}
        texts |= {f"input {item.id}": item.tooltip for item in schema.inputs}
        texts |= {f"output {i}": item.tooltip for i, item in enumerate(schema.outputs)}
        lacking += [f"{node_id}: no text of {where}" for where, text in texts.items() if not text]
        if not schema.search_aliases:
            lacking.append(f"{node_id}: no search aliases")
    assert not lacking


BEFORE = {
    "Node": {
        "display_name": "Node",
        "inputs": {
            "image": {"type": "IMAGE"},
            "mode": {"type": "COMBO", "options": ["a", "b"]},
            "size": {"type": "INT", "min": 1, "max": 9, "default": 2},
            "extra": {"type": "INT", "optional": True, "min": 0, "max": 9},
        },
        "outputs": [["IMAGE", "IMAGE"], ["MASK", "MASK"]],
    }
}


def edited(edit):
    after = copy.deepcopy(BEFORE)
    edit(after["Node"])
    return after


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda n: n["inputs"].pop("mode"), "inputs must begin with"),
        (lambda n: n["inputs"].update(mode2=n["inputs"].pop("mode")), "inputs must begin with"),
        (lambda n: n["inputs"].update(image=n["inputs"].pop("image")), "inputs must begin with"),
        (lambda n: n["inputs"].update(new={"type": "INT"}), "new: a new input must be optional"),
        (lambda n: n["inputs"]["size"].update(type="FLOAT"), "type INT became FLOAT"),
        (lambda n: n["inputs"]["size"].update(min=2), "min rose from 1 to 2"),
        (lambda n: n["inputs"]["size"].update(max=8), "max fell from 9 to 8"),
        (lambda n: n["inputs"]["size"].update(control_after_generate=True), "number of widgets"),
        (lambda n: n["inputs"]["extra"].pop("optional"), "was optional and is required"),
        (lambda n: n["inputs"]["mode"].update(options=["b", "a"]), "options must begin with"),
        (lambda n: n["inputs"]["mode"].update(options=["a", "B"]), "options must begin with"),
        (lambda n: n["outputs"].reverse(), "outputs must begin with"),
        (lambda n: n["outputs"].pop(), "outputs must begin with"),
    ],
)
def test_a_change_that_breaks_workflows_is_seen(edit, complaint):
    assert complaint in "\n".join(breaking_changes(BEFORE, edited(edit)))


def test_a_removed_node_is_seen():
    assert breaking_changes(BEFORE, {}) == ["Node is gone."]


@pytest.mark.parametrize(
    "edit",
    [
        lambda n: n["inputs"].update(new={"type": "INT", "optional": True}),
        lambda n: n["inputs"]["mode"]["options"].append("c"),
        lambda n: n["inputs"]["size"].update(min=0, max=10, default=3),
        lambda n: n["outputs"].append(["MASK", "alpha"]),
        lambda n: n.update(display_name="Other"),
    ],
)
def test_an_addition_at_the_end_breaks_nothing(edit):
    assert breaking_changes(BEFORE, edited(edit)) == []


ON_THE_FACE = {
    "InfDiTSampler": {"upscale_by", "seed", "preset", "denoise"},
    "InfDiTSchedule": {"schedule"},
    "HiDiffusion": {"preset", "window_attention"},
    "UpsampleGuidance": {"scale", "theta", "eta"},
    "DiffuseHigh": {"scales", "cfg", "guided_steps", "seed"},
    "DiffuseHighGuidance": {"guided_steps"},
}


@pytest.mark.comfy
@pytest.mark.parametrize("node_id", ON_THE_FACE)
def test_few_widgets_stand_on_the_face(comfy, node_id):
    widgets = [i.as_dict() | {"id": i.id} for i in comfy.nodes[node_id].define_schema().inputs]
    shown = {w["id"] for w in widgets if "default" in w and not w.get("advanced")}
    assert shown == ON_THE_FACE[node_id]
