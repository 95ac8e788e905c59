"""Inf-DiT for ComfyUI: seam-free diffusion upscaling to any size."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import InfDiTExtension

    return InfDiTExtension()
