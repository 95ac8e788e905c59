"""How good the pictures are: python -m benchmarks.quality --photos FOLDER [--crop PX] [--grid FILE]

Takes the centre of every photograph of FOLDER/test, reduces it by 4, upscales it again with the
model and with bicubic interpolation, and compares both with the original. `--photos` is what
training.photos made, `--grid` draws docs/quality.png. Needs piq, kornia and matplotlib.

Pictures that the result file already has, made by the same model and settings, are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infdit_core import PRESETS, InfDiT, load_model, plan, prepare, sample
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.sampling import SOLVERS, Preset

from .evaluation import DTYPES, RESULTS, environment
from .quality_data import DEGRADATIONS, bicubic, centre, degrade, read_photos
from .quality_grid import draw, to_image
from .quality_metrics import against_input, against_original, bars, borders, mean, passed

CPU_MEMORY_BYTES = 4e9
METHODS = ("ours", "bicubic", "original")
Upscaler = Callable[[Tensor], Tensor]
"""From (1, 3, h, w) to (1, 3, 4 h, 4 w), in 0..1."""


def upscaler(model: InfDiT, preset: Preset, seed: int, denoise: float = 1.0) -> Upscaler:
    """Enlarge by 4 with the model, as the command line does."""
    weight = model.final.linear.weight
    memory = CPU_MEMORY_BYTES
    if weight.device.type == "cuda":
        memory = torch.cuda.mem_get_info(weight.device)[0]

    def upscale(lr: Tensor) -> Tensor:
        canvas = prepare(lr.permute(0, 2, 3, 1), block_px=model.config.block_px)
        noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(seed))
        canvas.concat, canvas.lr = canvas.concat.to(weight.device), canvas.lr.to(weight.device)
        height, width = canvas.concat.shape[-2:]
        device = weight.device.type
        x = sample(
            model,
            canvas.condition(),
            preset.sigmas(denoise),
            noise=noise,
            solver=preset.solver,
            schedule=plan(model.config, height, width, weight.dtype, memory, device=device),
        )
        return canvas.finish(x.cpu()).permute(0, 3, 1, 2)

    return upscale


def measure(
    name: str,
    original: Tensor,
    degradation: str,
    model: InfDiT,
    upscale: Upscaler,
    folder: Path | None,
) -> dict[str, Any]:
    """One row of the result: the metrics of the model's picture and of bicubic enlargement."""
    lr = degrade(original, degradation, name)
    started = time.monotonic()
    ours = upscale(lr)
    row: dict[str, Any] = {"photo": name, "degradation": degradation}
    row |= {"size": list(original.shape[-2:]), "seconds": round(time.monotonic() - started, 2)}
    cells = model.config.block_px, model.config.patch_size
    pictures = {"ours": ours, "bicubic": bicubic(lr), "original": original}
    found = {method: borders(picture, *cells) for method, picture in pictures.items()}
    for method in ("ours", "bicubic"):
        found[method] |= against_original(pictures[method], original)
        found[method] |= against_input(pictures[method], lr)
        # bicubic interpolation knows no blocks, so what it has at their borders is the content's
        by_content = found["bicubic"]["block_borders"]
        found[method]["block_seam"] = found[method]["block_borders"] / by_content - 1
    for method, values in found.items():
        row[method] = {key: round(value, 5) for key, value in values.items()}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        to_image(ours[0]).save(folder / f"{name}_{degradation}.png")
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and requirements by degradation."""
    found = {}
    for degradation in DEGRADATIONS:
        chosen = [row for row in rows if row["degradation"] == degradation]
        if not chosen:
            continue
        means = {method: mean([row[method] for row in chosen]) for method in METHODS}
        seams = [row["ours"]["block_seam"] for row in chosen]
        judged = bars(means["ours"], means["bicubic"], degradation)
        found[degradation] = {
            "photos": len(chosen),
            "seconds": round(sum(row["seconds"] for row in chosen), 1),
            **{method: {k: round(v, 5) for k, v in means[method].items()} for method in METHODS},
            "block_seam_error": round(float(np.std(seams) / len(seams) ** 0.5), 5),
            "bars": [asdict(bar) for bar in judged],
            "passed": passed(judged),
        }
    return found


def show(found: dict[str, Any]) -> None:
    """The table on the terminal."""
    for degradation, part in found.items():
        print(f"\n{degradation}, {part['photos']} photographs, {part['seconds']:.0f} s")
        print(f"  {'':16}" + "".join(f"{method:>10}" for method in METHODS))
        for key in part["ours"]:
            values = (part[method].get(key) for method in METHODS)
            print(
                f"  {key:16}" + "".join(f"{'' if v is None else round(v, 4):>10}" for v in values)
            )
        print(f"  standard error of ours' block_seam: {part['block_seam_error']:.4f}")
        for bar in part["bars"]:
            mark = "pass" if bar["passed"] else "FAIL"
            print(f"  {mark}  {bar['name']}: {bar['value']:.4f}, limit {bar['limit']:.4f}")


def settings_of(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """What the pictures depend on."""
    return {
        "model": args.model.name,
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "solver": preset.solver,
        "steps": preset.steps,
        "denoise": args.denoise,
        "seed": args.seed,
        "crop": args.crop,
        "dtype": args.dtype,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="what training.photos made")
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER / "infdit_small.safetensors")
    parser.add_argument("--preset", choices=PRESETS, default="exact")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--solver", choices=sorted(SOLVERS), help="instead of the preset's")
    parser.add_argument("--denoise", type=float, default=1.0)
    parser.add_argument("--crop", type=int, default=2048, help="longest side in pixels")
    parser.add_argument("--degradation", choices=DEGRADATIONS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--pictures", type=Path, help="folder to write the results to, as PNG")
    parser.add_argument("--grid", type=Path, help="draw the comparison here, and nothing else")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    photos = read_photos(args.photos)
    device = torch.device(args.device)
    model = load_model(args.model, device, DTYPES[args.dtype])
    preset = PRESETS[args.preset]
    preset = Preset(args.solver or preset.solver, args.steps or preset.steps)
    upscale = upscaler(model, preset, args.seed, args.denoise)
    if args.grid:
        draw(photos, upscale, args.grid)
        return

    settings = settings_of(args, preset)
    rows: list[dict[str, Any]] = []
    if args.out.exists() and (old := json.loads(args.out.read_text()))["settings"] == settings:
        rows = old["rows"]
    done = {(row["photo"], row["degradation"]) for row in rows}
    versions = {name: importlib.metadata.version(name) for name in ("piq", "kornia", "pillow")}
    result = {
        "command": " ".join(["python -m benchmarks.quality", *(argv or sys.argv[1:])]).replace(
            str(args.photos), "PHOTOS"
        ),
        "settings": settings,
        "environment": environment(device) | versions,
    }
    for degradation in [args.degradation] if args.degradation else DEGRADATIONS:
        for name, photo in photos.items():
            if (name, degradation) in done:
                continue
            original = centre(photo, args.crop)
            rows.append(measure(name, original, degradation, model, upscale, args.pictures))
            print(f"{degradation} {name}: {rows[-1]['seconds']} s", flush=True)
            result |= {"summary": summary(rows), "rows": rows}
            # replaced as a whole, so that a kill leaves the finished pictures
            part = args.out.with_suffix(".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(args.out)
    show(summary(rows))


if __name__ == "__main__":
    main()
