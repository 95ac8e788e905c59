"""Help pages: one for each node, naming all that the node has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"

pytestmark = pytest.mark.comfy


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two head lines."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(text: str, heading: str) -> list[str]:
    return [cells[0].strip("`") for cells in rows(text, heading)]


def test_every_node_has_a_page_that_names_what_it_has(comfy):
    for node_id, node in comfy.nodes.items():
        page = DOCS / f"{node_id}.md"
        assert page.exists(), f"{page} is missing"
        text = page.read_text(encoding="utf-8")
        schema = node.GET_SCHEMA()
        info = node.GET_NODE_INFO_V1()
        assert text.startswith(f"# {schema.display_name}\n"), page
        assert names(text, "Inputs") == [item.id for item in schema.inputs], page
        assert names(text, "Outputs") == info["output_name"], page


def test_options_and_ranges_in_the_pages_are_those_of_the_nodes(comfy):
    for node_id, node in comfy.nodes.items():
        text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        for item, row in zip(node.GET_SCHEMA().inputs, rows(text, "Inputs"), strict=True):
            details = item.as_dict()
            where = f"{node_id}.md, {item.id}"
            if item.optional:
                assert "optional" in row[1], where
            if found := re.search(r"number, (\S+) to (\S+)$", row[1]):
                assert [float(x) for x in found.groups()] == [details["min"], details["max"]], where
            if re.match(r"number|choice|text", row[1]) and "first file" not in row[2]:
                default = row[2].strip("`")
                expected = details["default"]
                number = isinstance(expected, int | float)
                assert (float(default) if number else default) == expected, where


def test_pictures_in_the_pages_are_beside_them():
    # The interface looks for what has no folder of its own under docs/.
    for page in DOCS.glob("*.md"):
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (DOCS / picture).is_file(), f"{page} shows {picture}"


def test_pages_name_only_nodes_that_there_are(comfy):
    titles = {node.GET_SCHEMA().display_name for node in comfy.nodes.values()}
    for page in DOCS.glob("*.md"):
        assert page.stem in comfy.nodes, f"{page} is the page of no node"
        for name in re.findall(r"\*\*((?:Load )?Inf-DiT [^*]+)\*\*", page.read_text("utf-8")):
            assert name in titles, f"{page} speaks of {name}"
