"""How the model computes: the order, and the memory it may take."""

from __future__ import annotations

from comfy_api.latest import io

from ...infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from ...infdit_core.errors import InfDiTError
from ..common import CATEGORY, named_errors
from .comfy_model import COMPILE, MEMORY, REUSE_LAYERS, SCHEDULE, require_infdit

_AUTO, _FULL, _BLOCKS, _LAYERS = "auto", "whole picture", "block by block", "layer by layer"


class InfDiTSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSchedule",
            display_name="Inf-DiT Schedule",
            category=CATEGORY,
            description="Sets how an Inf-DiT model works through a picture. The result is the same"
            " with every setting but reuse_layers; speed and memory differ. Without this node the"
            " fastest order that fits is taken.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Inf-DiT Checkpoint."),
                io.Combo.Input(
                    "schedule",
                    options=[_AUTO, _FULL, _BLOCKS, _LAYERS],
                    default=_AUTO,
                    tooltip="Auto plans by memory. Layer by layer keeps the picture's tokens, block"
                    " by block keeps a line of keys and values for every layer instead.",
                ),
                io.Int.Input(
                    "blocks",
                    default=1,
                    min=1,
                    max=4096,
                    advanced=True,
                    tooltip="Block by block: side of the square of blocks taken at a time. Layer by"
                    " layer: number of blocks taken at a time. More is faster and takes more"
                    " memory; not used by the other two.",
                ),
                io.Boolean.Input(
                    "tokens_on_cpu",
                    default=False,
                    advanced=True,
                    tooltip="Layer by layer only: the picture's tokens wait in RAM. Slower,"
                    " and saves 2.7 GB at 4096×4096 with the released model.",
                ),
                io.Float.Input(
                    "memory_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Gigabytes that auto may take beside the weights; 0 takes what ComfyUI"
                    " reports free.",
                ),
                io.Int.Input(
                    "reuse_layers",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="Faster and not exact: with samplers that evaluate each noise level"
                    " twice, as heun does, this many of the last layers (the released model has 28)"
                    " are left out the second time, and what they added the first time is added"
                    " again. 0 computes everything.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="PyTorch compiles the parts of each layer around its attention, which"
                    " then move less memory. Takes about a minute in the first evaluation, and"
                    " changes nothing but rounding. Needs Triton on a GPU, a C++ compiler on a"
                    " CPU.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with this schedule.")],
            search_aliases=["inf-dit", "infdit", "memory", "vram", "low vram", "tiling"],
        )

    @classmethod
    @named_errors("Inf-DiT Schedule")
    def execute(
        cls,
        model,
        schedule: str,
        blocks: int,
        tokens_on_cpu: bool,
        memory_gb: float,
        reuse_layers: int = 0,
        compile: bool = False,
    ) -> io.NodeOutput:
        require_infdit(model)
        layers = model.model.infdit_config.num_layers
        if reuse_layers >= layers:
            raise InfDiTError(
                f"expected reuse_layers below the {layers} layers of this model; got {reuse_layers}"
            )
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options.pop(SCHEDULE, None)
        options.pop(MEMORY, None)
        options[REUSE_LAYERS] = reuse_layers
        options[COMPILE] = compile
        if schedule == _FULL:
            options[SCHEDULE] = Full()
        elif schedule == _BLOCKS:
            options[SCHEDULE] = BlockMajor(blocks)
        elif schedule == _LAYERS:
            options[SCHEDULE] = LayerMajor(blocks, tokens_on_host=tokens_on_cpu)
        elif memory_gb:
            options[MEMORY] = memory_gb * 1e9
        return io.NodeOutput(model)
