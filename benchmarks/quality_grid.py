"""Draw docs/quality.png: python -m benchmarks.quality_grid --photos FOLDER --peers FOLDER

--peers is as for `benchmarks.quality`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infdit_core import PRESETS, load_model
from infdit_core.sampling import AUTO

from . import common
from .common_peers import read_peers
from .common_photos import Upscaler, bicubic, degrade, read_photos, to_image, to_tensor, upscaler

CENTRES_PX = {
    "mate-backgrounds-LadyBird": (400, 896),
    "lomiri-wallpapers-16.04-friends_by_Aitzol_Berasategi": (480, 440),
    "lomiri-wallpapers-20.04-Kleiber_by_Lukas_Baubkus": (884, 1276),
    "plasma-workspace-wallpapers-EveningGlow": (464, 468),
    "mate-backgrounds-YellowFlower": (612, 1048),
    "mate-backgrounds-Dune": (192, 428),
}
"""(y, x) of the crops by photograph: fur, feathers, thin lines, texture, soft background."""
SHOWN_PX = 192
MARGIN_PX = 32
"""Around what is shown, upscaled with it as in a whole picture."""
SHOWN_PEERS = ("esrgan-thick", "DAT-light")
LABEL_PX = 22
GAP_PX = 4


def draw(photos: Mapping[str, np.ndarray], upscalers: Mapping[str, Upscaler], path: Path) -> None:
    """Write the grid: a row for every crop, first the original, then a column for every upscaler.

    Args:
        photos: (H, W, 3) uint8 by name, those of CENTRES_PX among them.
        upscalers: by the label of their column.
    """
    cell = SHOWN_PX + GAP_PX
    labels = ("original", *upscalers)
    size = len(labels) * cell - GAP_PX, LABEL_PX + len(CENTRES_PX) * cell - GAP_PX
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, label in enumerate(labels):
        centre = column * cell + SHOWN_PX / 2
        pen.text((centre, LABEL_PX / 2), label, "black", font, anchor="mm")
    for row, (name, (y, x)) in enumerate(CENTRES_PX.items()):
        reach = SHOWN_PX // 2 + MARGIN_PX
        original = to_tensor(photos[name][y - reach : y + reach, x - reach : x + reach])
        lr = degrade(original, "bicubic", name)
        pictures = original, *(upscale(lr) for upscale in upscalers.values())
        for column, picture in enumerate(pictures):
            shown = picture[0, :, MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
            sheet.paste(to_image(shown), (column * cell, LABEL_PX + row * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments("quality_grid", __doc__, "photos", "model", "device")
    parser.add_argument("--preset", choices=(AUTO, *PRESETS), default=AUTO)
    parser.add_argument("--peers", type=Path, help="folder of other upscalers' packages")
    parser.add_argument("--out", type=Path, default=common.ROOT / "docs" / "quality.png")
    args = common.parse(parser, argv)
    model = load_model(args.model, args.device)
    peers = read_peers(args.peers, args.device)
    upscalers = {"bicubic": bicubic}
    upscalers |= {name: peers[name] for name in SHOWN_PEERS if name in peers}
    for denoise in (0, 1):
        upscalers[f"ours, denoise {denoise}"] = upscaler(model, preset=args.preset, denoise=denoise)
    draw(read_photos(args.photos), upscalers, args.out)


if __name__ == "__main__":
    main()
