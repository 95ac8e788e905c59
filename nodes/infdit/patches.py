"""What other nodes have put on a MODEL: what Inf-DiT cannot be sampled with, and what does nothing.

Patches for SD and SDXL go onto any MODEL. Most reach into a UNet and find nothing to do in Inf-DiT;
some fail in the middle of sampling or spoil the picture, at cfg 1 above all, where ComfyUI hands
zeros over for the negative prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_sampling
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ...infdit_core.errors import InfDiTError
from .several_gpus import strips_for_clones

_FAIL = {
    "SelfAttentionGuidance": "Self-Attention Guidance",
    "APG": "Adaptive Projected Guidance",
    "RenormCFG": "RenormCFG",
    "PerpNeg": "Perp-Neg",
}
"""Classes of core nodes whose guidance fails or spoils the picture, and the nodes' names."""
_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
"""Keys of wrappers that leave out evaluations by a measure that does not hold here."""
_WORK = {"DifferentialDiffusion", "EpsilonScaling", "TemporalScoreRescaling",
         "LatentApplyOperationCFG", "LatentOperation"}  # fmt: skip
"""Classes of core nodes that do with Inf-DiT what they say."""
_GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function",
             "sampler_calc_cond_batch_function")  # fmt: skip


def check_patches(patcher: Any) -> list[str]:
    """Names of nodes whose patches have no effect on the Inf-DiT in this `ModelPatcher`.

    Raises:
        InfDiTError: something is on it that Inf-DiT cannot be sampled with; the message names it.
    """
    options = patcher.model_options
    if "model_function_wrapper" in options:
        raise InfDiTError(
            "expected a model without a wrapper, as Seamless Tiling and tiled diffusion set one:"
            " they roll or cut the noisy picture and not what Inf-DiT compares it with. Inf-DiT"
            " Upscale makes no tiles, and has wrap for seamless pictures"
        )
    guidance = {name for key in _GUIDANCE for name in _owners(options.get(key))}
    wrong = [_FAIL[name] for name in sorted(guidance & _FAIL.keys())]
    keys = {key for by_key in patcher.wrappers.values() for key in by_key}
    wrong += [name for key, name in _CACHES.items() if key in keys]
    if options.get("context_handler") is not None:
        wrong.append("Context Windows")
    sampling = patcher.object_patches.get("model_sampling")
    if sampling is not None and not isinstance(sampling, comfy.model_sampling.EDM):
        wrong.append("ModelSampling (of another model)")
    if wrong:
        raise InfDiTError(
            "expected a model as Load Inf-DiT Checkpoint gives it; got one with"
            f" {' and '.join(wrong)} on it, which is made for other models and spoils or stops this"
            " one. Take that node out of the way from the loader."
        )
    patches = options.get("transformer_options", {})
    idle = guidance - _WORK
    idle |= set(_owners(patcher.get_all_wrappers(WrappersMP.DIFFUSION_MODEL)))
    for kind in ("patches", "patches_replace"):
        for found in patches.get(kind, {}).values():
            idle |= set(_owners(found))
    return sorted(idle)


def require_own_solver(patcher: Any) -> None:
    """Refuse what takes effect in ComfyUI's samplers, where they draw nothing.

    Raises:
        InfDiTError: names it.
    """
    options = patcher.model_options
    wrong = {name for key in _GUIDANCE for name in _owners(options.get(key))} & _WORK
    for wrappers in (patcher.wrappers, options.get("transformer_options", {}).get("wrappers", {})):
        for kind, by_key in wrappers.items():
            if kind != WrappersMP.DIFFUSION_MODEL:
                found = [each for key, each in by_key.items() if key != COMPILE_KEY]
                wrong |= set(_owners(found))
    wrong -= set(_owners(strips_for_clones))
    if options.get("multigpu_clones"):
        wrong.add("MultiGPU Work Units")
    if "model_sampling" in patcher.object_patches:
        wrong.add("ModelSampling")
    if patcher.injections:
        wrong.add("a LoRA in bypass mode")
    if wrong:
        raise InfDiTError(
            "expected a model as Load Inf-DiT Checkpoint or Inf-DiT Schedule gives it, or with LoRA"
            f" on it; got one with {' and '.join(sorted(wrong))} on it. With pictures on disk"
            " ComfyUI's samplers, which that works in, are not used"
        )


def warn_of_patches(patcher: Any) -> list[str]:
    """`check_patches`, with a line in the log for each name."""
    idle = check_patches(patcher)
    for name in idle:
        logging.warning("Inf-DiT: %s is on the model and has no effect on Inf-DiT", name)
    return idle


def _owners(found: Any) -> Iterator[str]:
    """The classes that functions come from: the nodes that put them on the model."""
    if isinstance(found, dict | list | tuple):
        for each in found.values() if isinstance(found, dict) else found:
            yield from _owners(each)
    elif found is not None:
        yield getattr(found, "__qualname__", type(found).__qualname__).split(".")[0]
