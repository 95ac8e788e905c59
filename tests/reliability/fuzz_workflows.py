"""Sends workflows with inputs by chance to a real ComfyUI.

A workflow must be refused by ComfyUI's validation, fail with a message that begins with the name of
a node of this pack, or be carried out; after it the server must still make the same picture of the
same workflow. One that takes long is cancelled.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import torch

from tests.reliability.debug_nodes import IMAGES, LATENTS
from tests.reliability.workflows import node, pixels, workflow
from tools.comfy_server import ComfyError, ComfyServer

CANCEL_SECONDS = 2.0
LIMIT_SECONDS = 120
CHECK_EVERY = 50
OURS = ("Inf-DiT ", "Inf-DiT: ", "Load Inf-DiT ", "HiDiffusion: ",
        "Upsample Guidance: ")  # fmt: skip
"""What messages begin with."""
SIGMAS = ("[]", "[1]", "[0, 40]", "[40, 10, 0]", "[40, NaN, 0]", "[Infinity, 0]", "[[1, 0]]", "3",
          "[1, 1, 0]", "[-1, -2]", "[1e38, 1e-38, 0]", "[40, 0]")  # fmt: skip
STRANGE = (None, "", "x", "../../etc/passwd", "NaN", -1, 0, 1, 0.5, 1e308, float("nan"),
           float("inf"), 10**30, -(10**30), True, [], {}, ["load", 99], ["x", 0], [[]])  # fmt: skip
LARGEST = {
    "longest_edge": 300, "upscale_by": 8.0, "megapixels": 0.09, "width": 300, "height": 300,
}  # fmt: skip
"""Instead of the largest value that the schema allows, which would be work of hours."""


class Finding(AssertionError):
    """The server or a node did what it must not."""


def plain(random: Random) -> dict[str, Any]:
    """A workflow with every node of this pack that is right, as far as its parts go together."""
    graph = workflow(seed=random.randrange(2**64))
    graph["schedule"] = node(
        "InfDiTSchedule", model=["load", 0], schedule="auto", blocks=1, tokens_on_cpu=False,
        memory_gb=0.0, reuse_layers=0,
    )  # fmt: skip
    upscale = graph["upscale"]["inputs"]
    upscale["model"] = ["schedule", 0]
    match random.randrange(5):
        case 0:
            graph["conditioning"] = node(
                "InfDiTConditioning", model=["schedule", 0], image=["image", 0], upscale_by=4.0
            )
            graph["sample"] = node(
                "KSampler", model=["schedule", 0], seed=upscale["seed"], steps=2, cfg=1.0,
                sampler_name="heun", scheduler="karras", positive=["conditioning", 0],
                negative=["conditioning", 0], latent_image=["conditioning", 1], denoise=1.0,
            )  # fmt: skip
            graph["decode"] = node(
                "InfDiTDecode", samples=["sample", 0], canvas=["conditioning", 2]
            )
            graph["save"]["inputs"]["images"] = ["decode", 0]
            del graph["upscale"]
        case 1:
            graph["hidiffusion"] = node(
                "HiDiffusion", model=["load", 0], preset="auto", rau_net="auto", t1=0.4, t2=0.0,
                window_attention=True, aggressive_ratio=0.16, seed=0, timing="sampler steps",
            )  # fmt: skip
            upscale["model"] = ["hidiffusion", 0]
        case 2:
            graph["clip"] = node("InfDiTCLIPLoader", clip_name="tiny.safetensors")
            graph["guidance"] = node(
                "InfDiTGuidance", clip=random.choice((["clip", 0], ["load", 1])), positive="a",
                image=["image", 0], negative="b", text_strength=random.choice((0.0, 1.0)),
            )  # fmt: skip
            upscale["guidance"] = ["guidance", 0]
        case 3:
            graph["upsample guidance"] = node(
                "UpsampleGuidance", model=["load", 0], scale="auto", theta=1.0, eta=0.6, ramp=0.0,
                low_size_cond="same",
            )  # fmt: skip
            upscale["model"] = ["upsample guidance", 0]
    return graph


def value(random: Random, name: str, kind: str, options: dict[str, Any]) -> Any:
    """For a widget: at or beyond its limits, or of another type."""
    if kind in ("INT", "FLOAT") and random.random() < 0.7:
        low, high = options["min"], LARGEST.get(name, options["max"])
        return random.choice((low, high, (low + high) // 2, low - 1, options["max"] + 1))
    if kind == "COMBO" and options["options"] and random.random() < 0.7:  # no CLIP: no options
        return random.choice(options["options"])
    return random.choice(STRANGE)


def disturb(random: Random, graph: dict[str, Any], info: dict[str, Any]) -> None:
    """Change some inputs of this pack's nodes, whose schemas are `info`."""
    graph["debug image"] = node("DebugImage", kind=random.choice(list(IMAGES)))
    graph["debug sigmas"] = node("DebugSigmas", values=random.choice(SIGMAS))
    graph["debug latent"] = node("DebugLatent", kind=random.choice(list(LATENTS)))
    sources = {"IMAGE": "debug image", "SIGMAS": "debug sigmas", "LATENT": "debug latent"}
    ours = [name for name, part in graph.items() if part["class_type"] in info]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        inputs = graph[random.choice(ours)]
        schema = info[inputs["class_type"]]["input"]
        fields = schema.get("required", {}) | schema.get("optional", {})
        name = random.choice(list(fields))
        kind, options = (*fields[name], {})[:2]
        if random.random() < 0.05:
            inputs["inputs"].pop(name, None)
        elif kind in sources and random.random() < 0.8:
            inputs["inputs"][name] = [sources[kind], 0]
        elif random.random() < 0.1:
            inputs["inputs"][name] = [random.choice(list(graph)), random.randrange(3)]
        else:
            inputs["inputs"][name] = value(random, name, kind, options)


def attempt(server: ComfyServer, graph: dict[str, Any]) -> str:
    """What became of a workflow, in a word."""

    def cancel(seconds: float) -> None:
        if seconds > CANCEL_SECONDS:
            server.interrupt()

    try:
        prompt = server.queue(graph)
    except ComfyError as error:
        if "HTTP Error" in str(error) or server.process.poll() is not None:
            raise Finding(f"{error}") from None
        return "refused"
    try:
        made = server.output_files(server.wait(prompt, LIMIT_SECONDS, cancel))
    except ComfyError as error:
        if "was interrupted" in str(error):
            return "cancelled"
        failed, _, said = str(error).partition(" failed: ")
        if not said.partition(": ")[2].startswith(OURS):
            raise Finding(f"{failed}: {said}") from None
        return "named"
    for path in made:
        path.unlink()
    return "done"


def run(server: ComfyServer, seeds: range) -> tuple[Counter[str], list[str]]:
    """Outcomes, and findings with their seeds."""
    outcomes, findings = Counter(), []
    reference = picture(server, 0)
    info = {name: part for name, part in server.object_info().items()
            if name.startswith(("InfDiT", "HiDiffusion", "UpsampleGuidance"))}  # fmt: skip
    for seed in seeds:
        random = Random(seed)
        graph = plain(random)
        disturb(random, graph, info)
        try:
            outcomes[attempt(server, graph)] += 1
        except Finding as finding:
            outcomes["FOUND"] += 1
            findings.append(f"seed {seed}: {finding}")
        if (seed + 1) % CHECK_EVERY == 0 or seed == seeds[-1]:
            # by turns from two models, so that it is made anew
            picture(server, 1)
            if not torch.equal(picture(server, 0), reference):
                raise Finding(f"seed {seed}: the picture after it is another")
    return outcomes, findings


def picture(server: ComfyServer, seed: int) -> torch.Tensor:
    """Of the same workflow as ever for a seed."""
    (path,) = server.output_files(server.submit(workflow(seed), LIMIT_SECONDS))
    return pixels(path)
