"""Random freezing: as many tensors as the learned mask, drawn uniformly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from raygard.baselines.facts import TensorFacts


def choose(facts: TensorFacts, rng: Generator) -> Tensor:
    """Freeze as many tensors as the learned mask, chosen uniformly without replacement: bool (N,)."""
    import torch

    frozen = torch.zeros(len(facts.sizes), dtype=torch.bool)
    frozen[torch.randperm(len(facts.sizes), generator=rng)[: facts.budget]] = True
    return frozen
