"""Upsample Guidance as a node of ComfyUI."""
