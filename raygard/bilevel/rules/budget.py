"""Rule `budget`: Adam on the logits, mean(m) = p held exactly, deterministic start.

Each publisher step moves the logits along dL_upper/dw_i = s_i m_i (1 - m_i) / T (Eq 12) with Adam and then shifts
all logits by one number so that the (weighted) mean of the soft mask is p. The sparsity term of Eq 6 is replaced
by this projection: as a penalty it swamps the signal (methods.md, section 5, item 1). The start m_i = p leaves no
tensor preferred and m (1 - m) / T large. Adam rescales its input, so the temperature acts on the shape of m only.

With `draw_ratios`, p is drawn anew before each publisher step: the ranking is then learned for all of these budgets
at once, and a mask of any of them can be read off it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from raygard.bilevel.rules.projection import to_budget
from raygard.mask.soft import soft_mask

if TYPE_CHECKING:
    from raygard.bilevel.rules import RuleSettings, RuleState

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-12


class BudgetRule:
    default_mask_lr: ClassVar[float] = 0.05
    uses_sparsity_weight: ClassVar[bool] = False
    draws_ratios: ClassVar[bool] = True
    weighs_losses: ClassVar[bool] = True
    upper_part: ClassVar[str] = "learn_upper"
    least_ratio: ClassVar[float] = 0.0

    def __init__(self, settings: RuleSettings) -> None:
        self.settings = settings

    def initial(self) -> RuleState:
        zeros = torch.zeros(self.settings.num_tensors, dtype=torch.float64)
        return {
            "logits": to_budget(self.settings, zeros, 0),
            "exp_avg": zeros.clone(),
            "exp_avg_sq": zeros.clone(),
            "step": torch.zeros((), dtype=torch.float64),
        }

    def soft(self, state: RuleState) -> Tensor:
        return soft_mask(state["logits"], self.settings.temperature)

    def update(self, state: RuleState, signal: Tensor) -> None:
        m = self.soft(state)
        grad = signal * m * (1 - m) / self.settings.temperature
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - BETA1)
        state["exp_avg_sq"].mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        mean = state["exp_avg"] / (1 - BETA1 ** state["step"])
        spread = (state["exp_avg_sq"] / (1 - BETA2 ** state["step"])).sqrt()
        logits = state["logits"] - self.settings.mask_lr * mean / (spread + EPSILON)
        state["logits"] = to_budget(self.settings, logits, int(state["step"]))
