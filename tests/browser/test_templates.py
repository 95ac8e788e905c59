"""The templates in the real interface, in the base that `dev.py comfyui` makes.

Both node styles, in the interface that ComfyUI brings and in the newest one. Slow, and skipped
where there is no Chromium.
"""

import os
import shutil

import pytest

from tools.browser import (
    EXAMPLES,
    boxes,
    interface,
    newest_frontend,
    nodes_2,
    open_workflow,
    run_workflow,
)  # fmt: skip
from tools.comfy_server import ROOT
from tools.environment import cache_dir
from tools.make_workflows import BLUEPRINT, EXAMPLES_OF, MAX_WIDTH, START, SUBGRAPHS

# slow: minutes, and a Chromium was seen to die of itself; run with `-m slow tests/browser`
pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]

RUNNABLE = [START, "Before and after"]
"""Those that a CPU runs in seconds; the others are of the same nodes."""


@pytest.fixture(scope="module", params=["shipped", "newest"])
def page(request, comfy_source):
    """The interface in a browser."""
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium: apt-get install chromium")
    os.environ["INFDIT_COMFYUI"] = str(comfy_source)
    frontend = newest_frontend(cache_dir() / "frontend") if request.param == "newest" else None
    with interface(frontend=frontend) as (_, page):
        yield page


def overlaps(found: dict[str, list[float]]) -> list[tuple[str, str]]:
    return [
        (a, b)
        for a, (x, y, width, height) in found.items()
        for b, (x2, y2, width2, height2) in found.items()
        if a < b and x < x2 + width2 and x2 < x + width and y < y2 + height2 and y2 < y + height
    ]


@pytest.mark.parametrize("style", ["classic", "nodes 2.0"])
def test_templates_open_readable_and_the_first_run_shows_its_picture(page, style):
    nodes_2(page, style != "classic")
    # Those that run come last: a preview that is kept would hide a missing one.
    for title in sorted(EXAMPLES_OF, key=lambda title: title in RUNNABLE):
        open_workflow(page, EXAMPLES / f"{title}.json")
        assert page.evaluate("() => app.canvas.ds.scale") >= 0.65, title
        found = boxes(page)
        left, right = (
            f(x + w * k for x, _, w, _ in found.values()) for f, k in ((min, 0), (max, 1))
        )
        assert right - left <= MAX_WIDTH * 1.01, (title, right - left)
        assert not overlaps(found), title
        assert not page.get_by_text("Media input missing").count(), title
        errors = page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")
        assert not errors, title
        if title in RUNNABLE:
            run_workflow(page)
            shown = page.evaluate(
                """() => Object.fromEntries(app.graph._nodes.filter(n => n.type === 'SaveImage')
                  .map(n => [n.id, app.nodeOutputs[n.id]?.images?.length ?? 0]))"""
            )
            assert set(shown.values()) == {1}, title
            assert not overlaps(boxes(page)), f"{title} after a run"


def test_help_fits_the_panel(page):
    """No text, table, code or picture of a page is cut off at the panel's own width."""
    nodes_2(page, False)
    page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [500, 300]; }")
    for folder in sorted(p for p in (ROOT / "web" / "docs").iterdir() if p.is_dir()):
        page.evaluate(
            """kind => {
              app.graph.clear();
              const node = LiteGraph.createNode(kind);
              app.graph.add(node);
              app.canvas.selectNode(node);
              app.canvas.setDirty(true, true);
            }""",
            folder.name,
        )
        if not page.locator(".node-help-content").count():
            page.get_by_test_id("info-button").click()
        title = (folder / "en.md").read_text("utf-8").split("\n")[0].removeprefix("# ")
        page.locator(".node-help-content h1", has_text=title).wait_for()
        page.wait_for_timeout(300)
        wide = page.evaluate(
            """() => {
              const page = document.querySelector('.node-help-content');
              const right = page.getBoundingClientRect().right + 1;
              return [...page.querySelectorAll('*')].filter(
                e => e.getBoundingClientRect().right > right
                  || (e.matches('pre, table') && e.scrollWidth > e.clientWidth + 1)
              ).map(e => e.outerHTML.slice(0, 200));
            }"""
        )
        assert not wide, folder.name


def test_the_blueprint_shows_what_an_artist_sets(page):
    open_workflow(page, SUBGRAPHS / f"{BLUEPRINT}.json")
    node = page.evaluate(
        """() => { const [n] = app.graph._nodes; return {
          widgets: n.widgets.map(w => w.name), outputs: n.outputs.map(o => o.name) }; }"""
    )
    assert {"model_name", "upscale_by", "preset", "denoise", "seed"} <= set(node["widgets"])
    assert node["outputs"] == ["IMAGE", "MASK"]
