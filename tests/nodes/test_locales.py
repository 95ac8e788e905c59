"""The texts of the nodes in the interface's languages.

Where a text is looked up: `nodeDefs.<id>.inputs.<id>.tooltip`, outputs by their index; those of
choices, `inputs.<id>.options`, by web/choices.js, for the interface itself looks none up.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.nodes.schemas import write_json

LOCALES = Path(__file__).resolve().parents[2] / "locales"
ENGLISH, CHINESE = (LOCALES / name / "nodeDefs.json" for name in ("en", "zh"))
HOW_TO_ADD = f"""
Regenerate the English texts from the schemas with
    INFDIT_FREEZE=1 python3 tools/dev.py test tests/nodes/test_locales.py
and translate what is new in {CHINESE.relative_to(LOCALES.parent)} by hand.
"""

pytestmark = pytest.mark.comfy


def english(node) -> dict:
    """The texts of a node class, in the form of nodeDefs.json."""
    schema, info = node.GET_SCHEMA(), node.GET_NODE_INFO_V1()
    inputs = {}
    for item in schema.inputs:
        inputs[item.id] = {"name": item.display_name or item.id, "tooltip": item.tooltip}
        details = item.as_dict()
        if "options" in details and "default" in details:  # a list of files has no default
            inputs[item.id]["options"] = {option: option for option in details["options"]}
        if details.get("control_after_generate"):
            inputs["control_after_generate"] = {"name": "control after generate"}
    pairs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": {str(i): {"name": name, "tooltip": tip} for i, (name, tip) in enumerate(pairs)},
    }


def paths(tree, path=()) -> dict[tuple[str, ...], str]:
    """The texts of a tree by the keys that lead to them."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        k: text for key, value in tree.items() for k, text in paths(value, (*path, key)).items()
    }


@pytest.fixture(scope="module")
def from_schemas(comfy):
    return {node_id: english(node) for node_id, node in comfy.nodes.items()}


def test_english_texts_are_those_of_the_schemas(from_schemas):
    if os.environ.get("INFDIT_FREEZE"):
        write_json(ENGLISH, from_schemas)
    assert json.loads(ENGLISH.read_text("utf-8")) == from_schemas, HOW_TO_ADD


def test_chinese_texts_are_complete(from_schemas):
    wanted, there = paths(from_schemas), paths(json.loads(CHINESE.read_text("utf-8")))
    missing, left_over = wanted.keys() - there.keys(), there.keys() - wanted.keys()
    assert not missing, f"missing in zh: {sorted(missing)}\n{HOW_TO_ADD}"
    assert not left_over, f"of no node in zh: {sorted(left_over)}"
    untranslated = [
        path
        for path, text in there.items()
        if path[-1] in ("tooltip", "description") and not re.search("[\u4e00-\u9fff]", text)
    ]
    assert not untranslated


def test_a_choice_in_chinese_names_what_is_saved(from_schemas):
    """So that help, messages and other people's workflows are understood."""
    chinese = paths(json.loads(CHINESE.read_text("utf-8")))
    options = {path: text for path, text in paths(from_schemas).items() if "options" in path}
    assert len(options) > 30
    assert not [path for path, text in options.items() if text not in chinese[path]]
    assert any(re.search("[\u4e00-\u9fff]", chinese[path]) for path in options)


def test_numbers_are_the_same_in_both_languages(from_schemas):
    chinese = paths(json.loads(CHINESE.read_text("utf-8")))
    for path, text in paths(from_schemas).items():
        if path[-1] == "tooltip":
            numbers = re.findall(r"\d+(?:[.]\d+)?", text)
            translated = re.findall(r"\d+(?:[.]\d+)?", chinese[path])
            assert set(numbers) <= set(translated), f"{path}: {text!r} is {chinese[path]!r}"


def test_no_text_holds_what_the_interface_would_interpret():
    for file in (ENGLISH, CHINESE):
        for path, text in paths(json.loads(file.read_text("utf-8"))).items():
            assert not re.search(r"[{}@|]", text), f"{file.parent.name} {path}: {text!r}"
