"""What a user sees and does while an upscale runs in a real ComfyUI server."""

import asyncio
import json
import re
import struct
import time
from dataclasses import dataclass, field

import aiohttp
import pytest

from tests.reliability.workflows import workflow
from tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy

STEPS = 6  # of the preset draft
MODEL = "infdit_small"
TEXT, PREVIEW_WITH_METADATA = 3, 4  # binary messages of the websocket
LIMIT_SECONDS = 240


@dataclass
class Run:
    """What the websocket told of a workflow."""

    events: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cancelled_after: float = 0.0
    """Seconds from the request to cancel until the workflow had stopped, if it was cancelled."""


async def listen(server: ComfyServer, graph: dict, cancel: bool) -> Run:
    run, asked = Run(), 0.0
    address = server.url.replace("http", "ws") + "/ws?clientId=listener"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
        await socket.send_json(
            {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        )
        await asyncio.to_thread(server.queue, graph, "listener")
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                (kind,) = struct.unpack(">I", message.data[:4])
                if kind == PREVIEW_WITH_METADATA:
                    run.previews.append(message.data[4:])
                elif kind == TEXT:
                    (length,) = struct.unpack(">I", message.data[4:8])  # of the node's id
                    run.texts.append(message.data[8 + length :].decode())
                continue
            event = json.loads(message.data)
            run.events.append(event["type"])
            if event["type"] == "progress":
                run.values.append(event["data"]["value"] / event["data"]["max"])
                if cancel and not asked:
                    asked = time.monotonic()
                    await asyncio.to_thread(server.interrupt)
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                run.cancelled_after = time.monotonic() - asked
                return run
    raise AssertionError("the server closed the connection")


def watched(server: ComfyServer, graph: dict, cancel: bool = False) -> Run:
    return asyncio.run(asyncio.wait_for(listen(server, graph, cancel), LIMIT_SECONDS))


@pytest.fixture(scope="module")
def run(comfy_server: ComfyServer) -> Run:
    return watched(comfy_server, workflow(1, MODEL, 128, 64))


def test_the_preview_changes_with_every_step(run):
    assert run.events[-1] == "execution_success"
    assert len(set(run.previews)) == 1 + STEPS  # the first is the picture itself


def test_the_bar_runs_once_from_start_to_end(run):
    assert run.values == sorted(run.values)
    assert run.values[-1] == 1


def test_the_text_begins_with_the_sizes_and_ends_with_the_time(run):
    assert run.texts[0] == "128x64 -> 512x256, loading"
    assert any(re.match(rf"step [1-{STEPS}] of {STEPS}", text) for text in run.texts), run.texts
    last = rf"512x256 in (\d+ min )?\d+ s · multistep, {STEPS} steps"
    assert re.fullmatch(last, run.texts[-1])
    assert not [text for text in run.texts if "\n" in text]


def test_cancelling_stops_within_a_second_and_the_next_run_works(comfy_server, run):
    cancelled = watched(comfy_server, workflow(2, MODEL, 256, 64), cancel=True)
    assert cancelled.events[-1] == "execution_interrupted"
    assert cancelled.cancelled_after < 1
    assert re.fullmatch(rf"cancelled at (the start|step \d of {STEPS})", cancelled.texts[-1])


def test_the_model_stays_loaded_between_runs(comfy_server, run):
    loads = comfy_server.log().count("Requested to load InfDiTModel")
    assert loads
    assert watched(comfy_server, workflow(3, MODEL, 64, 64)).events[-1] == "execution_success"
    assert comfy_server.log().count("Requested to load InfDiTModel") == loads
