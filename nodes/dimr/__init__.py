"""DiMR as nodes of ComfyUI."""
