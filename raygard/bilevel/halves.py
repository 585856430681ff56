"""A float32 number as two halves: the bfloat16 that a model computes with, and the 16 bits that its optimizer adds.

Mixed precision otherwise keeps float32 weights and a bfloat16 copy of them, six bytes a parameter; the halves are four
and lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of a float32's bits; added to them, their upper half is the nearest bfloat16.
HALF_A_STEP = 1 << 15
LOW, HIGH = 0, 1  # little-endian


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 of each float32 value (ties away from zero) and the rest of its bits, int16; flat.

    Values must be finite and below the largest bfloat16.
    """
    halves = values.reshape(-1).view(torch.int32).add(HALF_A_STEP).view(torch.int16).view(-1, 2)
    return halves[:, HIGH].view(torch.bfloat16), halves[:, LOW]


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 values that `split` was given, bit for bit."""
    halves = torch.empty(high.numel(), 2, dtype=torch.int16, device=high.device)
    halves[:, HIGH] = high.view(torch.int16)
    halves[:, LOW] = low
    return halves.view(torch.int32).view(-1).sub_(HALF_A_STEP).view(torch.float32)


@dataclass(frozen=True)
class Halves:
    """Float32 values (n,) kept as `high`, bfloat16, and `low`, int16."""

    high: Tensor
    low: Tensor

    def __getitem__(self, part: slice) -> Halves:
        return Halves(self.high[part], self.low[part])

    def value(self) -> Tensor:
        return join(self.high, self.low)

    def set(self, values: Tensor) -> None:
        """values: float32 (n,)."""
        for half, new in zip((self.high, self.low), split(values), strict=True):
            half.copy_(new)
