"""DiffuseHigh as nodes of ComfyUI."""
