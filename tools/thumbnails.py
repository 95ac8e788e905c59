"""Thumbnails of the templates and the README's picture: python -m tools.thumbnails --photos PHOTOS

Each shows a detail before and after at equal size. PHOTOS is the folder that training.photos makes;
only photographs of its `test` part are taken, which no model was trained on. --model takes another
model than the bundled one; --preset and --denoise other settings than the templates'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from infdit_core import load_model, upscale
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.network.model import InfDiT
from infdit_core.sampling import AUTO, PRESETS
from tools.comfy_server import ROOT
from tools.make_workflows import EXAMPLES_OF, START

SIDE, SCALE, LINE = 384, 4, 4
_16_04 = "lomiri-wallpapers-16.04-"
BRUSHES, WINE, HILLS, DOGS, STREAM, PEAKS = (
    _16_04 + name
    for name in (
        "Picture_1A_by_freespace",
        "Wine_by_Jakkub_Mede",
        "aitzgorri_by_Aitzol_Berasategi",
        "friends_by_Aitzol_Berasategi",
        "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi",
    )
)
DETAILS = {
    START: (BRUSHES, 180, 0),
    "SDXL to 4K": (PEAKS, 700, 240),
    "SDXL to 8K in two passes": (HILLS, 1060, 420),
    "SDXL 2048 with HiDiffusion, then Inf-DiT to 8K": (STREAM, 640, 300),
    "SDXL to 2K with DiffuseHigh, then Inf-DiT to 8K": (PEAKS, 300, 420),
    "SDXL 2048 with Upsample Guidance, then Inf-DiT to 8K": (HILLS, 300, 300),
    "DiMR class to 1024 with Inf-DiT": (DOGS, 560, 840),
    "Upscale a folder": (WINE, 560, 200),
    "Advanced sampling with KSampler": (WINE, 300, 980),
    "Before and after": (DOGS, 300, 300),
    "Which setting": (BRUSHES, 0, 60),
    "Refine another upscaler's picture": (STREAM, 1200, 380),
}
"""Photograph, and left and top of a detail of 192x384 px, by the template."""
README = (START, "Before and after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=BUNDLED_FOLDER / "infdit_small.safetensors")
    parser.add_argument("--preset", choices=[AUTO, *PRESETS], default=AUTO)
    parser.add_argument("--denoise", type=float, default=1.0)
    parser.add_argument("titles", nargs="*", help="those alone; all without")
    args = parser.parse_args()
    model = load_model(args.model)
    pairs = {}
    for title in args.titles or EXAMPLES_OF:
        name, left, top = DETAILS[title]
        photo = np.load(args.photos / "test" / f"{name}.npy")
        detail = Image.fromarray(photo[top : top + SIDE, left : left + SIDE // 2])
        pairs[title] = before, after = before_after(model, detail, args.preset, args.denoise)
        side_by_side([before, after]).resize((SIDE, SIDE)).save(
            ROOT / "example_workflows" / f"{title}.jpg", quality=90
        )
    if not pairs.keys() >= set(README):
        return
    shown = []
    for title in README:
        for picture, label in zip(pairs[title], ("Bicubic", "Inf-DiT"), strict=True):
            shown.append(labelled(picture, label))
    side_by_side(shown).save(ROOT / "docs" / "before_after.jpg", quality=92)


def before_after(
    model: InfDiT, detail: Image.Image, preset: str, denoise: float
) -> tuple[Image.Image, Image.Image]:
    """A quarter of a picture enlarged by bicubic interpolation and by the model."""
    width, height = detail.size
    small = detail.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).float()[None] / 255  # (1, H, W, 3)
    after = upscale(pixels, float(SCALE), model=model, seed=0, preset=preset, denoise=denoise)
    after = (after[0] * 255).round().byte().numpy()
    return small.resize(detail.size, Image.Resampling.BICUBIC), Image.fromarray(after)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size with white lines between them."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", ((width + LINE) * len(pictures) - LINE, height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * (width + LINE), 0))
    return sheet


def labelled(picture: Image.Image, label: str) -> Image.Image:
    """With a word in the lower left corner."""
    picture = picture.copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    left, top, right, bottom = draw.textbbox((12, picture.height - 32), label, font=font)
    draw.rectangle((left - 6, top - 5, right + 6, bottom + 5), fill=(0, 0, 0))
    draw.text((12, picture.height - 32), label, font=font, fill="white")
    return picture


if __name__ == "__main__":
    main()
