"""What the tests of Upsample Guidance share. Import inside ComfyUI only, as with HiDiffusion's."""

import torch

DEFAULTS = {
    "scale": "2", "theta": 1.0, "eta": 0.6, "ramp": 0.0, "low_size_cond": "same",
}  # fmt: skip


def watch(model):
    """Record (size, sigma, low) of every call of the UNet."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def look(executor, x, timesteps, context, y, control, options, **kwargs):
        sigma = float(options["sigmas"][0])
        seen.append((tuple(x.shape[-2:]), sigma, bool(options.get("upsample_guidance_low"))))
        return executor(x, timesteps, context, y, control, options, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", look)
    return seen


def evaluate(model, x, sigma, conds, **options):
    """x0 of `x` (B, C, H, W) at `sigma`, as a sampler without a run asks the patched model."""
    sigmas = torch.full((x.shape[0],), float(sigma))
    known = {"wrappers": model.wrappers, "sigmas": sigmas}
    with torch.no_grad():
        return model.model.apply_model(x, sigmas, **conds, transformer_options=known | options)


def conditions(name, batch):
    """The first `batch` of the recorded prompts of a tiny UNet, for `evaluate`."""
    from tests.goldens import golden

    cond = golden(f"hidiffusion/{name}/cond.safetensors")
    y = {"y": cond["y"][:batch].float()} if "y" in cond else {}
    return {"c_crossattn": cond["context"][:batch].float()} | y
