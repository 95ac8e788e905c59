"""Inf-DiT Upscale in a real ComfyUI, by how it keeps memory: python -m benchmarks.in_comfyui ...

For every way of starting ComfyUI a server of its own, in which SDXL draws one picture and Inf-DiT
upscales another by 4 right after it, so that SDXL is still loaded, and once more without it.
Written are the seconds of Inf-DiT, the most memory that the device was seen to hold, the plan from
the log, and the difference to the picture of the first way, which should be none. SDXL and the
network of the released size have random weights: they are made in --files, 9.5 GB, and kept there.
Writes benchmarks/results/in_comfyui_<device>.json after every row. On a CPU `--config small --sdxl
no` shows that it runs.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from infdit_core.network.config import DTYPES
from tools.comfy_server import ComfyError, ComfyServer, running_server
from tools.sdxl_checkpoint import write_checkpoint
from training.export import write

from . import common
from .common import CONFIGS, RESULTS

WAYS = {
    "default": (),
    "no dynamic VRAM": ("--disable-dynamic-vram",),
    "lowvram": ("--disable-dynamic-vram", "--lowvram"),
    "novram": ("--novram",),
    "no pinned memory": ("--disable-pinned-memory",),
}
_POLL_SECONDS = 0.1
_PLAN = re.compile(r"Inf-DiT: (\d+×\d+ px, .*)")
Workflow = dict[str, Any]


def sdxl(name: str, side: int) -> Workflow:
    """One step of SDXL with random weights, which loads all of it."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a village"}}
    latent = {"width": side, "height": side, "batch_size": 1}
    sampling = {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0],
        "seed": 0, "steps": 1, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal",
        "denoise": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "2": text,
        "3": {"class_type": "EmptyLatentImage", "inputs": latent},
        "4": {"class_type": "KSampler", "inputs": sampling},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    }


def inf_dit(model: str, picture: str, steps: int) -> Workflow:
    """Load Inf-DiT Checkpoint and Inf-DiT Upscale by 4; a saved picture."""
    loader = {"model_name": model, "weight_dtype": "default"}
    upscaling = {
        "model": ["1", 0], "image": ["2", 0], "upscale_by": 4.0, "seed": 0, "steps": steps,
        "preset": "exact", "longest_edge": 0, "denoise": 1.0, "colour_fix": "none",
    }  # fmt: skip
    return {
        "1": {"class_type": "InfDiTCheckpointLoader", "inputs": loader},
        "2": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "3": {"class_type": "InfDiTSampler", "inputs": upscaling},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    }


class MostUsed:
    """The most bytes that the device of a server was seen to hold while the block ran."""

    def __init__(self, server: ComfyServer) -> None:
        self._server, self.bytes = server, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            device = self._server.system_stats()["devices"][0]
            self.bytes = max(self.bytes, device["vram_total"] - device["vram_free"])

    def __enter__(self) -> MostUsed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(server: ComfyServer, before: Workflow | None, workflow: Workflow) -> dict[str, Any]:
    """One row, and the picture that was made."""
    if before is not None:
        server.submit(before)
    said = len(server.log())
    with MostUsed(server) as used:
        started = time.monotonic()
        outputs = server.submit(workflow)
        seconds = time.monotonic() - started
    (path,) = server.output_files(outputs)
    return {
        "seconds": round(seconds, 2),
        "most_used_bytes": used.bytes,
        "plans": _PLAN.findall(server.log()[said:]),
        "picture": np.asarray(Image.open(path), dtype=np.float32) / 255,
    }


def made(path: Path, make: Callable[[Path], Any]) -> Path:
    """A file that is made where it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name} ...", flush=True)
        unfinished = path.with_suffix(".unfinished")
        make(unfinished)
        unfinished.rename(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(
        "in_comfyui", __doc__, "device", "comfyui",
        config={"default": "released"}, size={"default": 4096},
    )  # fmt: skip
    parser.add_argument("--files", type=Path, required=True, help="folder for the random weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sdxl", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--steps", type=int, default=1, help="of preset exact")
    args = common.parse(parser, argv)
    common.add_comfyui(args.comfyui, args.device)
    config = CONFIGS[args.config]

    def write_network(path: Path) -> None:
        net = common.build(config, DTYPES["bf16"], args.device)
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        write(config, weights, path, {"infdit.training": "none: random weights"})

    network = made(args.files / f"{args.config}.safetensors", write_network)
    checkpoint = None
    if args.sdxl != "no":
        checkpoint = made(
            args.files / "sdxl_random.safetensors",
            lambda path: write_checkpoint(path, device=args.device),
        )
    if args.device.type == "cuda":  # the servers shall have all of it
        torch.cuda.empty_cache()
    result = common.header(args, "config", "size") | {"rows": []}
    out, first = RESULTS / f"in_comfyui_{args.device.type}.json", None
    for way in args.ways:
        for loaded in {"no": [False], "yes": [True], "both": [False, True]}[args.sdxl]:
            row: dict[str, Any] = {"way": way, "sdxl_loaded": loaded}
            flags = [*WAYS[way], *(["--cpu"] if args.device.type == "cpu" else [])]
            with tempfile.TemporaryDirectory(prefix="infdit-") as folder:
                base = Path(folder)
                for kind, file in (("infdit", network), ("checkpoints", checkpoint)):
                    (base / "models" / kind).mkdir(parents=True)
                    if file is not None:
                        (base / "models" / kind / file.name).symlink_to(file.resolve())
                (base / "input").mkdir()
                levels = np.random.default_rng(0).integers(0, 256, (args.size // 4,) * 2 + (3,))
                Image.fromarray(levels.astype(np.uint8)).save(base / "input" / "noise.png")
                before = sdxl(checkpoint.name, 1024) if checkpoint and loaded else None
                try:
                    with running_server(
                        Path(sys.executable), args.comfyui, base, arguments=flags
                    ) as server:
                        workflow = inf_dit(network.name, "noise.png", args.steps)
                        row |= measure(server, before, workflow)
                except ComfyError as error:
                    row["failed"] = str(error)
            picture = row.pop("picture", None)
            if picture is not None:
                first = picture if first is None else first
                row["rms_to_first"] = round(float(np.sqrt(np.mean((picture - first) ** 2))), 6)
            result["rows"].append(row)
            common.save(out, result)
            print(row, flush=True)


if __name__ == "__main__":
    main()
