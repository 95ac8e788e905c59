"""The SDXL example as it is, in a real ComfyUI on the CPU, with SDXL's network of random weights.

Only what a CPU needs is changed: one step of SDXL instead of thirty, Inf-DiT's preset draft. The
sizes stay, 1024 to 4096: 22 minutes on two cores that other work shared, 12 GB. `-m slow -s` shows
the server's memory.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.reliability.workflows import node, pixels
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
def chain(comfy, comfy_source, tmp_path_factory) -> tuple[np.ndarray, np.ndarray, str]:
    """SDXL's picture, the one that Inf-DiT makes of it, and the server's log."""
    base = tmp_path_factory.mktemp("sdxl")
    disk, memory = shutil.disk_usage(base).free / 1e9, psutil.virtual_memory().available / 1e9
    if disk < DISK_GB or memory < MEMORY_GB:
        pytest.skip(
            f"Expected {DISK_GB} GB of free disk for the checkpoint and {MEMORY_GB} GB of free "
            f"memory for the server; got {disk:.1f} and {memory:.1f} GB."
        )
    graph = workflow()
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = folder / graph["1"]["inputs"]["ckpt_name"]
    # The UNet in the file's fp16, as on a GPU: ComfyUI would hold it in fp32 for a CPU.
    arguments = ["--cpu", "--fp16-unet"]
    python, threads = Path(sys.executable), os.cpu_count()
    try:
        write_checkpoint(checkpoint)
        with running_server(
            python, comfy_source, base, arguments=arguments, threads=threads
        ) as server:
            outputs = server.submit(graph, LIMIT_SECONDS)
            (small,) = server.output_files({WATCH: outputs[WATCH]})
            (large,) = server.output_files({SAVE: outputs[SAVE]})
            print(f"\n{peak_gb(server):.1f} GB at most")
            return pixels(small).float().numpy(), pixels(large).float().numpy(), server.log()
    finally:
        checkpoint.unlink(missing_ok=True)


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
