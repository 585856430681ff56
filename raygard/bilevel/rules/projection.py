"""Logits moved onto the budget, which rules share that hold it exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raygard.mask.soft import shift_to_budget
from raygard.seeding import generator

if TYPE_CHECKING:
    from raygard.bilevel.rules import RuleSettings


def to_budget(settings: RuleSettings, logits: Tensor, step: int) -> Tensor:
    """Logits, float64 (N,), shifted by one number so that the soft mask holds p, or the p drawn for this step."""
    ratio = settings.freeze_ratio
    if settings.draw_ratios:
        drawn = torch.randint(len(settings.draw_ratios), (), generator=generator(settings.seed, "freeze ratio", step))
        ratio = settings.draw_ratios[int(drawn)]
    return shift_to_budget(logits, settings.temperature, ratio, settings.weights)
