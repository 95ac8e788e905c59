"""What the numbers of a file's pixels mean, as a profile of the result (littleCMS, by imagecodecs).

An RGB picture keeps its numbers and its profile. Where a file tells its colours in another way
than by a profile, one is made that says the same. Ink and grey become sRGB by their own profile.
Reference: ITU-T H.273 for code points; ICC.1:2022; DCF 2.0 for Adobe RGB.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from .decoded import Colour

_SPACE = slice(16, 20)
"""Of the bytes of a profile: its colour space."""
_COUNTS = {"GRAY": 1, "CMYK": 4}
"""Colours that are made sRGB, and how many numbers they have."""
_D65 = (0.3127, 0.3290)
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES = {1: _SRGB, 9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
              12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}  # fmt: skip
"""x and y of red, green and blue by the code of H.273, all with D65 as white."""
_ADOBE_RGB = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_ADOBE_GAMMA = 563 / 256
_BT709, _LINEAR, _SRGB_CURVE = (1, 6, 14, 15), 8, 13
_GAMMAS = {4: 2.2, 5: 2.8, _LINEAR: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
_USUAL_GAMMA = 1 / 2.2
_CURVE_POINTS = 1024
_EXIF_IFD, _INTEROP_IFD = 0x8769, 0xA005

logger = logging.getLogger(__name__)


def profile(colour: Colour, exif: Image.Exif) -> bytes | None:
    """The profile of an RGB picture; None for sRGB, and where only code points can say it."""
    if colour.cicp:
        return _of_code_points(*colour.cicp)
    if colour.icc_profile:
        return colour.icc_profile if colour.icc_profile[_SPACE] == b"RGB " else None
    if colour.gamma or colour.chromaticities:
        return _of_png(colour)
    camera = exif.get_ifd(_EXIF_IFD)
    # After get_ifd of the camera's directory, Pillow knows the one in it.
    if camera.get(_INTEROP_IFD) and exif.get_ifd(_INTEROP_IFD).get(1) == "R03":
        return _matrix_profile(_ADOBE_RGB, _D65, _ADOBE_GAMMA)
    return None


def hdr(cicp: bytes | None) -> str | None:
    """The name of a transfer that no profile can say, or None."""
    if not cicp or _of_code_points(*cicp) is not None or cicp in (b"\1\x0d\0\1", b"\2\2\0\1"):
        return None
    return _HDR.get(cicp[1], f"cICP {tuple(cicp)}")


def usable(icc_profile: bytes | None, space: str) -> bytes | None:
    """The profile of grey or ink; None where it is none for them, or damaged, as the log tells."""
    if space == "RGB" or not icc_profile or icc_profile[_SPACE] != space.encode():
        return None
    import imagecodecs

    try:
        _by_profile(np.zeros((1, 1, _COUNTS[space]), np.uint8), space, icc_profile)
    except (imagecodecs.CmsError, ValueError) as error:
        logger.warning("the colour profile is damaged and left out: %s", error)
        return None
    return icc_profile


def to_srgb(pixels: np.ndarray, space: str, icc_profile: bytes | None) -> np.ndarray:
    """Grey and ink as sRGB: by their profile, where there is one.

    Args:
        pixels: (H, W, C) as in `Decoded`, alpha behind the colours.
        space: GRAY or CMYK; RGB comes back as it is.
        icc_profile: a `usable` one.

    Returns:
        (H, W, C) of the same dtype; C = 1 or 2 for grey, 3 or 4 for ink.
    """
    if space == "RGB":
        return pixels
    count = _COUNTS[space]
    colours, alpha = pixels[..., :count], pixels[..., count:]
    if icc_profile:
        colours = _by_profile(np.ascontiguousarray(colours), space, icc_profile)
    elif space == "CMYK":
        colours = _ink_on_white(colours)
    return np.concatenate([colours, alpha], axis=-1)


def _by_profile(colours: np.ndarray, space: str, icc_profile: bytes) -> np.ndarray:
    """(H, W, 1 or 4) -> (H, W, 1 or 3)."""
    import imagecodecs

    kept = colours.dtype
    if kept.kind == "f":
        colours = (colours * 65535).round().astype(np.uint16)
    made: np.ndarray = imagecodecs.cms_transform(
        colours[..., 0] if space == "GRAY" else colours,
        icc_profile,
        imagecodecs.cms_profile("srgb"),
        colorspace="minisblack" if space == "GRAY" else "cmyk",
        outcolorspace="rgb",
    )
    if space == "GRAY":
        made = made[..., :1]  # neutral, so all three are equal
    return made.astype(np.float32) / 65535 if kept.kind == "f" else made


def _ink_on_white(ink: np.ndarray) -> np.ndarray:
    """(H, W, 4) -> (H, W, 3): what ink leaves of white."""
    full = 1.0 if ink.dtype.kind == "f" else np.iinfo(ink.dtype).max
    left = 1 - ink.astype(np.float32) / full
    light = left[..., :3] * left[..., 3:] * full
    return (light if full == 1 else light.round()).astype(ink.dtype)


def _of_png(colour: Colour) -> bytes | None:
    white, primaries = _D65, _SRGB
    if colour.chromaticities:
        white, primaries = colour.chromaticities[:2], colour.chromaticities[2:]
    usual = colour.gamma is None or abs(colour.gamma - _USUAL_GAMMA) < 0.005
    if usual and np.allclose((*white, *primaries), (*_D65, *_SRGB), atol=0.002):
        return None
    return _matrix_profile(tuple(primaries), tuple(white), 1 / colour.gamma if colour.gamma else 0)


def _of_code_points(primaries: int, transfer: int, matrix: int, full_range: int) -> bytes | None:
    colours, gamma = _PRIMARIES.get(primaries), _GAMMAS.get(transfer, 0.0)
    known = transfer in (*_GAMMAS, *_BT709, _SRGB_CURVE)
    if colours is None or matrix or not full_range or not known:
        return None
    if primaries == 1 and transfer == _SRGB_CURVE:
        return None
    return _matrix_profile(colours, _D65, gamma, transfer in _BT709)


@cache
def _matrix_profile(
    primaries: tuple[float, ...], white: tuple[float, ...], gamma: float, bt709: bool = False
) -> bytes:
    """A profile of three primaries and a curve: of sRGB, or of BT.709, or a power."""
    import imagecodecs

    points = [*primaries[0:2], 1, *primaries[2:4], 1, *primaries[4:6], 1]
    curve: dict[str, Any] = {"gamma": gamma}
    if not gamma:
        curve = {"transferfunction": _curve(bt709)}
    return imagecodecs.cms_profile("rgb", whitepoint=[*white, 1], primaries=points, **curve)


def _curve(bt709: bool) -> np.ndarray:
    """Light of evenly spaced values, as 16 bits."""
    values = np.linspace(0, 1, _CURVE_POINTS)
    if bt709:
        light = np.where(values < 0.081, values / 4.5, ((values + 0.099) / 1.099) ** (1 / 0.45))
    else:
        light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return (light * 65535).round().astype(np.uint16)
