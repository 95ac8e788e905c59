"""The widgets that DiffuseHigh's nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from .rules import WAVELETS
from .vae import PLAIN

IMAGE, LATENT = "image", "latent"
TILES = {"auto": PLAIN, "off": 2**20, "512": 512, "256": 256}
"""Side in pixels from which the VAE works in tiles, and that of a tile."""
MAX_SEED = 2**64 - 1


def guided_steps_input() -> io.Int.Input:
    return io.Int.Input(
        "guided_steps",
        default=5,
        min=0,
        max=1000,
        tooltip="In how many of the first steps the large forms are taken from the picture. 5 to 7"
        " suit 15 steps: more hold the structure together, too many keep blur. 0 guides nothing.",
    )


def guidance_inputs() -> list[io.Input]:
    """The guidance's further widgets, the same on both nodes."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="How much of the large forms is taken over, 0 to 1. 1 is the authors' way.",
        ),
        io.Float.Input(
            "fade",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            tooltip="How much of the strength is lost over the guided steps, 0 to 1.",
        ),
        io.Combo.Input(
            "guidance",
            options=[IMAGE, LATENT],
            default=IMAGE,
            advanced=True,
            tooltip="Where the forms are taken over. Image decodes and encodes with the VAE in"
            " every guided step, as the authors do. Latent does without, which is faster and not"
            " the authors' method.",
        ),
        io.Float.Input(
            "sharpen_alpha",
            default=1.0,
            min=0.0,
            max=4.0,
            step=0.05,
            advanced=True,
            tooltip="How much the enlarged picture is sharpened before it guides. 0 leaves it as"
            " it is; up to 2 helps against blurred results.",
        ),
        io.Int.Input(
            "sharpen_kernel",
            default=3,
            min=3,
            max=31,
            step=2,
            advanced=True,
            tooltip="Size of the sharpening's blur in pixels, odd.",
        ),
        io.Float.Input(
            "sharpen_sigma_min",
            default=0.1,
            min=0.01,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="The sharpening's blur is drawn anew for every size, from here to"
            " sharpen_sigma_max. Give both the same number to fix it.",
        ),
        io.Float.Input(
            "sharpen_sigma_max",
            default=2.0,
            min=0.01,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="The largest blur that may be drawn.",
        ),
        io.Combo.Input(
            "wavelet",
            options=list(WAVELETS),
            default="db4",
            advanced=True,
            tooltip="What separates large forms from detail. db4 is the authors' choice.",
        ),
        io.Int.Input(
            "levels",
            default=1,
            min=1,
            max=4,
            advanced=True,
            tooltip="How coarse the forms are that are taken over: each level doubles it. 1 is the"
            " authors' choice.",
        ),
    ]


def tile_input() -> io.Combo.Input:
    return io.Combo.Input(
        "tile",
        options=list(TILES),
        default="auto",
        advanced=True,
        tooltip="Tiles of the VAE in pixels. Auto works in one piece up to 1024 px and in tiles of"
        " 1024 px beyond, as the authors do. When memory runs out, tiles become smaller anyway.",
    )
