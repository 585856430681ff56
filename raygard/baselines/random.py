"""Random freezing: as many tensors as the learned mask, drawn uniformly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


def choose(sizes: Tensor, learned: Tensor, rng: Generator) -> Tensor:
    """Freeze `learned.sum()` tensors chosen uniformly without replacement: bool (N,)."""
    import torch

    frozen = torch.zeros(len(sizes), dtype=torch.bool)
    frozen[torch.randperm(len(sizes), generator=rng)[: int(learned.sum())]] = True
    return frozen
