"""Training material without pictures: random latents and embeddings that fit the tiny random model."""

from __future__ import annotations

import torch

from raygard.diffusion.cache import LatentSet, TextRows


def latent_set(count: int = 5) -> LatentSet:
    """Latents (count, 4, 8, 8) of class "a", with the captions "0 a" and "1 a" in turn."""
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, count, 4, 8, 8, generator=rng)
    text = TextRows(torch.randn(2, 8, 16, generator=rng), torch.arange(count) % 2)
    return LatentSet(mean, std.abs(), text, ["a"] * count, [f"{number % 2} a" for number in range(count)], [])
