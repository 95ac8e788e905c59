"""Inf-DiT as a core MODEL, so that every core sampler, preview and memory manager works on it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ...infdit_core import edm
from ...infdit_core.blocks.grid import Strip
from ...infdit_core.blocks.schedules import Schedule
from ...infdit_core.errors import InfDiTError
from ...infdit_core.network.attention import sdpa
from ...infdit_core.network.condition import Condition
from ...infdit_core.network.config import InfDiTConfig
from ...infdit_core.network.model import InfDiT
from ...infdit_core.network.residual_cache import ResidualCache
from ...infdit_core.network.run import Progress, Run
from ...infdit_core.pictures.prepare import Canvas, Wrap
from ...infdit_core.upscale import with_prior as computed_with_prior
from ..common import ForOneModel, named_errors, require
from .casting import CastingInfDiT
from .patches import check_patches
from .runs import ConditionState, PlannedRun, Runs, ran_out_of_memory, wanted_bytes, workload
from .several_gpus import CLONES, evaluate_in_strips

CLIP_ATTACHMENT = "infdit_clip"
"""Attachment of the patcher: the `PatchedClip` that came in the model's file, or None."""
PROGRESS = "infdit_progress"
"""Key in `transformer_options`: called with (cells done, cells in all) in every evaluation."""
SCHEDULE = "infdit_schedule"
"""Key in `transformer_options`: the `Schedule` of every evaluation; planned here if absent."""
MEMORY = "infdit_memory"
"""Key in `transformer_options`: bytes that the plan may take; what is free if absent."""
REUSE_LAYERS = "infdit_reuse_layers"
"""Key in `transformer_options`: how many layers a `ResidualCache` leaves out; 0 or absent: none."""
COMPILE = "infdit_compile"
"""Key in `transformer_options`: whether the parts of the layers are compiled; absent: no."""

_GUARD = "run"
"""Key of the model's conditions under which `InfDiTModel` has a `ConditionState`."""
_KEY, _CONDITIONS = "infdit_", ("concat", "lr", "vector")
"""Keys of our tensors in CONDITIONING: the fields of a `Condition` behind a prefix."""
_WRAP = _KEY + "wrap"
"""Key in CONDITIONING: the `Wrap` of a canvas, which fills the margins; None for none."""
_FOR_OTHERS = ForOneModel(
    "Inf-DiT Conditioning: expected its CONDITIONING to be sampled with the model from Load"
    " Inf-DiT Checkpoint; got another model. Connect that model to the sampler, or a text prompt to"
    " positive and negative."
)
_PICTURES = 9
"""Pictures of ComfyUI's samplers that are counted, which keep more than ours."""
_SAME_SIGMA = 1e-3
"""Difference in ln(sigma) that rounding makes: ComfyUI hands over ln(sigma)/4."""


def require_infdit(model: object) -> None:
    """Raise InfDiTError unless `model` is a MODEL that holds an Inf-DiT."""
    inner = getattr(model, "model", model)
    require(inner, InfDiTModel, "expected a model from Load Inf-DiT Checkpoint")


def conditioning_of(cond: Condition, wrap: Wrap | None = None) -> list:
    """CONDITIONING for `InfDiTModel.extra_conds`."""
    values: dict = {_KEY + name: getattr(cond, name) for name in _CONDITIONS}
    # Other models find what they look for first, then the guard, which names the mistake.
    batch = cond.concat.shape[0]
    values |= {"pooled_output": torch.zeros(batch, 1280), "model_conds": {_GUARD: _FOR_OTHERS}}
    values[_WRAP] = wrap
    return [[torch.zeros(batch, 1, 1), values]]


def size_of(x: torch.Tensor) -> str:
    """Width and height of (..., H, W) for people."""
    return f"{x.shape[-1]}x{x.shape[-2]} px"


def require_latent(noise: torch.Tensor, concat: torch.Tensor, start: torch.Tensor | None) -> None:
    """Refuse noise of a latent that is not of the picture `concat`, and an empty `start`."""
    where = f"expected the LATENT of Inf-DiT Conditioning, {size_of(concat)}; got"
    if noise.shape[1:] != concat.shape[1:]:
        raise InfDiTError(
            f"{where} one of {size_of(noise)} and {noise.shape[1]} channels. Connect that output to"
            " the sampler's latent_image: here latents are pictures, and keep their size."
        )
    if start is not None and not start.any() and concat.any():
        raise InfDiTError(
            f"{where} an empty one. Connect that output to the sampler's latent_image in place of"
            " Empty Latent Image."
        )


class InfDiTModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders ask of a model family."""

    unet_extra_config = {}  # noqa: RUF012 - a class attribute of the base class
    sampling_settings = {  # noqa: RUF012 - the same
        "sigma_min": edm.SIGMA_MIN,
        "sigma_max": edm.SIGMA_MAX,
        "sigma_data": edm.SIGMA_DATA,
    }
    latent_format = comfy.latent_formats.ChromaRadiance
    supported_inference_dtypes = [  # noqa: RUF012 - the same
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


class InfDiTModelSampling(
    comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM
):
    """EDM preconditioning as in core; the first noise has the standard deviation sigma exactly."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        # core scales by sqrt(1 + sigma²) at the highest sigma; the release by sigma
        return latent_image + sigma * noise


class InfDiTModel(comfy.model_base.BaseModel):
    """The pixel-space model: latents are pictures in [-1, 1]."""

    def __init__(self, model_config, device=None):
        super().__init__(
            model_config, comfy.model_base.ModelType.EDM, device=device, unet_model=DiffusionModel
        )
        self.model_sampling = InfDiTModelSampling(model_config)
        self._recent: weakref.ref[Runs] | None = None
        self._given: torch.Tensor | None = None

    @property
    def infdit_config(self) -> InfDiTConfig:
        return self.infdit.config

    @property
    def infdit(self) -> InfDiT:
        return self.diffusion_model.net

    @named_errors("Inf-DiT")
    def extra_conds(self, **kwargs):
        """The picture's conditions, as `conditioning_of` put them into CONDITIONING.

        Called before the first evaluation, so that what does not fit is refused here.
        """
        if self.current_patcher is not None:
            check_patches(self.current_patcher)
        if (concat := kwargs.get(_KEY + "concat")) is None:
            raise InfDiTError(
                "expected conditioning from the Inf-DiT Conditioning node; got another."
                " Connect its CONDITIONING to the sampler's positive and negative inputs."
            )
        require_latent(kwargs["noise"], concat, kwargs.get("latent_image"))
        if (area := kwargs.get("area")) is not None and tuple(area) != (*concat.shape[2:], 0, 0):
            raise InfDiTError(
                "expected conditioning of the whole picture; got one of an area. Remove"
                " Conditioning (Set Area): masks (Set Mask) work."
            )
        out = {}
        for name in _CONDITIONS:
            if (tensor := kwargs.get(_KEY + name)) is not None:
                out[name] = comfy.conds.CONDRegular(tensor.to(kwargs["device"]))
        state = ConditionState(self._runs(kwargs["noise"], out["lr"].cond, kwargs.get("hooks")))
        if self.current_patcher is not None:
            state.compiler = compiler_of(self.current_patcher)
        state.runs.patcher = self.current_patcher
        state.wrap = kwargs.get(_WRAP)
        if self.infdit.prior is not None:
            state.base = out["concat"].cond.float()
        out[_GUARD] = comfy.conds.CONDConstant(state)
        return out

    def _runs(self, noise: torch.Tensor, lr: torch.Tensor, hooks: object) -> Runs:
        """Those of this sampling, shared by conditions of one LR picture, or new ones."""
        runs = self._recent() if self._recent is not None else None
        if runs is None or not runs.are_of(noise, lr, hooks):
            runs = Runs(noise, lr, hooks)
            self._recent = weakref.ref(runs)  # they live as long as the conditions
        return runs

    def apply_model(self, x, t, *args, **kwargs):
        self._given = x
        try:
            return super().apply_model(x, t, *args, **kwargs)
        finally:
            self._given = None

    def _apply_model(self, x, t, *args, **kwargs):
        # called by the wrappers on the model, which may roll the picture and not its conditions
        given = self._given
        if given is not None and x is not given and not torch.equal(x, given):
            raise InfDiTError(
                "Inf-DiT: expected the noisy picture that the sampler made; got another from a"
                " wrapper on the model. What rolls, cuts or changes it does not change what Inf-DiT"
                " compares it with: take that node off the model."
            )
        return super()._apply_model(x, t, *args, **kwargs)

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that sampling should find free."""
        management, patcher = comfy.model_management, self.current_patcher
        device = management.get_torch_device() if patcher is None else patcher.load_device
        work = workload(self.infdit, input_shape, self.get_dtype_inference(), device)
        size = management.module_size(self) if patcher is None else patcher.model_size()
        return wanted_bytes(replace(work, pictures=_PICTURES), size, device)


class DiffusionModel(torch.nn.Module):
    """`InfDiT` behind the interface that `BaseModel.apply_model` calls."""

    def __init__(self, config: InfDiTConfig, dtype=None, device=None, operations=None):
        super().__init__()
        self.dtype = dtype
        self.net = CastingInfDiT(
            config, dtype=dtype, device=device, operations=operations, attend=attention()
        )
        self._compiler: str | Callable | None = None

    def compile_for(self, options: dict, backend: str | Callable | None) -> None:
        """Compile the parts of the layers, or have them run as they are.

        Args:
            options: `transformer_options`.
            backend: that core's node TorchCompileModel asks for; None for no such node.
        """
        backend = backend or ("inductor" if options.get(COMPILE) else None)
        if backend == self._compiler:
            return
        self.net.run_eagerly()
        if backend is not None:
            self.net.compile_layers(backend=backend)
        self._compiler = backend

    # planning and the loop over chunks are nothing to compile: dynamo would unroll every cell
    @torch.compiler.disable
    def forward(
        self, x, timestep, context=None, control=None, transformer_options=None, **conds
    ) -> torch.Tensor:
        """F for x (B, 3, H, W) already times c_in and timestep (B,) = ln(sigma)/4."""
        options = transformer_options or {}
        if x.shape[2:] != conds["concat"].shape[2:]:
            raise InfDiTError(
                f"Inf-DiT: expected a whole picture of {size_of(conds['concat'])}; got a part of"
                f" {size_of(x)}. Something on the model works in tiles or windows: remove it."
            )
        cond = Condition(conds["concat"], conds["lr"], conds.get("vector"))
        state: ConditionState = conds["run"]
        sigma = (4 * timestep).exp()
        wrap = state.wrap or (lambda picture: picture)
        x = wrap(x)
        clones = options.get(CLONES, ())[: self.net.grid(x).lines]
        if len(clones) > 1:
            orders = options.get(SCHEDULE), options.get(MEMORY)
            return wrap(evaluate_in_strips(clones, x, sigma, cond, state, options, *orders))
        run = self.ready(state, options, x.device)

        def evaluate(schedule: Schedule) -> torch.Tensor:
            return wrap(self.evaluate(x, sigma, cond, schedule, run, state.base))

        if (schedule := options.get(SCHEDULE)) is not None:
            run.check(self.net, x, schedule)
            return evaluate(schedule)
        return run.plan(self.net, x, options.get(MEMORY)).call(evaluate)

    def ready(
        self,
        state: ConditionState,
        options: dict,
        device: torch.device,
        patcher: comfy.model_patcher.ModelPatcher | None = None,
    ) -> PlannedRun:
        """The run of a device with what `transformer_options` ask for.

        Args:
            patcher: of this model, where it is a clone.
        """
        if device not in state.caches and (layers := options.get(REUSE_LAYERS, 0)):
            state.caches[device] = ResidualCache(layers, _SAME_SIGMA)
        run = state.runs.on(device, patcher)
        run.progress = interruptible(options.get(PROGRESS))
        run.cache = state.caches.get(device)
        self.compile_for(options, state.compiler)
        return run

    def evaluate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Condition,
        schedule: Schedule,
        run: Run,
        base: torch.Tensor | None,
        strip: Strip | None = None,
    ) -> torch.Tensor:
        """F, or with a prior what ComfyUI's c_skip · x + c_out · F must be given in its place.

        What is denoised then is x - P: D = P + c_skip · (x - P) + c_out · F(c_in · (x - P)).
        """

        def network(x: torch.Tensor) -> torch.Tensor:
            with compile_errors_named():
                return self.net(x, sigma, cond, schedule, run=run, strip=strip)

        if base is None:
            return network(x)
        data = self.net.config.sigma_data
        c_in = edm.preconditioning(sigma.float(), data).c_in[:, None, None, None]
        scaled = c_in * base.to(x.device)  # 1 - c_skip is c_out · c_in · sigma / sigma_data
        out = network((x - scaled).to(x.dtype))
        return out.float() + sigma.float()[:, None, None, None] / data * scaled


def with_prior(model, canvas: Canvas) -> Canvas:
    """The canvas with the picture of the model's prior, if it has one, as `concat`."""
    if model.model.infdit.prior is None:
        return canvas
    comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype_inference()
    return computed_with_prior(canvas, model.model.infdit, model.load_device, dtype)


def compiler_of(patcher: comfy.model_patcher.ModelPatcher) -> str | Callable | None:
    """The backend that core's node TorchCompileModel asks for; None for no such node."""
    return patcher.model_options.get(TORCH_COMPILE_KWARGS, {}).get("backend")


@contextmanager
def compile_errors_named() -> Iterator[None]:
    """Say of an error of the compiler what can be done."""
    try:
        yield
    except RuntimeError as error:
        dynamo = sys.modules.get("torch._dynamo.exc")  # there where anything was compiled
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        if ran_out_of_memory(error):
            raise
        what = " ".join(str(error).split("\n\n")[0].split())  # advice for developers follows
        raise InfDiTError(
            "Inf-DiT: expected a PyTorch that can compile on this device; got"
            f" {type(error).__name__}: {what}. Switch compile off in Inf-DiT Schedule, or"
            " remove TorchCompileModel."
        ) from error


def interruptible(report: Progress | None) -> Progress:
    """A `Run`'s progress that ends the run where the user cancels."""

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if report is not None:
            report(done, total)

    return progress


def attention():
    """What computes attention: the engine's own where the user's choice is PyTorch's too."""
    core = comfy.ldm.modules.attention
    return sdpa if core.optimized_attention is core.attention_pytorch else attend


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The attention that the user chose for ComfyUI; on the CPU, PyTorch's, which is faster."""
    if q.device.type == "cpu":
        return sdpa(q, k, v)
    out = comfy.ldm.modules.attention.optimized_attention(q, k, v, q.shape[1], skip_reshape=True)
    return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
