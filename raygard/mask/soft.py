"""Soft masks with an exact budget, and the binary mask read off a ranking.

Shape letters: N tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygard.errors import RaygardError


def soft_mask(logits: Tensor, temperature: float) -> Tensor:
    """m = sigmoid(w / T), shape (N,), in the dtype of `logits` (Eq 4)."""
    return torch.sigmoid(logits / temperature)


def shift_to_budget(logits: Tensor, temperature: float, ratio: float, weights: Tensor | None = None) -> Tensor:
    """Add one number to all logits so that the weighted mean of the soft mask equals `ratio`.

    logits: float64 (N,). weights: non-negative (N,), e.g. tensor sizes; None counts tensors. The mean is strictly
    increasing in the shift, so bisection finds it to the last bits of float64; ranks holding equal logits get
    equal results. Returns a new float64 (N,).
    """
    logits = logits.double()
    share = torch.full_like(logits, 1.0 / len(logits)) if weights is None else weights.double() / weights.double().sum()
    # sigmoid((w + c) / T) passes from below `ratio` to above it inside this bracket for every w.
    target = temperature * torch.logit(torch.tensor(ratio, dtype=torch.float64))
    low, high = target - logits.max() - temperature, target - logits.min() + temperature
    for _ in range(200):
        middle = (low + high) / 2
        if middle <= low or middle >= high:
            break
        if torch.sigmoid((logits + middle) / temperature) @ share < ratio:
            low = middle
        else:
            high = middle
    return logits + (low + high) / 2


def select_frozen(logits: Tensor, sizes: Tensor, ratio: float, budget: str = "count") -> Tensor:
    """Binary mask of the highest logits: bool (N,).

    budget "count": exactly round(ratio N) tensors, at least one and at most N - 1.
    budget "params": tensors in order of their logit, skipping those that would bring the frozen share of
    parameters above `ratio`.
    Equal logits are ordered by index, so all ranks choose alike. Raises RaygardError if nothing can be frozen.
    """
    order = torch.argsort(logits, descending=True, stable=True)
    frozen = torch.zeros(len(logits), dtype=torch.bool)
    if budget == "count":
        frozen[order[: max(1, min(len(logits) - 1, round(ratio * len(logits))))]] = True
        return frozen
    limit, used = ratio * int(sizes.sum()), 0
    for index in order.tolist():
        if used + int(sizes[index]) <= limit:
            frozen[index] = True
            used += int(sizes[index])
    if not frozen.any():
        raise RaygardError(
            f"mask.freeze_ratio {ratio} of {int(sizes.sum())} parameters is smaller than the smallest tensor "
            f"({int(sizes.min())}); raise it or use mask.budget=count"
        )
    return frozen
