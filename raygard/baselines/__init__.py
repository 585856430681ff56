"""Defences the learned mask is compared with: each a small file and one line in DEFENCES.

A defence chooses which tensors are frozen: `choose(sizes int64 (N,), learned bool (N,), rng) -> bool (N,)`.
`none` freezes nothing and `freeze` is the learned mask itself: neither chooses, so they map to None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from raygard.baselines import largest_first, random, random_matched
from raygard.errors import RaygardError, nearest

if TYPE_CHECKING:
    import torch

    Choose = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]

DEFENCES: dict[str, Choose | None] = {
    "none": None,
    "freeze": None,
    "random": random.choose,
    "random-matched": random_matched.choose,
    "largest-first": largest_first.choose,
}


def choose_frozen(name: str, sizes: torch.Tensor, learned: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Which tensors the defence `name` freezes: bool (N,).

    sizes: elements of each tensor, int64 (N,). learned: the learned mask, bool (N,), which sets the budget.
    Raises RaygardError for an unknown name, listing the known ones.
    """
    if name not in DEFENCES:
        raise RaygardError(f"unknown defence '{name}'{nearest(name, DEFENCES)}")
    choose = DEFENCES[name]
    if choose is not None:
        return choose(sizes, learned, rng)
    return learned.clone() if name == "freeze" else learned.new_zeros(learned.shape)
