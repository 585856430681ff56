"""What a baseline may look at when it chooses tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Below this share of the model's median root mean square a tensor's own size says nothing about what a change means.
SMALLEST_RMS = 0.01


@dataclass(frozen=True, eq=False)
class TensorFacts:
    """Facts about the N parameter tensors of a model, in one order.

    sizes: elements of each, int64 (N,). learned: the learned mask, bool (N,), which sets the budget. names: N names,
    or none if they are not known. relative_change: how far relearning moved each, float64 (N,), or None.
    """

    sizes: Tensor
    learned: Tensor
    names: tuple[str, ...] = ()
    relative_change: Tensor | None = None

    @property
    def budget(self) -> int:
        """How many tensors the learned mask freezes."""
        return int(self.learned.sum())


def relative_change(base: Mapping[str, Tensor], relearned: Mapping[str, Tensor]) -> Tensor:
    """|theta_ft - theta_pre| / |theta_pre| of every tensor of `base`, in its order: float64 (N,).

    This busy score is raygard's own definition, "AIAO-style" (methods.md, section 9). The denominator is at least that
    of a tensor of the same size with 1 % of the model's median root mean square, so that fresh biases, which are
    nearly zero, do not lead the ranking whatever they do. KeyError if `relearned` lacks a tensor.
    """
    import torch

    norms = torch.stack([tensor.detach().cpu().double().norm() for tensor in base.values()])
    moved = torch.stack(
        [
            (relearned[name].detach().cpu().double() - tensor.detach().cpu().double()).norm()
            for name, tensor in base.items()
        ]
    )
    roots = torch.tensor([float(tensor.numel()) ** 0.5 for tensor in base.values()], dtype=torch.float64)
    floor = SMALLEST_RMS * (norms / roots).median() * roots
    return moved / norms.maximum(floor).clamp_min(torch.finfo(torch.float64).tiny)
