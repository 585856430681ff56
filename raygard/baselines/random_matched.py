"""Random freezing of the same share of parameters as the learned mask.

A learned mask prefers large tensors and freezing much of a model blocks everyone, so without this control a
mask that merely found the large tensors looks like a discovery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from raygard.baselines.facts import TensorFacts


def choose(facts: TensorFacts, rng: Generator) -> Tensor:
    """Freeze random tensors whose parameters add up nearly to those of the learned mask: bool (N,).

    Tensors are taken in random order as long as they fit; then single tensors are added, dropped or exchanged
    while that brings the total nearer. The number of tensors is not held.
    """
    import torch

    sizes = facts.sizes
    order = torch.randperm(len(sizes), generator=rng)
    shuffled = sizes.cpu().long()[order]
    target = int(shuffled[facts.learned.cpu()[order]].sum())
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    left = target
    for index, size in enumerate(shuffled.tolist()):
        if size <= left:
            taken[index] = True
            left -= size
    while left:
        change = _best_change(shuffled, taken, left)
        if change is None:
            break
        for index in change:
            left += int(shuffled[index]) * (1 if taken[index] else -1)
            taken[index] = ~taken[index]
    frozen = torch.zeros(len(sizes), dtype=torch.bool)
    frozen[order] = taken
    return frozen


def _best_change(sizes: Tensor, taken: Tensor, left: int) -> tuple[int, ...] | None:
    """Tensors to flip so that the distance to the target shrinks most, or None if nothing helps."""
    import torch

    inside, outside = taken.nonzero().flatten(), (~taken).nonzero().flatten()
    nothing = torch.zeros(1, dtype=torch.long)
    gain = torch.cat([nothing, sizes[outside]])[:, None] - torch.cat([nothing, sizes[inside]])[None, :]
    distance = (left - gain).abs()
    best = int(distance.argmin())
    if int(distance.flatten()[best]) >= abs(left):
        return None
    add, drop = divmod(best, distance.shape[1])
    flips = ([int(outside[add - 1])] if add else []) + ([int(inside[drop - 1])] if drop else [])
    return tuple(flips)
