"""Update rules of the logits: one small file and one registry line each, all of one signature.

A rule sees the signal s (float64 (N,), equal on all ranks) and returns nothing: it updates its state, a dict of
float64 tensors with at least "logits". Everything it does is deterministic, so ranks stay bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from raygard.bilevel.rules.average import AverageRule
from raygard.bilevel.rules.budget import BudgetRule
from raygard.bilevel.rules.paper import PaperRule
from raygard.mask.soft import shift_to_budget, soft_mask

if TYPE_CHECKING:
    from raygard.config import MaskConfig

RuleState = dict[str, Tensor]


@dataclass(frozen=True)
class RuleSettings:
    """What a rule may know: N, p, T, step size, tensor sizes (None when p counts tensors), seed.

    draw_ratios: p is drawn from these for each publisher step; empty: always `freeze_ratio`.
    """

    num_tensors: int
    freeze_ratio: float
    temperature: float
    mask_lr: float
    sparsity_weight: float
    weights: Tensor | None
    seed: int
    draw_ratios: tuple[float, ...] = ()


class Rule(Protocol):
    """The common signature.

    weighs_losses: whether `bilevel.illegal_weight` and `legal_weight` mean something to it; else L_upper is -L_illegal.
    upper_part: pictures of the publisher's half that upper batches are drawn from.
    least_ratio: mean of the soft mask while smaller p are learned; their masks are read off that ranking.
    """

    default_mask_lr: ClassVar[float]
    uses_sparsity_weight: ClassVar[bool]
    draws_ratios: ClassVar[bool]
    weighs_losses: ClassVar[bool]
    upper_part: ClassVar[str]
    least_ratio: ClassVar[float]

    def __init__(self, settings: RuleSettings) -> None: ...

    def initial(self) -> RuleState:
        """State before the first publisher step."""
        ...

    def soft(self, state: RuleState) -> Tensor:
        """m = sigmoid(w / T), float64 (N,)."""
        ...

    def update(self, state: RuleState, signal: Tensor) -> None:
        """One publisher step, in place. signal: s_i = <dL_upper/dtheta(m)_i, theta_d_i>."""
        ...


RULES: dict[str, type[Rule]] = {"average": AverageRule, "budget": BudgetRule, "paper": PaperRule}


def make_rule(name: str, settings: RuleSettings) -> Rule:
    """The rule, which holds its `least_ratio` for every smaller p of the settings."""
    least = RULES[name].least_ratio
    drawn = tuple(max(ratio, least) for ratio in settings.draw_ratios)
    return RULES[name](replace(settings, freeze_ratio=max(settings.freeze_ratio, least), draw_ratios=drawn))


def read_off(
    mask: MaskConfig, logits: Tensor, soft: Tensor, sizes: Tensor, ratio: float | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and soft mask for p = `ratio` (default mask.freeze_ratio), float64 (N,), where another p was held.

    While a ranking is learned, p may be drawn or be the rule's least; the ranking is what was learned. Otherwise both
    are returned as they are. sizes: elements of each tensor (N,).
    """
    ratio = mask.freeze_ratio if ratio is None else ratio
    if not mask.draw_ratios and ratio >= RULES[mask.rule].least_ratio:
        return logits, soft
    logits = shift_to_budget(logits, mask.temperature, ratio, sizes.double() if mask.budget == "params" else None)
    return logits, soft_mask(logits, mask.temperature)


__all__ = ["RULES", "Rule", "RuleSettings", "RuleState", "make_rule", "read_off"]
