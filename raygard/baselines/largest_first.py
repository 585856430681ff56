"""Freezing the largest tensors: what a mask reaches that only looks at size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from raygard.baselines.facts import TensorFacts


def choose(facts: TensorFacts, rng: Generator) -> Tensor:
    """Freeze as many tensors as the learned mask, largest first, ties by index: bool (N,). Draws nothing from `rng`."""
    import torch

    frozen = torch.zeros(len(facts.sizes), dtype=torch.bool)
    frozen[torch.argsort(facts.sizes, descending=True, stable=True)[: facts.budget]] = True
    return frozen
