"""The SDXL examples in a real ComfyUI on the CPU, with SDXL's network of random weights.

Of "SDXL to 4K" only what a CPU needs is changed: one step of SDXL instead of thirty, Inf-DiT's
preset draft. The sizes stay, 1024 to 4096: 22 minutes on two cores that other work shared, 12 GB.
`-m slow -s` shows the server's memory. The examples that draw beyond SDXL's size run small.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.reliability.workflows import node, pixels
from tools.browser import CHECKPOINT
from tools.comfy_server import ComfyServer, running_server
from tools.make_workflows import API
from tools.sdxl_checkpoint import write_checkpoint

DISK_GB, MEMORY_GB = 8, 14
LIMIT_SECONDS = 3600
pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.timeout(LIMIT_SECONDS + 600)]
SIDE = 1024  # of SDXL's picture in the example, in pixels
SAMPLER, DECODE, UPSCALE, SAVE = "5", "6", "8", "9"
WATCH = "picture of sdxl"
"""Id of the one node that the test adds, to see the picture between SDXL and Inf-DiT."""


def workflow() -> dict:
    graph = json.loads((API / "sdxl_4k.json").read_text())
    graph[SAMPLER]["inputs"]["steps"] = 1
    graph[UPSCALE]["inputs"]["preset"] = "draft"
    graph[WATCH] = node("SaveImage", images=[DECODE, 0], filename_prefix="sdxl")
    return graph


def peak_gb(server: ComfyServer) -> float:
    """Most memory that the server held, the pages of its files included."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e9


@pytest.fixture(scope="module")
def sdxl_server(comfy, comfy_source, tmp_path_factory) -> Iterator[ComfyServer]:
    """A ComfyUI whose base holds a checkpoint of SDXL's shapes."""
    base = tmp_path_factory.mktemp("sdxl")
    disk, memory = shutil.disk_usage(base).free / 1e9, psutil.virtual_memory().available / 1e9
    if disk < DISK_GB or memory < MEMORY_GB:
        pytest.skip(
            f"Expected {DISK_GB} GB of free disk for the checkpoint and {MEMORY_GB} GB of free "
            f"memory for the server; got {disk:.1f} and {memory:.1f} GB."
        )
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = folder / CHECKPOINT
    # The UNet in the file's fp16, as on a GPU: ComfyUI would hold it in fp32 for a CPU.
    arguments = ["--cpu", "--fp16-unet"]
    python, threads = Path(sys.executable), os.cpu_count()
    try:
        write_checkpoint(checkpoint)
        with running_server(
            python, comfy_source, base, arguments=arguments, threads=threads
        ) as server:
            yield server
    finally:
        checkpoint.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def chain(sdxl_server) -> tuple[np.ndarray, np.ndarray, str]:
    """SDXL's picture, the one that Inf-DiT makes of it, and the server's log."""
    outputs = sdxl_server.submit(workflow(), LIMIT_SECONDS)
    (small,) = sdxl_server.output_files({WATCH: outputs[WATCH]})
    (large,) = sdxl_server.output_files({SAVE: outputs[SAVE]})
    print(f"\n{peak_gb(sdxl_server):.1f} GB at most")
    return pixels(small).float().numpy(), pixels(large).float().numpy(), sdxl_server.log()


SMALL = {
    "sdxl_hidiffusion_8k": {
        "4": {"rau_net": "aggressive"},
        "5": {"width": 256, "height": 192},
        "6": {"steps": 7},
    },
    "sdxl_upsample_guidance_8k": {
        "4": {"scale": "2"},
        "5": {"width": 256, "height": 192},
        "6": {"steps": 3},
    },
    "sdxl_diffusehigh_8k": {
        "4": {"width": 128, "height": 96},
        "5": {"steps": 2},
        "7": {"last_steps": 2, "guided_steps": 1},
    },
}
"""Changes of inputs for 256x192 px before Inf-DiT, by the example and the id of the node."""


@pytest.mark.parametrize("name", SMALL)
def test_examples_beyond_sdxl_s_size_run(sdxl_server, name):
    graph = json.loads((API / f"{name}.json").read_text())
    for key, changes in SMALL[name].items():
        graph[key]["inputs"] |= changes
    graph["10"]["inputs"]["upscale_by"] = 2.0
    outputs = sdxl_server.submit(graph, LIMIT_SECONDS)
    (large,) = sdxl_server.output_files({"11": outputs["11"]})
    found = pixels(large)
    assert found.shape == (384, 512, 3)
    assert found.float().std() > 5  # of 255: neither grey nor black
    assert not re.findall(r"(?mi)^.*(?:traceback|invalid value|nan\b).*$", sdxl_server.log())


def test_comfyui_loaded_it_as_sdxl_with_nothing_missing_and_no_error(chain):
    log = chain[2]
    assert "model_type EPS" in log
    assert "Requested to load SDXL\n" in log
    assert "missing" not in log.lower()
    # SaveImage turns NaN into black, and numpy says so.
    assert not re.findall(r"(?mi)^.*(?:traceback|error|invalid value|nan\b).*$", log)


def test_the_large_picture_is_that_of_sdxl_with_four_times_the_pixels(chain):
    small, large, _ = chain
    assert small.shape == (SIDE, SIDE, 3)
    assert large.shape == (4 * SIDE, 4 * SIDE, 3)
    assert small.std() > 5  # of 255: neither grey nor black
    means = large.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.9
