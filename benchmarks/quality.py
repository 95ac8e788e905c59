"""How good the pictures are: python -m benchmarks.quality --photos FOLDER [--crop PX]

Takes the centre of every photograph of FOLDER/test, reduces it by 4, upscales it again with the
model and with bicubic interpolation, and compares both with the original. Needs piq and kornia;
with --lite0, what `training.features` wrote, also the distance of features of efficientnet-lite0.
Pictures that the result file already has, made by the same model and settings, are not made again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from infdit_core import PRESETS, InfDiT, load_model
from infdit_core.network.config import DTYPES
from infdit_core.sampling import AUTO, SOLVERS, Preset, find_preset
from training import features
from training.features import Lite0, distance

from . import common
from .common import RESULTS
from .common_metrics import against_input, against_original, bars, borders, mean, passed
from .common_photos import (
    DEGRADATIONS,
    Upscaler,
    bicubic,
    centre,
    degrade,
    read_photos,
    to_image,
    upscaler,
)

METHODS = ("ours", "bicubic", "original")


def measure(
    name: str,
    original: Tensor,
    degradation: str,
    model: InfDiT,
    upscale: Upscaler,
    folder: Path | None,
    lite0: Lite0 | None = None,
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
        if lite0 is not None:
            seen = (lite0(picture * 2 - 1) for picture in (pictures[method], original))
            found[method]["lite0"] = distance(*seen).item()
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("quality", __doc__, "photos", "model", "device", "dtype")
    parser.add_argument("--preset", choices=(AUTO, *PRESETS), default=AUTO)
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--solver", choices=sorted(SOLVERS), help="instead of the preset's")
    parser.add_argument("--denoise", type=float, default=1.0)
    parser.add_argument("--crop", type=int, default=2048, help="longest side in pixels")
    parser.add_argument("--degradation", choices=DEGRADATIONS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--consistency", type=int, help="instead of the preset's")
    parser.add_argument("--lite0", type=Path, help="the features of a classifier to compare by")
    parser.add_argument("--pictures", type=Path, help="folder to write the results to, as PNG")
    args = common.parse(parser, argv)
    photos = read_photos(args.photos)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    preset = find_preset(args.preset, model.metadata)
    if args.solver or args.steps:
        solver, steps = args.solver or preset.solver, args.steps or preset.steps
        preset = Preset(solver, steps, consistency=preset.consistency)
    if args.consistency is not None:
        preset = preset._replace(consistency=args.consistency)
    upscale = upscaler(model, preset=preset, seed=args.seed, denoise=args.denoise)
    lite0 = features.read(args.lite0) if args.lite0 else None

    settings = {  # what the pictures depend on
        "model": args.model.name,
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        **preset._asdict(),
        "shares": list(preset.shares),
        **{name: getattr(args, name) for name in ("denoise", "seed", "crop", "dtype")},
    }
    rows: list[dict[str, Any]] = []
    if args.out.exists() and (old := json.loads(args.out.read_text()))["settings"] == settings:
        rows = old["rows"]
    done = {(row["photo"], row["degradation"]) for row in rows}
    result = common.header(args, settings=settings)
    for name in ("piq", "kornia", "pillow"):
        result["environment"][name] = importlib.metadata.version(name)
    for degradation in [args.degradation] if args.degradation else DEGRADATIONS:
        for name, photo in photos.items():
            if (name, degradation) in done:
                continue
            original = centre(photo, args.crop)
            rows.append(measure(name, original, degradation, model, upscale, args.pictures, lite0))
            print(f"{degradation} {name}: {rows[-1]['seconds']} s", flush=True)
            common.save(args.out, result | {"summary": summary(rows), "rows": rows})
    show(summary(rows))


if __name__ == "__main__":
    main()
