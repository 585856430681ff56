"""Freezing what relearning moves most: a static score in the place of a learned mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raygard.errors import RaygardError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from raygard.baselines.facts import TensorFacts


def choose(facts: TensorFacts, rng: Generator) -> Tensor:
    """Freeze as many tensors as the learned mask, those of largest relative change first, ties by index: bool (N,).

    Draws nothing from `rng`. Raises RaygardError without `facts.relative_change`.
    """
    import torch

    if facts.relative_change is None:
        raise RaygardError(
            "busy-layer ranks tensors by what relearning changed, and no relearned model is at hand here"
        )
    frozen = torch.zeros(len(facts.sizes), dtype=torch.bool)
    frozen[torch.argsort(facts.relative_change, descending=True, stable=True)[: facts.budget]] = True
    return frozen
