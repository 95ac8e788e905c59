"""What saved workflows rely on in the nodes' schemas, and what they cannot bear to see changed."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

Frozen = dict[str, Any]
"""One node: {"display_name", "inputs": {id: {...}} in the order served, "outputs": [[type, name]]}.

Plain JSON; the interface stores widget values in the order of "inputs".
"""

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "schemas.json"
FILE = "<file>"
"""Stands in the golden file for the names of the files that a machine has."""

_KEPT = ("default", "min", "max", "step", "options", "control_after_generate")


def freeze(node: Any) -> Frozen:
    """The schema of a node class, as ComfyUI serves it."""
    info = node.GET_NODE_INFO_V1()
    inputs = {}
    for group in ("required", "optional"):
        for name, (kind, details) in info["input"].get(group, {}).items():
            kept = {key: details[key] for key in _KEPT if details.get(key) is not None}
            inputs[name] = {"type": kind} | ({"optional": True} if group == "optional" else {})
            inputs[name] |= kept
    outputs = [list(pair) for pair in zip(info["output"], info["output_name"], strict=True)]
    return {"display_name": info["display_name"], "inputs": inputs, "outputs": outputs}


def read_golden() -> dict[str, Frozen]:
    """The frozen schemas by node id; none if there is no file."""
    if not GOLDEN_FILE.exists():
        return {}
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """The one way in which generated JSON files of this repository are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def breaking_changes(before: dict[str, Frozen], after: dict[str, Frozen]) -> list[str]:
    """What workflows saved with `before` would trip over, one sentence each.

    Nodes, inputs, options and outputs may only be added, at the end; new inputs must be optional,
    because ComfyUI refuses workflows in the API format that lack a required one. Ranges may grow.
    """
    found = [f"{node_id} is gone." for node_id in before if node_id not in after]
    for node_id, old in before.items():
        if (new := after.get(node_id)) is not None:
            found += _breaking_inputs(node_id, old["inputs"], new["inputs"])
            kept = new["outputs"][: len(old["outputs"])]
            if [kind for kind, _ in kept] != [kind for kind, _ in old["outputs"]]:
                found.append(
                    f"{node_id}: outputs must begin with {old['outputs']}; got {new['outputs']}."
                )
    return found


def _breaking_inputs(node_id: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    if list(new)[: len(old)] != list(old):
        found.append(f"{node_id}: inputs must begin with {list(old)}; got {list(new)}.")
    for name, details in new.items():
        if name not in old:
            if not details.get("optional"):
                found.append(f"{node_id}.{name}: a new input must be optional.")
            continue
        was, where = old[name], f"{node_id}.{name}"
        if details["type"] != was["type"]:
            found.append(f"{where}: type {was['type']} became {details['type']}.")
        if was.get("optional") and not details.get("optional"):
            found.append(f"{where}: was optional and is required now.")
        if was.get("control_after_generate") != details.get("control_after_generate"):
            found.append(f"{where}: control_after_generate decides the number of widgets; keep it.")
        options, offered = was.get("options", []), details.get("options", [])
        if offered[: len(options)] != options:
            found.append(f"{where}: options must begin with {options}; got {offered}.")
        if details.get("min", -inf) > was.get("min", -inf):
            found.append(f"{where}: min rose from {was.get('min')} to {details['min']}.")
        if details.get("max", inf) < was.get("max", inf):
            found.append(f"{where}: max fell from {was.get('max')} to {details['max']}.")
    return found
