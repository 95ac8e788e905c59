"""The templates in the real interface, in the base that `dev.py comfyui` makes.

Both node styles, in the interface that ComfyUI brings and in the newest one. Slow, and skipped
where there is no Chromium. A Chromium that dies is started again, with the template at work.
"""

import re

import pytest

from tests.browser.files import PICTURE
from tools.browser import EXAMPLES, boxes, nodes_2, open_workflow, run_workflow, settle
from tools.comfy_server import ROOT
from tools.make_workflows import BLUEPRINT, EXAMPLES_OF, SUBGRAPHS
from tools.workflow_layout import MAX_WIDTH

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]

STYLES = ["classic", "nodes 2.0"]
NEEDS_MODELS = {title for title in EXAMPLES_OF if "SDXL" in title or "DiMR" in title}
"""Templates that are not run here, and get pictures as a run would send them."""


def overlaps(found: dict[str, list[float]]) -> list[tuple[str, str]]:
    return [
        (a, b)
        for a, (x, y, width, height) in found.items()
        for b, (x2, y2, width2, height2) in found.items()
        if a < b and x < x2 + width2 and x2 < x + width and y < y2 + height2 and y2 < y + height
    ]


def links_behind_nodes(page) -> list[str]:
    """Links that pass behind a node that is not theirs, further in than 30 px."""
    return page.evaluate(
        """() => {
          const ctx = document.createElement('canvas').getContext('2d');
          ctx.lineWidth = 12;
          const found = [], edge = 30;
          for (const segment of app.canvas.renderedPaths) {
            const ids = segment.linkIds ? [...segment.linkIds] : [segment.id];
            const links = ids.map(id => app.graph.getLink(id)).filter(Boolean);
            for (const { id, pos: [x, y], size: [width, height] } of app.graph._nodes) {
              const own = links.some(l => l.origin_id == id || l.target_id == id);
              if (!segment.path || own) continue;
              for (let i = x + edge; i < x + width - edge; i += 10)
                for (let j = y; j < y + height - edge; j += 10)
                  if (ctx.isPointInStroke(segment.path, i, j)) found.push(`${ids} behind ${id}`);
            }
          }
          return [...new Set(found)];
        }"""
    )


def preview(page) -> None:
    """What the server sends in the middle of a run: a picture and a line of text."""
    page.evaluate(
        """async () => {
          const canvas = Object.assign(document.createElement('canvas'), {width: 512, height: 512});
          canvas.getContext('2d').fillRect(0, 0, 512, 512);
          const blob = await new Promise(done => canvas.toBlob(done, 'image/jpeg'));
          const text = 'step 3 of 20 · about 2 min left';
          for (const { id, type } of app.graph._nodes) {
            if (!/^(?!DiMR).*(Sampler|Folder)/.test(type)) continue;
            const nodeId = String(id);
            const ids = { nodeId, displayNodeId: nodeId, parentNodeId: nodeId, realNodeId: nodeId };
            app.api.dispatchCustomEvent('b_preview_with_metadata', { blob, jobId: 'job', ...ids });
            if (type.startsWith('InfDiT'))
              app.api.dispatchCustomEvent('progress_text', { nodeId, text });
          }
        }"""
    )
    settle(page)


def pictures(page) -> None:
    """What the server sends at the end of a run."""
    page.evaluate(
        """filename => {
          for (const { id, type } of app.graph._nodes) {
            if (!/^(Save|Preview)Image$/.test(type)) continue;
            const output = { images: [{ filename, subfolder: '', type: 'input' }] };
            const node = String(id);
            const about = { node, display_node: node, prompt_id: 'job', output };
            app.api.dispatchCustomEvent('executed', about);
          }
        }""",
        PICTURE,
    )
    settle(page)


def shown_pictures(page) -> dict[str, int]:
    """How many pictures the nodes show that end a workflow."""
    return page.evaluate(
        """() => Object.fromEntries(app.graph._nodes
          .filter(n => /^(Save|Preview)Image$|Folder$/.test(n.type))
          .map(n => [n.id, app.nodeOutputs[n.id]?.images?.length ?? 0]))"""
    )


def texts(page) -> list[str]:
    """The lines of text on our nodes."""
    return page.evaluate(
        """() => app.graph._nodes.filter(n => /InfDiT(Sampler|UpscaleFolder)/.test(n.type))
          .map(n => n.widgets.find(w => w.name.includes('text-preview'))?.value ?? '')"""
    )


@pytest.mark.parametrize("title", EXAMPLES_OF)
@pytest.mark.parametrize("style", STYLES)
def test_a_template_is_readable_before_in_and_after_a_run(shown, style, title):
    shown.nodes_2 = style != "classic"

    def steps(page):
        nodes_2(page, shown.nodes_2)
        open_workflow(page, EXAMPLES / f"{title}.json")
        assert page.evaluate("() => app.canvas.ds.scale") >= 0.65
        found = boxes(page)
        left, right = (
            f(x + w * k for x, _, w, _ in found.values()) for f, k in ((min, 0), (max, 1))
        )
        assert right - left <= MAX_WIDTH * 1.01
        assert not overlaps(found)
        if style == "classic":  # it is one graph, and this takes seconds
            assert not links_behind_nodes(page)
        assert not page.get_by_text("Media input missing").count()
        errors = page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")
        assert not errors
        assert set(shown_pictures(page).values()) == {0}
        preview(page)
        assert not overlaps(boxes(page))
        if title in NEEDS_MODELS:
            pictures(page)
        else:
            run_workflow(page)
            for text in texts(page):
                assert re.match(r"\d+x\d+ in |\d+ pictures? in |\d+ was there already", text)
        assert set(shown_pictures(page).values()) <= {0, 1} if "folder" in title else {1}
        assert not overlaps(boxes(page))

    shown.attempt(steps)


def test_help_fits_the_panel(shown):
    """No text, table, code or picture of a page is cut off at the panel's own width."""
    shown.nodes_2 = False
    for folder in sorted(p for p in (ROOT / "web" / "docs").iterdir() if p.is_dir()):
        title = (folder / "en.md").read_text("utf-8").split("\n")[0].removeprefix("# ")
        assert not shown.attempt(lambda page, k=folder.name, t=title: wide(page, k, t)), title


def wide(page, kind: str, title: str) -> list[str]:
    """What is wider than the panel in the help of a node."""
    nodes_2(page, False)
    page.evaluate(
        """kind => {
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [500, 300];
          app.graph.clear();
          const node = LiteGraph.createNode(kind);
          app.graph.add(node);
          app.canvas.selectNode(node);
          app.canvas.setDirty(true, true);
        }""",
        kind,
    )
    if not page.locator(".node-help-content").count():
        page.get_by_test_id("info-button").click()
    page.locator(".node-help-content h1", has_text=title).wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.node-help-content img')].every(i => i.complete)"
    )
    return page.evaluate(
        """() => {
          const page = document.querySelector('.node-help-content');
          const right = page.getBoundingClientRect().right + 1;
          return [...page.querySelectorAll('*')].filter(
            e => e.getBoundingClientRect().right > right
              || (e.matches('pre, table') && e.scrollWidth > e.clientWidth + 1)
              || (e.matches('img') && !e.naturalWidth)
          ).map(e => e.outerHTML.slice(0, 200));
        }"""
    )


def test_the_blueprint_shows_what_an_artist_sets(shown):
    def steps(page):
        open_workflow(page, SUBGRAPHS / f"{BLUEPRINT}.json")
        return page.evaluate(
            """() => { const [n] = app.graph._nodes; return {
              widgets: n.widgets.map(w => w.name), outputs: n.outputs.map(o => o.name) }; }"""
        )

    node = shown.attempt(steps)
    assert {"model_name", "upscale_by", "preset", "denoise", "seed"} <= set(node["widgets"])
    assert node["outputs"] == ["IMAGE", "MASK"]


@pytest.mark.parametrize("style", STYLES)
def test_choices_are_shown_in_chinese_and_saved_as_they_are(shown, style):
    shown.nodes_2 = style != "classic"

    def steps(page):
        nodes_2(page, shown.nodes_2)
        page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'zh')")
        try:
            page.evaluate(
                """() => {
                  app.graph.clear();
                  const node = LiteGraph.createNode('InfDiTSampler');
                  node.pos = [300, 200];
                  app.graph.add(node);
                }"""
            )
            settle(page)
            if shown.nodes_2:
                page.get_by_text("自动（auto）").first.wait_for()
            return page.evaluate(
                """() => {
                  const widget = app.graph._nodes[0].widgets.find(w => w.name === 'preset');
                  return [widget._displayValue ?? '自动（auto）', widget.value];
                }"""
            )
        finally:
            page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")

    assert shown.attempt(steps) == ["自动（auto）", "auto"]
