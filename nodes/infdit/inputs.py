"""Picture in, picture out: what the nodes that upscale share."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ...infdit_core.pictures.colour_fix import COLOUR_FIXES
from ...infdit_core.pictures.prepare import check_image, target_size
from ...infdit_core.pictures.wrap import WRAPS
from ..common import Guidance, require
from .comfy_model import CLIP_ATTACHMENT, require_infdit

_MAX_EDGE_PX = 32768
_BY_FACTOR, _BY_MEGAPIXELS, _BY_BOX = "factor or longest edge", "megapixels", "width and height"


def picture_inputs(above_4: str) -> list:
    """Model, pictures, guidance and the factor; `above_4` says what to do for a larger one."""
    return [
        io.Model.Input("model", tooltip="From Load Inf-DiT Checkpoint."),
        io.Image.Input("image", tooltip="The pictures to upscale, of any size."),
        Guidance.Input(
            "guidance",
            optional=True,
            tooltip="From Inf-DiT CLIP Guidance. Left out, the CLIP tower of the model"
            " file describes the picture, if the model was trained with one.",
        ),
        io.Float.Input(
            "upscale_by",
            default=4.0,
            min=1.0,
            max=8.0,
            step=0.05,
            tooltip=f"How many times wider and higher the result is. {above_4} Other ways to say"
            " the size are among the advanced inputs.",
        ),
    ]


def longest_edge_input() -> io.Int.Input:
    """The size of the result by its longer side."""
    return io.Int.Input(
        "longest_edge",
        default=0,
        min=0,
        max=_MAX_EDGE_PX,
        optional=True,
        advanced=True,
        tooltip="Longer side of the result in pixels, in place of upscale_by; the other side"
        " follows. 0 leaves the size to upscale_by. Never makes a picture smaller.",
    )


def size_inputs() -> list:
    """Other ways to say the size, for `result_size`."""
    sides = [
        io.Int.Input(
            side,
            default=2048,
            min=1,
            max=_MAX_EDGE_PX,
            optional=True,
            advanced=True,
            tooltip=f"With size_by width and height: the result is at most this {what}, in pixels.",
        )
        for side, what in (("width", "wide"), ("height", "high"))
    ]
    return [
        io.Combo.Input(
            "size_by",
            options=[_BY_FACTOR, _BY_MEGAPIXELS, _BY_BOX],
            default=_BY_FACTOR,
            optional=True,
            advanced=True,
            tooltip="What decides the size: upscale_by or longest_edge; the megapixels below; or"
            " the width and height below, which the result just fits into. The picture keeps its"
            " shape, and is never made smaller.",
        ),
        io.Float.Input(
            "megapixels",
            default=4.0,
            min=0.01,
            max=1024.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="With size_by megapixels: the size of the result, each of 1024 × 1024 pixels,"
            " as in ComfyUI's own nodes.",
        ),
        *sides,
    ]


def result_size(
    source: tuple[int, int],
    upscale_by: float,
    longest_edge: int,
    size_by: str,
    megapixels: float,
    box: tuple[int, int],
) -> tuple[int, int]:
    """(height, width) of the result for a picture of `source`; `box` is (height, width)."""
    if size_by == _BY_MEGAPIXELS:
        return target_size(source, upscale_by, megapixels=megapixels)
    if size_by == _BY_BOX:
        return target_size(source, upscale_by, within=box)
    return target_size(source, upscale_by, longest_edge)


def same_noise_input(default: bool, off: str) -> io.Boolean.Input:
    """Whether the pictures of a batch share their noise; `off` says what happens if not."""
    return io.Boolean.Input(
        "same_noise",
        default=default,
        optional=True,
        advanced=True,
        tooltip="One noise for all pictures of a batch, so that the frames of a video do not"
        f" shimmer by their noise. It does not follow what moves. {off}",
    )


def start_image_input(denoise: str) -> io.Image.Input:
    """Another upscaler's picture to start from; `denoise` names what says how much is kept."""
    return io.Image.Input(
        "start_image",
        optional=True,
        tooltip="Another upscaler's picture of the same image to start from, in place of the"
        f" enlarged one; it is resized to the result. {denoise} says how much of it is drawn again:"
        " try 0.2 to 0.5; at 1 nothing of it is left. The model still looks at image.",
    )


def wrap_input() -> io.Combo.Input:
    """One of `WRAPS`."""
    return io.Combo.Input(
        "wrap",
        options=list(WRAPS),
        default="none",
        optional=True,
        advanced=True,
        tooltip="For pictures that go on at the opposite edge: horizontal for 360 degree panoramas,"
        " both for seamless textures. The result then goes on there too.",
    )


def mask_input(time: str) -> io.Mask.Input:
    """What is upscaled; `time` says what black costs."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="White is upscaled; black keeps the start_image, or the enlarged picture; grey"
        f" mixes the two. {time} With Differential Diffusion on the model, grey is drawn in the"
        " later steps only.",
    )


def colour_fix_input() -> io.Combo.Input:
    """One of `COLOUR_FIXES`."""
    return io.Combo.Input(
        "colour_fix",
        options=list(COLOUR_FIXES),
        default="none",
        optional=True,
        advanced=True,
        tooltip="Takes colours from the input picture, over the whole picture. Wavelet takes"
        " everything coarser than about 32 pixels of the result, adain the mean and contrast of"
        " red, green and blue, lab those of lightness and hue. None is right unless you see a"
        " colour cast.",
    )


def picture_outputs() -> list:
    """The outputs that `picture_output` fills."""
    return [
        io.Image.Output(tooltip="The upscaled pictures; alpha is kept where it came in."),
        io.Mask.Output(
            tooltip="One minus the alpha of the result; all 0 where no alpha came in.",
        ),
    ]


def check_inputs(model, image: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor | None:
    """Refuse what cannot work, and return the embeddings (B, vector_size) that the model needs."""
    check_image(require(image, torch.Tensor, "expected an IMAGE"))
    require_infdit(model)
    size = model.model.infdit_config.vector_size
    if size == 0:
        return None
    vectors = _own_guidance(model, image, size) if guidance is None else guidance
    require(vectors, torch.Tensor, "expected guidance from Inf-DiT CLIP Guidance")
    batch = image.shape[0]
    if vectors.shape[-1] != size or vectors.shape[0] not in (1, batch):
        raise InfDiTError(f"expected guidance of shape {(batch, size)}; got {tuple(vectors.shape)}")
    return vectors.expand(batch, size)


def _own_guidance(model, image: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings by the CLIP tower of the model's file."""
    clip = model.get_attachment(CLIP_ATTACHMENT)
    if clip is None:
        raise InfDiTError(
            f"this model needs a CLIP embedding of {size} values and its file has no"
            " CLIP tower. Connect Load Inf-DiT CLIP -> Inf-DiT CLIP Guidance to guidance."
        )
    return clip.vector(image)


def picture_output(image: torch.Tensor) -> io.NodeOutput:
    """IMAGE and MASK of pictures (B, H, W, 3 or 4)."""
    alpha = image.shape[-1] == 4
    return io.NodeOutput(image, 1 - image[..., 3] if alpha else torch.zeros(image.shape[:3]))
