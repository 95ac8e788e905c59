"""Inf-DiT as nodes of ComfyUI."""
