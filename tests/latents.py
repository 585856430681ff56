"""Training material without pictures, random latents and embeddings, and whether two models hold the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning, ConditioningRows
from raygard.seeding import generator


def latent_set(count: int = 5) -> LatentSet:
    """Latents (count, 4, 8, 8) for the tiny random model, of class "a", with the captions "0 a" and "1 a" in turn."""
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, count, 4, 8, 8, generator=rng)
    text = ConditioningRows(Conditioning(text=torch.randn(2, 8, 16, generator=rng)), torch.arange(count) % 2)
    return LatentSet(mean, std.abs(), text, ["a"] * count, [f"{number % 2} a" for number in range(count)], [])


def flat_latents(seed: int = 0, count: int = 6, tokens: tuple[int, int] = (8, 16), side: int = 8) -> LatentSet:
    """Flat pictures of one colour, which are easy to learn; class "a", caption "x"."""
    rng = generator("imma test", seed)
    mean = torch.randn(count, 4, 1, 1, generator=rng).expand(count, 4, side, side).contiguous()
    text = ConditioningRows(Conditioning(text=torch.randn(2, *tokens, generator=rng)), torch.arange(count) % 2)
    return LatentSet(mean, torch.zeros_like(mean), text, ["a"] * count, ["x"] * count, [])


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names and, under each, the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
