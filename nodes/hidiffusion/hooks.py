"""HiDiffusion's work on a model, by hooks that ComfyUI offers.

A `Patch` gives a model two wrappers. `Patch.sample` looks at a run as it begins; `Patch.evaluate`
decides what one evaluation of the UNet does differently, puts these `Changes` into the evaluation's
own copy of transformer_options and adds the hooks that read them. No state outlives it and no
module is changed, so there is nothing to undo after an error or a cancel, and cast, offloaded,
quantised or LoRA-patched weights work as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

from ..common import HIDIFFUSION, LOW_BRANCH, RAU_NET_OFF, UPSAMPLE_SCALE, step_index
from .rules import (
    Family,
    FeatureSizes,
    Phase,
    Phases,
    Ratios,
    Size,
    feature_sizes,
    official_ratios,
    phases,
    shift_quarters,
)

log = logging.getLogger(__name__)

_RUN = "hidiffusion_run"
"""Of the `Run` in transformer_options."""
_OPEN = "hidiffusion_windows"
"""Of the windows that one layer's attention is working in, in the options of that layer."""


class Mode(Enum):
    """How RAU-Net works."""

    AUTO = "auto"
    OFF = "off"
    NORMAL = "normal"
    AGGRESSIVE = "aggressive"


@dataclass(frozen=True)
class Run:
    """What is known of a whole sampling run."""

    whole: bool = True
    """False for a part of a schedule that several nodes share."""
    controlnet: bool = False
    deep_shrink: bool = False
    guided: bool = False
    """Upsample Guidance keeps the composition whole."""


@dataclass(frozen=True)
class Changes:
    """What one evaluation of the UNet does differently. Immutable, so threads may share it."""

    family: Family
    sizes: FeatureSizes
    rad: bool
    pool: bool
    windows: dict[tuple[str, int, int], ShiftedWindows] = field(default_factory=dict)
    """By block and index of the layer in it."""


@dataclass(frozen=True)
class Patch:
    """The settings of a node, and the two wrappers that it adds to the model."""

    family: Family
    rau_net: Mode
    window_attention: bool
    ratios: Ratios | None
    """None: the authors'."""
    seed: int
    by_sigma: bool
    gentle: bool
    """A model that the authors do not use the aggressive mode for."""

    def phases(self, size: Size, run: Run) -> Phases:
        """The phases of RAU-Net for a latent of `size`."""
        auto = self.rau_net == Mode.AUTO
        if self.rau_net == Mode.OFF or run.deep_shrink:
            return Phases()
        if auto and (run.guided or self.family.is_native(size)):
            return Phases()
        aggressive = self.rau_net == Mode.AGGRESSIVE or (
            auto and not self.family.is_large(size) and not self.gentle
        )
        ratios = self.ratios or official_ratios(self.family, size, run.controlnet)
        return phases(self.family, ratios, aggressive)

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: look at the run, say what will happen, hand it to `evaluate`."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        patches = options.get("patches", {})
        # A later stage continues from the noise that an earlier one left in the latent.
        sigma_max = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
        continued = not noise.any() and float(sigmas[0]) < 0.98 * sigma_max
        run = Run(
            whole=float(sigmas[-1]) == 0 and not continued,
            controlnet=any("control" in c for conds in guider.conds.values() for c in conds),
            deep_shrink=any(
                patch.__qualname__.startswith("PatchModelAddDownscale.")
                for name in ("input_block_patch", "input_block_patch_after_skip")
                for patch in patches.get(name, ())
                if hasattr(patch, "__qualname__")
            ),
            guided=options.get(UPSAMPLE_SCALE, 1) > 1,
        )
        if run.deep_shrink and self.rau_net != Mode.OFF:
            log.warning(
                "HiDiffusion: Deep Shrink (PatchModelAddDownscale) is on the same model and wins:"
                " RAU-Net is off in this run. Use one of the two."
            )
        if self.window_attention and patches.get("attn1_output_patch"):
            log.warning(
                "HiDiffusion: another node, such as HyperTile, rearranges self-attention and wins"
                " where it does; window attention works in the other layers."
            )
        self._under(options)._describe(tuple(noise.shape[-2:]), run, len(sigmas) - 1)
        options[_RUN] = run
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _under(self, options: dict) -> Patch:
        """The patch as other nodes want it, by a flag in transformer_options."""
        return replace(self, rau_net=Mode.OFF) if options.get(RAU_NET_OFF) else self

    def _describe(self, size: Size, run: Run, count: int) -> None:
        def when(phase: Phase) -> str:
            if self.by_sigma or not run.whole:
                return f"{phase.start:.0%}-{phase.end:.0%}" if phase.start < phase.end else "none"
            steps = phase.steps(count)
            return f"steps {steps.start}-{steps.stop - 1} of {count}" if steps else "none"

        times = self.phases(size, run)
        log.info(
            "HiDiffusion (%s, latent %d×%d): dilated down-sampler: %s; pooled features: %s;"
            " window attention: %s",
            *(self.family.name, size[1], size[0], when(times.rad), when(times.pool)),
            "on" if self.window_attention else "off",
        )

    def evaluate(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """APPLY_MODEL: one evaluation, of `x` (B, C, H, W) at noise level `t` (B,)."""
        options = dict(transformer_options or {})
        own = self._under(options)
        changes = own.changes(x, float(t.flatten()[0]), options, executor.class_obj.model_sampling)
        options = install(changes, options)
        control = fit_control(changes, control)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def changes(self, x: torch.Tensor, sigma: float, options: dict, model_sampling: Any) -> Changes:
        """What to do at this noise level."""
        run = options.get(_RUN, Run())
        levels = options.get("sample_sigmas")
        sigmas = [] if levels is None else levels.tolist()
        step = step_index(sigma, sigmas)
        size = x.shape[-2], x.shape[-1]
        times = Phases() if options.get(LOW_BRANCH) else self.phases(size, run)
        if self.by_sigma or not run.whole or len(sigmas) < 2:
            part = model_sampling.percent_to_sigma
            rad, pool = (
                phase.start < phase.end and part(phase.start) >= sigma > part(phase.end)
                for phase in (times.rad, times.pool)
            )
        else:
            rad, pool = (step in p.steps(len(sigmas) - 1) for p in (times.rad, times.pool))
        changes = Changes(self.family, feature_sizes(self.family, size, rad, pool), rad, pool)
        return self.with_windows(changes, step, x.device) if self.window_attention else changes

    def with_windows(self, changes: Changes, step: int, device: torch.device) -> Changes:
        # New tensors for every layer, though shifts recur: torch.compile would make a new graph
        # for every pattern of layers that share one.
        windows = {
            (*block, index): shifted_windows(
                changes.sizes.at(block), shift_quarters(self.seed, step, block, index), device
            )
            for block in self.family.windowed
            for index in range(self.family.depth)
        }
        return replace(changes, windows=windows)


# ---- hooks: all of them read the changes from transformer_options, none of them keeps anything


def install(changes: Changes, options: dict[str, Any]) -> dict[str, Any]:
    """transformer_options with the changes and the hooks that it needs; `options` stays as it is.

    Ours are the innermost of the attention hooks, so that what another node does to the tokens
    is undone in the right order.
    """
    patches = dict(options.get("patches", {}))
    replace = dict(options.get("patches_replace", {}))

    def add(name: str, hook: Any, first: bool = False) -> None:
        others = patches.get(name, [])
        patches[name] = [hook, *others] if first else [*others, hook]

    if changes.rad:
        add("forward_timestep_embed_patch", (Downsample, _downsample), first=True)
    if changes.pool:
        add("input_block_patch", _pool)
        add("output_block_patch", _unpool, first=True)
    if changes.windows:
        add("attn1_patch", _split)
        add("attn1_output_patch", _join, first=True)
    if changes.rad or changes.pool:
        replace["attn1"] = {
            block: partial(_sag, patch) if _is_sag(patch) else patch
            for block, patch in replace.get("attn1", {}).items()
        }
    return {**options, "patches": patches, "patches_replace": replace, HIDIFFUSION: changes}


def _downsample(layer, x, emb, context, options, *args):
    """RAD: the down-sampler with stride 4, padding 2 and dilation 2 in place of 2, 1 and 1.

    Its taps then lie on every other pixel of the input, and nowhere else: it is the unchanged
    down-sampler on that half of the rows and columns.
    """
    changes = options[HIDIFFUSION]
    if options["block"] == ("input", changes.family.rad):
        x = x[:, :, ::2, ::2]
    for kind, handler in options["patches"]["forward_timestep_embed_patch"]:
        if handler is not _downsample and isinstance(layer, kind):
            return handler(layer, x, emb, context, options, *args)
    return layer(x)


def _pool(h, options):
    if options["block"] == ("input", options[HIDIFFUSION].family.pool):
        return F.avg_pool2d(h, 2, ceil_mode=True)
    return h


def _unpool(h, skip, options):
    here = options["block"] == ("output", options[HIDIFFUSION].family.unpool)
    if here and skip is not None and h.shape[-2:] != skip.shape[-2:]:
        h = F.interpolate(h, skip.shape[-2:], mode="bicubic")
    return h, skip


def _split(q, k, v, options):
    """MSW-MSA before self-attention: tokens (B, H·W, C) to windows (4·B, tokens, C)."""
    windows = options[HIDIFFUSION].windows.get((*options["block"], options["block_index"]))
    # Other numbers of tokens: another node has rearranged them, and stays in charge.
    if windows is None or any(tokens.shape[1] != windows.tokens for tokens in (q, k, v)):
        return q, k, v
    options[_OPEN] = windows  # this dict lives for one layer
    split = windows.split(q)
    return split, split if k is q else windows.split(k), split if v is q else windows.split(v)


def _join(n, options):
    windows = options.get(_OPEN)
    return n if windows is None else windows.join(n)


def _is_sag(patch: Any) -> bool:
    return getattr(patch, "__qualname__", "").startswith("SelfAttentionGuidance.")


def _sag(record, q, k, v, options):
    """Self-Attention Guidance, which records the attention of `q` to `k`, (B, H·W, C), as it works.

    It finds the map's height and width from the latent's, and fails where what shrinks the
    features has rounded too much away. So it records a second time, at the plain UNet's size.
    """
    out = record(q, k, v, options)
    height, width = size = tuple(options["activations_shape"][-2:])
    shape = options["original_shape"]
    plain = feature_sizes(options[HIDIFFUSION].family, (shape[-2], shape[-1]), False, False).middle
    recorded = 1 in options["cond_or_uncond"]  # it looks at the negative prompt's alone
    # Other numbers of tokens: as in _split.
    if recorded and size != plain and q.shape[1] == k.shape[1] == height * width:
        q, k = (
            F.interpolate(tokens.mT.unflatten(2, size), plain).flatten(2).mT  # (B, H·W, C)
            for tokens in (q, k)
        )
        record(q, k, k, options)
    return out


@dataclass(frozen=True)
class ShiftedWindows:
    """2×2 windows over a map of tokens, as an order to take them in and the way back."""

    order: torch.Tensor
    """(4·tokens of a window,) int64."""
    inverse: torch.Tensor
    """(H·W,) int64."""

    @property
    def tokens(self) -> int:
        return self.inverse.shape[0]

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, H·W, C) to (4·B, tokens of a window, C)."""
        return tokens[:, self.order].unflatten(1, (4, -1)).flatten(0, 1)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """(4·B, tokens of a window, C) to (B, H·W, C)."""
        return windows.unflatten(0, (-1, 4)).flatten(1, 2)[:, self.inverse]


def shifted_windows(size: Size, quarters: int, device: torch.device | None) -> ShiftedWindows:
    """2×2 windows over an H×W map that is rolled by `quarters` quarters of a window.

    At an odd size the last row or column counts twice; what becomes of its copy is dropped.
    """
    # Along one axis: which row stands at each place, and at which place each row stands.
    orders, places, halves = [], [], []
    for n in size:
        half = -(-n // 2)
        shift = half // 4 * quarters
        at = torch.arange(2 * half, device=device)
        orders.append(((at + shift) % (2 * half)).clamp(max=n - 1))
        places.append((at[:n] - shift) % (2 * half))
        halves.append(half)
    (rows, columns), (y, x), (wh, ww) = orders, places, halves
    order = rows[:, None] * size[1] + columns
    order = order.unflatten(1, (2, ww)).unflatten(0, (2, wh)).transpose(1, 2).flatten()
    window = (y // wh)[:, None] * 2 + x // ww
    inverse = (window * wh + (y % wh)[:, None]) * ww + x % ww
    return ShiftedWindows(order, inverse.flatten())


def fit_control(changes: Changes, control: dict[str, list] | None) -> dict[str, list] | None:
    """ControlNet residuals in the sizes of the patched features; `control` stays as it is.

    ComfyUI drops a residual of another size and only logs it. It takes every list from its end:
    "output" runs against the input blocks' order, "input" (T2I adapters) along with it.
    """
    if control is None:
        return None
    fitted = dict(control)
    for name, sizes in (
        ("output", changes.sizes.skips[::-1]),
        ("input", changes.sizes.inputs),
        ("middle", [changes.sizes.middle]),
    ):
        fitted[name] = _fit_list(control.get(name, []), sizes)
    return fitted


def _fit_list(residuals: list, sizes: Sequence[Size]) -> list:
    """`sizes` runs against the order of the list."""
    fitted = []
    for residual, size in zip(reversed(residuals), sizes, strict=False):
        if residual is not None and tuple(residual.shape[-2:]) != size:
            residual = F.interpolate(residual, size, mode="bicubic")
        fitted.append(residual)
    return fitted[::-1]
