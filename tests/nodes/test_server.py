"""The pack in a real ComfyUI server."""

import sys
from pathlib import Path

import pytest

from tests.goldens import GOLDEN
from tests.nodes.schemas import read_golden
from tests.reliability.workflows import node, workflow
from tools.comfy_server import ComfyError, ComfyServer, running_server
from tools.dev import png_size

pytestmark = pytest.mark.comfy


def grey(width: int) -> dict:
    """Make and save a grey picture with core nodes alone."""
    return {
        "grey": node("EmptyImage", width=width, height=16, batch_size=1, color=0x808080),
        "save": node("SaveImage", images=["grey", 0], filename_prefix="grey"),
    }


def test_pack_loads(comfy_server: ComfyServer):
    comfy_server.check_pack("InfDiTSampler")
    assert "IMPORT FAILED" not in comfy_server.log()


def test_every_node_is_served(comfy_server: ComfyServer):
    assert comfy_server.object_info().keys() >= read_golden().keys()


def test_comfyui_keeps_its_own_nodes_module(comfy):
    """Our folder `nodes` must not hide ComfyUI's nodes.py, nor the other way round."""
    import nodes

    assert Path(nodes.__file__).name == "nodes.py"
    assert Path(comfy.module("nodes").__file__).parts[-2:] == ("nodes", "__init__.py")


def test_uploaded_picture_comes_back_saved(comfy_server: ComfyServer):
    made = comfy_server.output_files(comfy_server.submit(grey(48), timeout=60))
    graph = {
        "load": node("LoadImage", image=comfy_server.upload_image(made[0])),
        "save": node("SaveImage", images=["load", 0], filename_prefix="server"),
    }
    saved = comfy_server.output_files(comfy_server.submit(graph, timeout=60))
    assert [png_size(path) for path in (*made, *saved)] == [(48, 16), (48, 16)]


def test_server_that_ends_shows_its_log(comfy_source: Path, tmp_path: Path):
    argument = ["--no-such-argument"]
    with (
        pytest.raises(ComfyError, match=r"ended with code 2[\s\S]*--no-such-argument"),
        running_server(Path(sys.executable), comfy_source, tmp_path, arguments=argument),
    ):
        pass


def test_interrupted_workflow_says_so(comfy_server: ComfyServer):
    graph = grey(512)
    for i in range(300):  # cancelling takes effect between nodes: have many
        graph[f"invert{i}"] = node("ImageInvert", image=[f"invert{i - 1}" if i else "grey", 0])
    graph["save"]["inputs"]["images"] = ["invert299", 0]
    prompt = comfy_server.queue(graph)
    with pytest.raises(ComfyError, match="was interrupted"):
        # a single request may come before the workflow starts, which forgets it
        comfy_server.wait(prompt, timeout=60, progress=lambda _: comfy_server.interrupt())


def test_refused_workflow_says_what_is_wrong(comfy_server: ComfyServer):
    with pytest.raises(ComfyError, match=r"EmptyImage \(node grey\).*width"):
        comfy_server.submit(grey(-1))


def test_failing_node_says_what_is_wrong(comfy_server: ComfyServer):
    folder = comfy_server.models_dir / "infdit"
    folder.mkdir(exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"not a model")
    with pytest.raises(ComfyError, match=r"InfDiTCheckpointLoader \(node load\) failed: .*broken"):
        comfy_server.submit(workflow(model="broken"), timeout=60)


@pytest.mark.parametrize("where", ["models/infdit", "elsewhere/upscalers"])
def test_model_dropped_in_is_offered(comfy_server: ComfyServer, where: str):
    """The second folder is that of extra_model_paths.yaml."""
    folder = comfy_server.models_dir.parent / where
    folder.mkdir(exist_ok=True, parents=True)
    source = GOLDEN / "xs" / "model.safetensors"
    (folder / f"{folder.name}.safetensors").write_bytes(source.read_bytes())
    info = comfy_server.object_info("InfDiTCheckpointLoader")["InfDiTCheckpointLoader"]
    options = info["input"]["required"]["model_name"]
    assert f"{folder.name}.safetensors" in str(options)
