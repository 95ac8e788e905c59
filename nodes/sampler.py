"""Upscaling: one node for all of it, and its parts for those who sample themselves."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ..infdit_core import edm
from ..infdit_core.condition import Condition
from ..infdit_core.prepare import Canvas, pass_sizes, prepare, target_size
from ..infdit_core.sampling import PRESETS, SOLVERS, Step
from .comfy_model import CLIP_ATTACHMENT, PLAN, PROGRESS, InfDiTModel
from .progress import SamplingProgress
from .types import CATEGORY, CanvasType, Guidance, require_image

_MAX_SEED = 2**64 - 1


class InfDiTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSampler",
            display_name="Inf-DiT Upscale",
            category=CATEGORY,
            description="Upscales pictures of any size with Inf-DiT, without tiles and seams.",
            inputs=[
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
                    tooltip="How many times wider and higher the result is. Above 4 the picture"
                    " goes through the model twice.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=_MAX_SEED,
                    control_after_generate=True,
                    tooltip="Chooses the invented detail. The same seed gives the same result"
                    " for a picture, wherever it stands in a batch.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="Steps of Heun's method, each of two evaluations but the last. 20 is"
                    " what the model's authors use; fewer are faster and less exact. Only the"
                    " preset exact reads it.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="exact",
                    optional=True,
                    tooltip="Exact is the authors' solver with the number of steps above. Fast"
                    " takes 12 evaluations of the network instead of 39, draft 6: good for a"
                    " first look, with less fine detail.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The upscaled pictures; alpha is kept where it came in."),
            ],
            hidden=[io.Hidden.unique_id],
            search_aliases=["inf-dit", "infdit", "upscale", "super resolution", "4k", "8k"],
        )

    @classmethod
    def execute(
        cls,
        model,
        image: torch.Tensor,
        upscale_by: float,
        seed: int,
        steps: int,
        preset: str = "exact",
        guidance: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        node = "Inf-DiT Upscale"
        vectors = _check_inputs(node, model, image, guidance)
        source = image.shape[1], image.shape[2]
        sizes = pass_sizes(source, target_size(source, upscale_by))
        chosen = PRESETS[preset]
        if preset == "exact":
            chosen = chosen._replace(steps=steps)
        sampler, sigmas = core_sampler(chosen.solver), edm.edm_sigmas(chosen.steps)
        progress = SamplingProgress(
            chosen.evaluations * len(sizes) * image.shape[0],
            cls.hidden.unique_id if cls.hidden else None,
        )
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options |= {PROGRESS: progress.cells, PLAN: progress.planned}

        results = []
        for i, picture in enumerate(image.split(1)):
            vector = None if vectors is None else vectors[i : i + 1]
            for size in sizes:
                canvas = _prepare(node, model, picture, size)
                concat, conditioning = _conditioning(canvas.condition(vector))
                samples = comfy.sample.sample_custom(
                    model,
                    comfy.sample.prepare_noise(concat, seed),
                    1.0,
                    sampler,
                    sigmas,
                    conditioning,
                    conditioning,
                    concat,
                    callback=progress.step,
                    disable_pbar=True,
                    seed=seed,
                )
                picture = canvas.finish(samples)
            results.append(picture)
        return io.NodeOutput(torch.cat(results))


class InfDiTConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTConditioning",
            display_name="Inf-DiT Conditioning",
            category=CATEGORY,
            description="Prepares pictures for upscaling with KSampler or SamplerCustomAdvanced:"
            " sampler heun, scheduler karras, 20 steps, cfg 1 is what Inf-DiT Upscale does.",
            inputs=[
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
                    tooltip="How many times wider and higher the result is. The model was trained"
                    " for 4; chain two samplings for more.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Connect to positive and to negative, and set cfg to 1.",
                ),
                io.Latent.Output(tooltip="Where sampling starts; connect to latent_image."),
                CanvasType.Output(
                    display_name="INFDIT_CANVAS",
                    tooltip="Connect to Inf-DiT Decode, which needs the size and the alpha.",
                ),
            ],
            search_aliases=["inf-dit", "infdit", "ksampler", "advanced"],
        )

    @classmethod
    def execute(
        cls, model, image: torch.Tensor, upscale_by: float, guidance: torch.Tensor | None = None
    ) -> io.NodeOutput:
        node = "Inf-DiT Conditioning"
        vectors = _check_inputs(node, model, image, guidance)
        canvas = _prepare(
            node, model, image, target_size((image.shape[1], image.shape[2]), upscale_by)
        )
        concat, conditioning = _conditioning(canvas.condition(vectors))
        return io.NodeOutput(conditioning, {"samples": concat}, canvas)


class InfDiTDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTDecode",
            display_name="Inf-DiT Decode",
            category=CATEGORY,
            description="Turns what a sampler made of Inf-DiT Conditioning into pictures.",
            inputs=[
                io.Latent.Input("samples", tooltip="The sampler's result."),
                CanvasType.Input("canvas", tooltip="From the same Inf-DiT Conditioning node."),
            ],
            outputs=[
                io.Image.Output(tooltip="The upscaled pictures; alpha is kept where it came in."),
            ],
            search_aliases=["inf-dit", "infdit", "vae decode"],
        )

    @classmethod
    def execute(cls, samples: dict, canvas: Canvas) -> io.NodeOutput:
        x = samples["samples"]
        expected = tuple(canvas.concat.shape)
        if x.shape[1:] != expected[1:]:
            raise ValueError(
                f"Inf-DiT Decode: expected a latent of shape {expected}, from the sampler that"
                f" this canvas went to; got {tuple(x.shape)}"
            )
        return io.NodeOutput(canvas.finish(x))


def core_sampler(solver: str) -> comfy.samplers.Sampler:
    """One of the engine's solvers as a SAMPLER of ComfyUI."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return model(x, x.new_full((x.shape[0],), sigma), **(extra_args or {}))

        def report(step: Step) -> None:
            if callback is not None:
                callback({"i": step.index, "x": step.x, "denoised": step.denoised})

        return SOLVERS[solver](denoise, x, sigmas.tolist(), report)

    return comfy.samplers.KSAMPLER(sample)


def _check_inputs(
    node: str, model, image: torch.Tensor, guidance: torch.Tensor | None
) -> torch.Tensor | None:
    """Refuse what cannot work, and return the embeddings (B, vector_size) that the model needs."""
    require_image(node, image)
    if not isinstance(model.model, InfDiTModel):
        raise ValueError(
            f"{node}: expected a model from Load Inf-DiT Checkpoint;"
            f" got {type(model.model).__name__}"
        )
    size = model.model.infdit_config.vector_size
    if size == 0:
        return None
    vectors = _own_guidance(node, model, image, size) if guidance is None else guidance
    batch = image.shape[0]
    if vectors.shape[-1] != size or vectors.shape[0] not in (1, batch):
        raise ValueError(
            f"{node}: expected guidance of shape {(batch, size)}; got {tuple(vectors.shape)}"
        )
    return vectors.expand(batch, size)


def _own_guidance(node: str, model, image: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings by the CLIP tower that came in the model's file."""
    clip = model.get_attachment(CLIP_ATTACHMENT)
    if clip is None:
        raise ValueError(
            f"{node}: this model needs a CLIP embedding of {size} values and its file has no"
            " CLIP tower. Connect Load Inf-DiT CLIP -> Inf-DiT CLIP Guidance to guidance."
        )
    return clip.vector(image)


def _prepare(node: str, model, image: torch.Tensor, size: tuple[int, int]) -> Canvas:
    try:
        return prepare(image, size=size, block_px=model.model.infdit_config.block_px)
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def _conditioning(cond: Condition) -> tuple[torch.Tensor, list]:
    """The latent to start from and CONDITIONING for `InfDiTModel.extra_conds`."""
    values = {"infdit_concat": cond.concat, "infdit_lr": cond.lr, "infdit_vector": cond.vector}
    unused_text = torch.zeros(cond.concat.shape[0], 1, 1)
    return cond.concat, [[unused_text, values]]
