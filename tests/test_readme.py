"""The README says what is there: messages, widgets, options, workflows and files."""

import ast
import re
from argparse import ArgumentParser, _SubParsersAction
from pathlib import Path

import pytest

from infdit_core.cli.parser import build_parser
from tests.nodes.schemas import read_golden

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def messages() -> str:
    """Every text in the shipped sources, one a line, with "{}" for what is put into it."""
    found = []
    for path in [*ROOT.glob("nodes/**/*.py"), *ROOT.glob("infdit_core/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_explained_exist():
    cells = re.findall(r"^\| (\".*?\") \|", section("Troubleshooting"), re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r'"([^"]+)"', cell)]
    ours = messages()
    # A kind of file is put into "is {kind}"
    unknown = [text for text in quoted if text.removeprefix("is ") not in ours]
    assert len(quoted) > 10
    assert not unknown


def test_widgets_in_recipes_exist():
    widgets = {name for node in read_golden().values() for name in node["inputs"]}
    named = set(re.findall(r"`([a-z]\w*)`", section("Recipes"))) - {"input", "none"}
    options = {
        str(option)
        for node in read_golden().values()
        for details in node["inputs"].values()
        for option in details.get("options", ())
    }
    assert named <= widgets | options


def options_of(parser: ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for child in action.choices.values():
                found |= options_of(child)
    return found


def test_options_of_the_command_line_exist():
    commands = re.findall(r"python -m infdit_core[^\n`]*", README)
    named = set(re.findall(r"--[a-z][a-z-]*", " ".join(commands)))
    assert named
    assert named <= options_of(build_parser())


def test_workflows_that_are_named_exist():
    titles = {path.stem for path in ROOT.glob("example_workflows/*.json")}
    named = set(re.findall(r'"((?:SDXL|Upscale) [^"]+)"', section("Recipes")))
    assert named
    assert named <= titles


@pytest.mark.parametrize(
    "target", re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', README), ids="".join
)
def test_files_that_are_linked_exist(target):
    assert (ROOT / "".join(target)).exists()
