"""Freezing the largest tensors: what a mask reaches that only looks at size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


def choose(sizes: Tensor, learned: Tensor, rng: Generator) -> Tensor:
    """Freeze the `learned.sum()` largest tensors, ties by index: bool (N,). Draws nothing from `rng`."""
    import torch

    frozen = torch.zeros(len(sizes), dtype=torch.bool)
    frozen[torch.argsort(sizes, descending=True, stable=True)[: int(learned.sum())]] = True
    return frozen
