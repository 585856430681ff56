"""What the publisher's own users of a class train on, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raygard.seeding import generator

# With fewer pictures every user trains on all of them.
MIN_TO_SHARE = 8


def share_of_pictures(rows: Sequence[int], run: int) -> tuple[list[int], int]:
    """The rows that user `run` of a class trains on, and the number of his share of them.

    Two users of each four have one half of the pictures and two the other, so that what is found does not hang on
    pictures, and each half can be asked about the other's users.
    """
    if len(rows) < MIN_TO_SHARE:
        return list(rows), 0
    half = run // 2 % 2
    return list(rows[half::2]), half


def handful(rows: Tensor, size: int, seed: int, number: int) -> Tensor:
    """Up to `size` of the rows of general pictures, drawn for handful `number`."""
    order = torch.randperm(len(rows), generator=generator(seed, "handful", number))
    return rows[order[:size]]


def steps_of(steps: int, run: int) -> int:
    """Optimizer steps of user `run` of a class, of those a user makes: all, or half of them."""
    return steps if run % 4 in (0, 3) else max(1, steps // 2)
