"""Help pages in both languages: one for each node, naming all that the node has."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
ENGLISH = sorted(DOCS.glob("*/en.md"))
ZH = {"Inputs": "输入", "Outputs": "输出", "Tips": "提示", "Errors": "错误"}
WORDS = {
    "choice": "选项", "text": "文本", "yes or no": "是或否", "optional": "可选", "number": "数值",
    "first file": "第一个文件", "first folder": "第一个文件夹",
    "first class": "第一个类别", "yes": "是", "no": "否",
}  # fmt: skip
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")
HOW = "Write them anew from en.md and locales/zh with INFDIT_FREEZE=1"

pytestmark = pytest.mark.comfy


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def entries(text: str, heading: str) -> list[tuple[str, str, str]]:
    """Name, kind and default ("" without) of each line of a list such as

    - **`upscale_by`** (number, 1 to 8; default 4): How many times ...
    """
    pattern = r"^- \*\*`([^`]+)`\*\* \(([^);]+)(?:; default ([^)]+))?\): \S"
    lines = [line for line in section(text, heading).splitlines() if line.startswith("- **")]
    found = [re.match(pattern, line) for line in lines]
    assert all(found), lines
    return [(m[1], m[2], m[3] or "") for m in found if m]


def chinese(kind: str) -> str:
    kind = re.sub(r"number, (\S+) to (\S+)", r"数值，\1 到 \2", kind)
    return "，".join(WORDS.get(word, word) for word in kind.split(", "))


def test_every_node_has_a_page_that_names_what_it_has(comfy):
    assert {page.parent.name for page in ENGLISH} == set(comfy.nodes)
    for node_id, node in comfy.nodes.items():
        page = DOCS / node_id / "en.md"
        text = page.read_text(encoding="utf-8")
        schema = node.GET_SCHEMA()
        info = node.GET_NODE_INFO_V1()
        assert text.startswith(f"# {schema.display_name}\n"), page
        assert [e[0] for e in entries(text, "Inputs")] == [i.id for i in schema.inputs], page
        assert [e[0] for e in entries(text, "Outputs")] == info["output_name"], page


def test_options_and_ranges_in_the_pages_are_those_of_the_nodes(comfy):
    for node_id, node in comfy.nodes.items():
        text = (DOCS / node_id / "en.md").read_text(encoding="utf-8")
        found = entries(text, "Inputs")
        for item, (_, kind, default) in zip(node.GET_SCHEMA().inputs, found, strict=True):
            details = item.as_dict()
            where = f"{node_id}, {item.id}"
            if item.optional:
                assert "optional" in kind, where
            if limits := re.match(r"number, (\S+) to ([^\s,]+)", kind):
                assert [float(x) for x in limits.groups()] == [details["min"], details["max"]]
            if re.match(r"number|choice|text", kind) and not default.startswith("first "):
                default, expected = default.strip("`"), details["default"]
                number = isinstance(expected, int | float)
                assert (float(default) if number else default) == expected, where


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.parent.name)
def test_the_chinese_page_has_the_same(page):
    """Its inputs and outputs are the texts of locales/zh with the kinds of the English page."""
    english, path = page.read_text("utf-8"), page.with_name("zh.md")
    node = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text("utf-8"))[page.parent.name]
    text = path.read_text("utf-8")
    for heading, key in (("Inputs", "inputs"), ("Outputs", "outputs")):
        if not (found := entries(english, heading)):  # a sentence says that there are none
            assert section(text, ZH[heading]).strip()
            continue
        lines = []
        for index, (name, kind, default) in enumerate(found):
            told = node[key][name if key == "inputs" else str(index)]
            kind = chinese(kind) + (f"；默认 {WORDS.get(default, default)}" if default else "")
            lines.append(f"- **`{name}`** {told['name']}（{kind}）：{told['tooltip']}")
        expected = "\n" + "\n".join(lines) + "\n"
        if os.environ.get("INFDIT_FREEZE"):
            start = text.index(f"\n## {ZH[heading]}\n") + len(f"\n## {ZH[heading]}\n")
            text = text[:start] + expected + text[text.index("\n## ", start) :]
            path.write_text(text, encoding="utf-8")
        assert section(text, ZH[heading]) == expected, HOW
    assert text.startswith(f"# {node['display_name']}\n")
    for heading in ("Tips", "Errors"):
        assert len(re.findall(r"^- ", section(text, ZH[heading]), re.MULTILINE)) > 0
    messages = re.findall(r"`[^`]+`(?=[,:])", section(english, "Errors"))
    assert not [m for m in messages if m not in section(text, ZH["Errors"])]
    assert PICTURE.findall(text) == PICTURE.findall(english)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*/*.md")), ids=str)
def test_pictures_are_there_and_nothing_is_wider_than_the_panel(page):
    """A table is: its cells do not shrink below their longest words."""
    text = page.read_text("utf-8")
    for picture in PICTURE.findall(text):
        assert (DOCS / picture).is_file()  # the interface looks in docs/, not beside the page
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^\||^    ", prose, re.MULTILINE), "a table, or a line that does not wrap"


def test_pages_name_only_nodes_that_there_are(comfy):
    titles = {node.GET_SCHEMA().display_name for node in comfy.nodes.values()}
    for page in ENGLISH:
        for name in re.findall(r"\*\*((?:Load )?Inf-DiT [^*]+)\*\*", page.read_text("utf-8")):
            assert name in titles, f"{page} speaks of {name}"
