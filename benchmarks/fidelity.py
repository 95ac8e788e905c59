"""What denoise and the colour fixes do: python -m benchmarks.fidelity --photos PHOTOS

Upscales the centres of the held-out photographs with the bundled model at several values of
denoise, and with every colour fix at denoise 1, and writes the means to results/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from infdit_core import InfDiT, LayerMajor, load_model, prepare, sample
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.pictures.colour_fix import COLOUR_FIXES, fix_colours
from infdit_core.sampling import PRESETS

from .evaluation import RESULTS, environment
from .quality_data import DEGRADATIONS, bicubic, centre, degrade, read_photos
from .quality_metrics import against_input, against_original

DENOISE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
METRICS = ("gmsd", "haarpsi", "vifp", "fsim", "psnr", "consistency_db", "colour_shift")


def results(model: InfDiT, lr: Tensor, preset: str) -> Iterator[tuple[str, int, Tensor]]:
    """Names, evaluations and pictures (1, 3, H, W) in 0..1, from the input (1, 3, h, w)."""
    source = lr.movedim(1, -1)
    canvas = prepare(source, 4.0, block_px=model.config.block_px)
    noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(0))
    chosen = PRESETS[preset]
    yield "bicubic", 0, bicubic(lr)
    image = bicubic(lr).movedim(1, -1)
    for denoise in DENOISE:
        sigmas = chosen.sigmas(denoise)
        x = sample(
            model, canvas.condition(), sigmas,
            noise=noise, solver=chosen.solver, schedule=LayerMajor(16),
        )  # fmt: skip
        image = canvas.finish(x)
        evaluations = chosen._replace(steps=len(sigmas) - 1).evaluations
        yield f"denoise {denoise:g}", evaluations, image.movedim(-1, 1)
    for method in COLOUR_FIXES[1:]:
        yield f"colour_fix {method}", evaluations, fix_colours(image, source, method).movedim(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--crop", type=int, default=256, help="px a side of the result")
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    args = parser.parse_args()
    model = load_model(BUNDLED_FOLDER / "infdit_small.safetensors")
    photos = read_photos(args.photos)
    rows = {}
    for degradation in DEGRADATIONS:
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, photo in photos.items():
            original = centre(photo, args.crop)
            lr = degrade(original, degradation, name).clamp(0, 1)
            for what, evaluations, picture in results(model, lr, args.preset):
                found = against_original(picture, original) | against_input(picture, lr)
                sums[what]["evaluations"] += evaluations
                for key in METRICS:
                    sums[what][key] += found[key]
        rows[degradation] = {
            what: {key: round(value / len(photos), 4) for key, value in total.items()}
            for what, total in sums.items()
        }
        for what, means in rows[degradation].items():
            print(degradation, what, means, flush=True)
    content = environment(torch.device("cpu")) | {
        "command": f"python -m benchmarks.fidelity --crop {args.crop} --preset {args.preset}",
        "photos": len(photos),
        "means": rows,
    }
    (RESULTS / "fidelity.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
