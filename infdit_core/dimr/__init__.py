"""DiMR: class-conditional generation in SD 1.5's latent space (arXiv 2406.09416)."""
