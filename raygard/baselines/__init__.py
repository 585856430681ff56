"""Defences the learned mask is compared with: each a small file and one line in DEFENCES.

A defence chooses which tensors are frozen: `choose(facts: TensorFacts, rng) -> bool (N,)`. `none` freezes nothing and
`freeze` is the learned mask itself: neither chooses, so they map to None. Defences that edit values are in
`raygard.editing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raygard.baselines import busy_layer, largest_first, manual, random, random_matched
from raygard.baselines.facts import TensorFacts, relative_change
from raygard.errors import RaygardError, nearest

if TYPE_CHECKING:
    import torch

    Choose = Callable[[TensorFacts, torch.Generator], torch.Tensor]

__all__ = ["DEFENCES", "DRAWN", "NEED_RELEARNED", "TensorFacts", "choose_frozen", "relative_change"]

DEFENCES: dict[str, Choose | None] = {
    "none": None,
    "freeze": None,
    "random": random.choose,
    "random-matched": random_matched.choose,
    "largest-first": largest_first.choose,
    "busy-layer": busy_layer.choose,
    **manual.CHOOSERS,
}
DRAWN = ("random", "random-matched")
NEED_RELEARNED = ("busy-layer",)


def choose_frozen(
    name: str,
    sizes: torch.Tensor,
    learned: torch.Tensor,
    rng: torch.Generator,
    *,
    names: Sequence[str] = (),
    relative_change: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tensors the defence `name` freezes: bool (N,).

    The other arguments are the fields of TensorFacts; `names` and `relative_change` are for defences that look at them.
    Raises RaygardError for an unknown name, listing the known ones, or if the defence needs a fact that is not given.
    """
    if name not in DEFENCES:
        raise RaygardError(f"unknown defence '{name}'{nearest(name, DEFENCES)}")
    choose = DEFENCES[name]
    if choose is not None:
        return choose(TensorFacts(sizes, learned, tuple(names), relative_change), rng)
    return learned.clone() if name == "freeze" else learned.new_zeros(learned.shape)
