"""Rule `average`: logits follow the sum of all signals so far, of the illegal loss alone; mean(m) = max(p, 0.3) held.

The signal s_i = dL_upper/dm_i, negated, is what tensor i gives the illegal user. Adam (rule `budget`) divides it by its
own size, tensor by tensor, and forgets it after some ten steps: tensors that hardly matter then count as much as those
that do, and two seeds agree on half of what they freeze. Here all tensors share one scale and no step is forgotten, as
in dual averaging (Nesterov 2009, doi 10.1007/s10107-007-0149-x). L_upper is -L_illegal, on the pictures the user trains
on: what illegal and legal pictures say of a tensor is the same up to noise, and their difference is most of that noise;
of a class with few pictures, the loss on further ones rises while a user learns it (docs/selectivity.md).

A user who is held by almost nothing stands near his optimum, where the loss has no slope and signals are noise: sums
learned at p = 0.02 or 0.05 rank worse than the same sums learned at 0.3. So smaller p are read off the ranking of 0.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from raygard.bilevel.rules.projection import to_budget
from raygard.mask.soft import soft_mask

if TYPE_CHECKING:
    from raygard.bilevel.rules import RuleSettings, RuleState

EPSILON = 1e-300


class AverageRule:
    default_mask_lr: ClassVar[float] = 0.05
    uses_sparsity_weight: ClassVar[bool] = False
    draws_ratios: ClassVar[bool] = True
    weighs_losses: ClassVar[bool] = False
    upper_part: ClassVar[str] = "learn_lower"
    least_ratio: ClassVar[float] = 0.3

    def __init__(self, settings: RuleSettings) -> None:
        self.settings = settings

    def initial(self) -> RuleState:
        zeros = torch.zeros(self.settings.num_tensors, dtype=torch.float64)
        step = torch.zeros((), dtype=torch.float64)
        return {"logits": to_budget(self.settings, zeros, 0), "total": zeros.clone(), "step": step}

    def soft(self, state: RuleState) -> Tensor:
        return soft_mask(state["logits"], self.settings.temperature)

    def update(self, state: RuleState, signal: Tensor) -> None:
        state["step"] += 1
        state["total"] += signal
        scale = state["total"].square().mean().sqrt() + EPSILON
        logits = -self.settings.mask_lr * state["step"] * state["total"] / scale
        state["logits"] = to_budget(self.settings, logits, int(state["step"]))
