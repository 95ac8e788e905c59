"""The SDXL example as it is, in a real ComfyUI on the CPU, with SDXL's network of random weights.

Only what a CPU needs is changed: one step of SDXL instead of thirty, Inf-DiT's preset draft. The
sizes stay, 1024 to 4096: 22 minutes on two cores that other work shared, 12 GB. `-m slow -s` shows
how long each node took and the server's memory.
"""

import asyncio
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.sdxl.make_sdxl_checkpoint import write_checkpoint
from tools.comfy_server import ComfyServer, running_server
from tools.make_workflows import API

DISK_GB, MEMORY_GB = 8, 14
LIMIT_SECONDS = 3600
pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.timeout(LIMIT_SECONDS + 600)]
SIDE = 1024  # of SDXL's picture in the example, in pixels
SAMPLER, DECODE, UPSCALE, SAVE = "5", "6", "8", "9"
WATCH = "picture of sdxl"
"""Id of the one node that the test adds, to see the picture between SDXL and Inf-DiT."""


@dataclass
class Chain:
    """What came of the workflow."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By node id, in the order of execution."""
    cached: list[str] = field(default_factory=list)
    end: str = ""
    small: np.ndarray = field(default_factory=lambda: np.empty(0))
    large: np.ndarray = field(default_factory=lambda: np.empty(0))
    log: str = ""


def workflow() -> dict:
    graph = json.loads((API / "sdxl_4k.json").read_text())
    graph[SAMPLER]["inputs"]["steps"] = 1
    graph[UPSCALE]["inputs"]["preset"] = "draft"
    graph[WATCH] = {
        "class_type": "SaveImage",
        "inputs": {"images": [DECODE, 0], "filename_prefix": "sdxl"},
    }
    return graph


async def listen(server: ComfyServer, graph: dict, chain: Chain) -> str:
    """Run the workflow to its end, noting the nodes; returns the prompt's id."""
    address = server.url.replace("http", "ws") + "/ws?clientId=chain"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
        prompt_id = await asyncio.to_thread(server.queue, graph, "chain")
        node, began = None, 0.0
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["type"] == "execution_cached":
                chain.cached += event["data"]["nodes"]
            if event["type"] == "executing" or event["type"].startswith("execution_"):
                now = time.monotonic()
                if node is not None:
                    chain.seconds[node] = chain.seconds.get(node, 0.0) + now - began
                node, began = event["data"].get("node"), now
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                chain.end = event["type"]
                return prompt_id
    raise AssertionError("the server closed the connection")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.float32)


def peak_gb(server: ComfyServer) -> float:
    """Most memory that the server held, the pages of its files included."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e9


@pytest.fixture(scope="module")
def chain(comfy, comfy_source, tmp_path_factory):
    base = tmp_path_factory.mktemp("sdxl")
    disk, memory = shutil.disk_usage(base).free / 1e9, psutil.virtual_memory().available / 1e9
    if disk < DISK_GB or memory < MEMORY_GB:
        pytest.skip(
            f"Expected {DISK_GB} GB of free disk for the checkpoint and {MEMORY_GB} GB of free "
            f"memory for the server; got {disk:.1f} and {memory:.1f} GB."
        )
    graph, chain = workflow(), Chain()
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = folder / graph["1"]["inputs"]["ckpt_name"]
    try:
        write_checkpoint(checkpoint)
        # The UNet in the file's fp16, as on a GPU: ComfyUI would hold it in fp32 for a CPU.
        with running_server(
            Path(sys.executable),
            comfy_source,
            base,
            arguments=["--cpu", "--fp16-unet"],
            threads=os.cpu_count(),
        ) as server:
            prompt_id = asyncio.run(asyncio.wait_for(listen(server, graph, chain), LIMIT_SECONDS))
            outputs = server.wait(prompt_id, timeout=60)
            (small,) = server.output_files({WATCH: outputs[WATCH]})
            (large,) = server.output_files({SAVE: outputs[SAVE]})
            chain.small, chain.large, chain.log = pixels(small), pixels(large), server.log()
            for node, seconds in chain.seconds.items():
                print(f"\n{graph[node]['class_type']} ({node}): {seconds:.1f} s", end="")
            print(f"\n{chain.small.shape} to {chain.large.shape}, {peak_gb(server):.1f} GB at most")
    finally:
        checkpoint.unlink(missing_ok=True)
    return chain


def test_every_node_ran_once_and_the_workflow_succeeded(chain):
    assert chain.end == "execution_success"
    assert set(chain.seconds) == set(workflow())
    assert not chain.cached


def test_comfyui_loaded_it_as_sdxl_with_nothing_missing(chain):
    assert "model_type EPS" in chain.log
    assert "Requested to load SDXL\n" in chain.log
    assert "missing" not in chain.log.lower()


def test_the_log_has_no_error(chain):
    # SaveImage turns NaN into black, and numpy says so.
    wrong = re.findall(r"(?mi)^.*(?:traceback|error|invalid value|nan\b).*$", chain.log)
    assert not wrong


def test_the_picture_is_exactly_four_times_that_of_sdxl(chain):
    assert chain.small.shape == (SIDE, SIDE, 3)
    assert chain.large.shape == (4 * SIDE, 4 * SIDE, 3)


def test_the_large_picture_is_the_small_one_with_more_pixels(chain):
    assert chain.small.std() > 5  # of 255: neither grey nor black
    means = chain.large.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3))
    assert np.corrcoef(means.ravel(), chain.small.ravel())[0, 1] > 0.9
