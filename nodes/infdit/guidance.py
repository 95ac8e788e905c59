"""CLIP guidance: what the upscaler is told about the picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...infdit_core.errors import InfDiTError
from ...infdit_core.pictures.prepare import check_image
from ..common import CATEGORY, Clip, Guidance, named_errors, require
from .clip import PatchedClip


class InfDiTGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTGuidance",
            display_name="Inf-DiT CLIP Guidance",
            category=CATEGORY,
            description="Describes the picture to the upscaler by its CLIP embedding, moved"
            " towards one text and away from another.",
            inputs=[
                Clip.Input(
                    "clip",
                    tooltip="From Load Inf-DiT Checkpoint, or from Load Inf-DiT CLIP for text.",
                ),
                io.Image.Input("image", tooltip="The picture that is to be upscaled."),
                io.String.Input(
                    "positive",
                    default="HD, high resolution, clear.",
                    multiline=True,
                    tooltip="The result is moved towards this text. Needs the text tower.",
                ),
                io.String.Input(
                    "negative",
                    default="noisy,blurry,low resolution.",
                    multiline=True,
                    tooltip="The result is moved away from this text. Needs the text tower.",
                ),
                io.Float.Input(
                    "text_strength",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Weight of the texts against the picture: 0 leaves them out, 2 is the"
                    " paper's choice. Above 0 a whole open_clip file is needed, because the"
                    " released model comes without a text tower.",
                ),
            ],
            outputs=[
                Guidance.Output(
                    display_name="INFDIT_GUIDANCE",
                    tooltip="One embedding for each picture, for Inf-DiT Upscale.",
                ),
            ],
            search_aliases=["inf-dit", "infdit", "clip vision encode", "prompt"],
        )

    @classmethod
    @named_errors("Inf-DiT CLIP Guidance")
    def execute(
        cls,
        clip: PatchedClip | None,
        image: torch.Tensor,
        positive: str,
        negative: str,
        text_strength: float,
    ) -> io.NodeOutput:
        check_image(require(image, torch.Tensor, "expected an IMAGE"))
        if clip is None:
            raise InfDiTError(
                "expected a CLIP tower; the model file has none. Connect Load Inf-DiT CLIP instead."
            )
        require(clip, PatchedClip, "expected clip from Load Inf-DiT CLIP")
        return io.NodeOutput(clip.vector(image, positive, negative, text_strength))
