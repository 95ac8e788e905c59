"""What denoise and the colour fixes do: python -m benchmarks.fidelity --photos PHOTOS

Upscales the centres of the held-out photographs with the bundled model at several values of
denoise, and with every colour fix at denoise 1, and writes the means to results/fidelity.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from infdit_core import InfDiT, load_model, upscale
from infdit_core.pictures.colour_fix import COLOUR_FIXES, fix_colours
from infdit_core.sampling import AUTO, PRESETS, find_preset

from . import common
from .common_metrics import against_input, against_original
from .common_photos import DEGRADATIONS, bicubic, centre, degrade, read_photos

DENOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
METRICS = ("gmsd", "haarpsi", "vifp", "fsim", "psnr", "consistency_db", "colour_shift")


def results(model: InfDiT, lr: Tensor, preset: str) -> Iterator[tuple[str, int, Tensor]]:
    """Names, evaluations and pictures (1, 3, H, W) in 0..1, from the input (1, 3, h, w)."""
    source, chosen = lr.movedim(1, -1), find_preset(preset, model.metadata)
    yield "bicubic", 0, bicubic(lr)
    image, evaluations = source, 0
    for denoise in DENOISE:
        image = upscale(source, 4.0, model=model, preset=chosen, denoise=denoise)
        steps = len(chosen.sigmas(denoise)) - 1
        evaluations = chosen._replace(steps=steps).evaluations if steps else 0
        yield f"denoise {denoise:g}", evaluations, image.movedim(-1, 1)
    for method in COLOUR_FIXES[1:]:
        yield f"colour_fix {method}", evaluations, fix_colours(image, source, method).movedim(-1, 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("fidelity", __doc__, "photos", "model")
    parser.add_argument("--crop", type=int, default=256, help="px a side of the result")
    parser.add_argument("--preset", choices=(AUTO, *PRESETS), default=AUTO)
    args = common.parse(parser, argv)
    model = load_model(args.model)
    photos = read_photos(args.photos)
    result = common.header(args, photos=len(photos)) | {"means": {}}
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
        result["means"][degradation] = {
            what: {key: round(value / len(photos), 4) for key, value in total.items()}
            for what, total in sums.items()
        }
        for what, means in result["means"][degradation].items():
            print(degradation, what, means, flush=True)
        common.save(common.RESULTS / "fidelity.json", result)


if __name__ == "__main__":
    main()
