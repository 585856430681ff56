"""Rule `paper`: Eq 8 plus the gradient of the sparsity term (Eq 6), as printed.

Plain gradient descent on the logits. The start is random and negative, so that m is near 0 (Algorithm 1); the
paper gives no distribution, so it is the mirror image of the published code's uniform [0, 1). The weight of Eq 6 is
the published scripts' 5e3 and, as there, not multiplied by the mask's step size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from raygard.mask.soft import soft_mask
from raygard.seeding import generator

if TYPE_CHECKING:
    from raygard.bilevel.rules import RuleSettings, RuleState


class PaperRule:
    default_mask_lr: ClassVar[float] = 10.0
    uses_sparsity_weight: ClassVar[bool] = True
    draws_ratios: ClassVar[bool] = False
    weighs_losses: ClassVar[bool] = True
    # As the paper does.
    upper_part: ClassVar[str] = "learn_lower"
    least_ratio: ClassVar[float] = 0.0

    def __init__(self, settings: RuleSettings) -> None:
        self.settings = settings

    def initial(self) -> RuleState:
        rng = generator(self.settings.seed, "mask", "paper")
        return {"logits": -torch.rand(self.settings.num_tensors, generator=rng, dtype=torch.float64)}

    def soft(self, state: RuleState) -> Tensor:
        return soft_mask(state["logits"], self.settings.temperature)

    def update(self, state: RuleState, signal: Tensor) -> None:
        s = self.settings
        m = self.soft(state)
        slope = m * (1 - m) / s.temperature
        share = torch.full_like(m, 1 / s.num_tensors) if s.weights is None else s.weights / s.weights.sum()
        sparsity = 2 * (m @ share - s.freeze_ratio) * share * slope
        state["logits"] = state["logits"] - s.mask_lr * signal * slope - s.sparsity_weight * sparsity
