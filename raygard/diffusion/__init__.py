"""The diffusion model: loading, the training loss, latent and text cache, generation."""
