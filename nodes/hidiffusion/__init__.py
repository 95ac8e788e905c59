"""HiDiffusion as a node of ComfyUI."""
