"""DiMR as a core MODEL, so that every core sampler, preview and memory manager works on it."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.supported_models_base
import torch

from ...infdit_core.dimr.config import NULL_CLASS, DiMRConfig
from ...infdit_core.dimr.memory import sampling_bytes
from ...infdit_core.dimr.model import DiMR
from ...infdit_core.dimr.sampling import STEPS, sigma_of, timestep_of
from ...infdit_core.errors import InfDiTError
from ..common import ForOneModel, named_errors, require

_CLASSES = "classes"
"""Key of the model's conditions."""
_KEY = "dimr_classes"
"""Key in CONDITIONING: the classes as a tuple of numbers."""
_PX = 8
"""Of a picture, on a side, to a pixel of the latent."""
_FOR_OTHERS = ForOneModel(
    "DiMR Class: expected its CONDITIONING to be sampled with the model from DiMR Loader; got"
    " another model. Connect that model to the sampler, or a text prompt to positive and negative."
)


def require_dimr(model: object) -> None:
    """Raise InfDiTError unless `model` is a MODEL that holds a DiMR."""
    inner = getattr(model, "model", model)
    require(inner, DiMRModel, "expected a model from DiMR Loader")


def conditioning_of(classes: tuple[int, ...]) -> list:
    """CONDITIONING for `DiMRModel.extra_conds`: the pictures of a batch take turns."""
    # Other models find what they look for first, then the guard, which names the mistake.
    values: dict = {_KEY: classes, "pooled_output": torch.zeros(1, 1280)}
    values["model_conds"] = {_CLASSES: _FOR_OTHERS}
    return [[torch.ones(1, 1, 1), values]]  # zeros after Conditioning Zero Out


class ClassesCondition(comfy.conds.CONDRegular):
    """(N,) classes, never evaluated together with others.

    So, as with the authors, one picture's result does not depend on how much memory is free.
    """

    def can_concat(self, other):
        return False


class DiMRModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders ask of a model family."""

    unet_extra_config = {}  # noqa: RUF012 - a class attribute of the base class
    latent_format = comfy.latent_formats.SD15
    supported_inference_dtypes = [  # noqa: RUF012 - the same
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]


class DiMRModelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """Noise is predicted; the schedule is SD 1.5's, with timesteps between its knots."""

    def __init__(self, model_config=None):
        super().__init__(model_config)
        self.set_sigmas(sigma_of(torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS))

    def timestep(self, sigma):
        return timestep_of(sigma)

    def sigma(self, timestep):
        return sigma_of((timestep + 1) / STEPS)


class DiMRModel(comfy.model_base.BaseModel):
    """Latents are those of SD 1.5, of one size."""

    def __init__(self, model_config, device=None):
        super().__init__(
            model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=DiffusionModel
        )
        self.model_sampling = DiMRModelSampling(model_config)

    @property
    def dimr_config(self) -> DiMRConfig:
        return self.diffusion_model.net.config

    @named_errors("DiMR")
    def extra_conds(self, **kwargs):
        """The classes, as `conditioning_of` put them into CONDITIONING.

        Called before the first evaluation, so that what does not fit is refused here.
        """
        if (classes := kwargs.get(_KEY)) is None:
            raise InfDiTError(
                "expected conditioning from the DiMR Class node; got another. This model knows"
                " classes and no text: connect that node to the sampler's positive and negative."
            )
        shape = self.dimr_config.channels, *(self.dimr_config.latent_side,) * 2
        require_latent(tuple(kwargs["noise"].shape[1:]), shape)
        if (area := kwargs.get("area")) is not None and tuple(area) != (*shape[1:], 0, 0):
            raise InfDiTError(
                "expected conditioning of the whole picture; got one of an area. Remove"
                " Conditioning (Set Area): masks (Set Mask) work."
            )
        if found := [name for name in ("control", "gligen") if kwargs.get(name) is not None]:
            raise InfDiTError(
                f"expected the class alone; got conditioning with {found[0]}, which is made for"
                " other models. Remove the node that adds it."
            )
        if not kwargs["cross_attn"].any():
            classes = (NULL_CLASS,)
        classes = torch.tensor(classes, device=kwargs["device"])
        return {_CLASSES: ClassesCondition(classes)}

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that sampling should find free."""
        return sampling_bytes(self.dimr_config, input_shape[0], self.get_dtype_inference())


class DiffusionModel(torch.nn.Module):
    """`DiMR` behind the interface that `BaseModel.apply_model` calls."""

    def __init__(self, config: DiMRConfig, dtype=None, device=None, operations: Any = None):
        super().__init__()
        self.dtype = dtype
        self.net = DiMR(config, dtype=dtype, device=device, ops=operations)

    def forward(
        self, x, timestep, context=None, control=None, transformer_options=None, **conds
    ) -> torch.Tensor:
        """eps for x (B, channels, side, side) of variance about 1 and timestep (B,)."""
        side = self.net.config.latent_side
        if x.shape[2:] != (side, side):
            raise InfDiTError(
                f"DiMR: expected a whole picture of {_size((0, side, side))}; got a part of"
                f" {_size(x.shape[1:])}. Something on the model works in tiles or windows:"
                " remove it."
            )
        return self.net(x, (timestep + 1) / STEPS, conds[_CLASSES])


def require_latent(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a latent (channels, height, width) of any but the `expected` shape."""
    if shape != expected:
        got = f"{_size(shape)}, {shape[0]} channels" if len(shape) == 3 else f"shape {shape}"
        raise InfDiTError(
            f"expected an empty latent of {_size(expected)}, {expected[0]} channels; got one of"
            f" {got}. Set Empty Latent Image to {_size(expected)}: DiMR draws no other size, and"
            " Inf-DiT Upscale enlarges what it draws."
        )


def _size(shape: tuple[int, ...]) -> str:
    """Width and height in pixels of the picture of a latent (channels, height, width)."""
    return f"{shape[2] * _PX}x{shape[1] * _PX} px"
