"""How good the pictures are: python -m benchmarks.quality --photos FOLDER [--crop PX]

Takes the centre of every photograph of FOLDER/test, reduces it by 4 and upscales it again: with the
model, with its prior alone (denoise 0), with bicubic interpolation, and with the upscalers whose
packages lie in --peers (`benchmarks.common_peers` says how to fetch them). Compares all with the
original. Needs piq and kornia; with --lite0, what `training.features` wrote, also the distance of
features of efficientnet-lite0.
Pictures that the result file already has, made by the same model and settings, are not made again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from infdit_core import PRESETS, load_model
from infdit_core.network.config import DTYPES
from infdit_core.sampling import AUTO, SOLVERS, Preset, find_preset
from training import features
from training.features import Lite0, distance

from . import common
from .common import RESULTS
from .common_metrics import against_input, against_original, bars, borders, mean, passed
from .common_peers import read_peers
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


def measure(
    original: Tensor,
    lr: Tensor,
    upscalers: Mapping[str, Upscaler],
    cells_px: tuple[int, int],
    clock: Callable[[], float] = time.process_time,
    lite0: Lite0 | None = None,
    pictures: Path | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of every upscaler's picture by its name, and those of the original alone.

    Args:
        original: (1, 3, H, W).
        lr: (1, 3, H/4, W/4), made of it.
        cells_px: sides of the model's blocks and patches.
        clock: for `seconds`; that of the CPU does not run while others compute there.
        pictures: how paths to write the pictures to begin.
    """
    # bicubic interpolation knows no blocks, so what it has at their borders is the content's
    by_content = borders(bicubic(lr), *cells_px)["block_borders"]
    found = {"original": borders(original, *cells_px)}
    for method, upscale in upscalers.items():
        started = clock()
        picture = upscale(lr)
        seconds = clock() - started
        found[method] = borders(picture, *cells_px)
        found[method] |= against_original(picture, original) | against_input(picture, lr)
        if lite0 is not None:
            seen = (lite0(image * 2 - 1) for image in (picture, original))
            found[method]["lite0"] = distance(*seen).item()
        found[method]["block_seam"] = found[method]["block_borders"] / by_content - 1
        found[method]["seconds"] = seconds
        if pictures:
            pictures.parent.mkdir(parents=True, exist_ok=True)
            to_image(picture[0]).save(f"{pictures}_{method}.png")
    return {
        method: {key: round(value, 5) for key, value in values.items()}
        for method, values in found.items()
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and requirements by degradation; of what all photographs were upscaled with."""
    found = {}
    for degradation in DEGRADATIONS:
        chosen = [row["methods"] for row in rows if row["degradation"] == degradation]
        if not chosen:
            continue
        methods = [name for name in chosen[-1] if all(name in row for row in chosen)]
        means = {method: mean([row[method] for row in chosen]) for method in methods}
        seams = [row["ours"]["block_seam"] for row in chosen]
        judged = bars(means["ours"], means["bicubic"], degradation)
        found[degradation] = {
            "photos": len(chosen),
            "means": {
                method: {key: round(value, 5) for key, value in values.items()}
                for method, values in means.items()
            },
            "block_seam_error": round(float(np.std(seams) / len(seams) ** 0.5), 5),
            "bars": [asdict(bar) for bar in judged],
            "passed": passed(judged),
        }
    return found


def show(found: dict[str, Any]) -> None:
    """The table on the terminal."""
    for degradation, part in found.items():
        means = part["means"]
        print(f"\n{degradation}, {part['photos']} photographs")
        print(f"  {'':16}" + "".join(f"{method:>13}" for method in means))
        for key in means["ours"]:
            values = (means[method].get(key) for method in means)
            print(
                f"  {key:16}" + "".join(f"{'' if v is None else round(v, 4):>13}" for v in values)
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
    parser.add_argument("--peers", type=Path, help="folder of other upscalers' packages")
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
    ours = partial(upscaler, model, preset=preset, seed=args.seed)
    upscalers = {"ours": ours(denoise=args.denoise)}
    if model.prior is not None:
        upscalers["prior"] = ours(denoise=0)
    upscalers |= read_peers(args.peers, args.device) | {"bicubic": bicubic}
    clock = time.process_time if args.device.type == "cpu" else time.monotonic
    cells_px = model.config.block_px, model.config.patch_size
    lite0 = features.read(args.lite0) if args.lite0 else None

    settings = {  # what the pictures depend on
        "model": args.model.name,
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        **preset._asdict(),
        "shares": list(preset.shares),
        **{name: getattr(args, name) for name in ("denoise", "seed", "crop", "dtype")},
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if args.out.exists() and (old := json.loads(args.out.read_text()))["settings"] == settings:
        rows = {(row["photo"], row["degradation"]): row for row in old["rows"]}
    result = common.header(args, settings=settings)
    for name in ("piq", "kornia", "pillow"):
        result["environment"][name] = importlib.metadata.version(name)
    for degradation in [args.degradation] if args.degradation else DEGRADATIONS:
        for name, photo in photos.items():
            row = rows.setdefault(
                (name, degradation), {"photo": name, "degradation": degradation, "methods": {}}
            )
            missing = {key: f for key, f in upscalers.items() if key not in row["methods"]}
            if not missing:
                continue
            original = centre(photo, args.crop)
            row["size"] = list(original.shape[-2:])
            pictures = args.pictures / f"{name}_{degradation}" if args.pictures else None
            lr = degrade(original, degradation, name)
            row["methods"] |= measure(original, lr, missing, cells_px, clock, lite0, pictures)
            print(f"{degradation} {name}", flush=True)
            done = [*rows.values()]
            common.save(args.out, result | {"summary": summary(done), "rows": done})
    show(summary([*rows.values()]))


if __name__ == "__main__":
    main()
