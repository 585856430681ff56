"""choice.json as typed models; their JSON Schema is shipped as raygard/schemas/choice.schema.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raygard.schemas.outcome import Interval, Record


class Pick(Record):
    """One candidate mask with its numbers on the publisher half."""

    candidate_id: str
    trial_id: str
    p: float = Field(gt=0, lt=1, description="freeze ratio asked for")
    T: float = Field(gt=0, description="temperature")
    L: int = Field(ge=1, description="user steps before each publisher step")
    K: int = Field(ge=1, description="publisher steps")
    rule: str = Field(description="update rule of the logits")
    illegal_weight: float = Field(ge=0)
    legal_weight: float = Field(ge=0)
    mitigation: float
    mitigation_ci: Interval = Field(description="95 % interval")
    legal_impact: float
    legal_impact_ci: Interval = Field(description="95 % interval; its upper end is held against the budget")
    unseen_impact: float | None = Field(description="legal impact of classes nothing was learned from; null without")
    unseen_impact_ci: Interval | None = Field(description="95 % interval")
    freeze_ratio: float = Field(ge=0, le=1, description="share of parameter tensors frozen")
    param_share: float = Field(ge=0, le=1, description="share of parameters frozen")
    base_loss_rise: float | None = Field(
        description="rise of the release's own loss on general pictures by the mask's values, as a share; null without"
    )
    mask_sha256: str
    mask: str = Field(description="mask folder, relative to the search directory")


class Numbers(Record):
    """What a mask achieved on the user half, on pictures nothing was chosen on."""

    mitigation: float | None
    mitigation_ci: Interval | None = Field(description="95 % interval")
    legal_impact: float | None
    legal_impact_ci: Interval | None = Field(description="95 % interval")
    unseen_impact: float | None = Field(description="legal impact of classes nothing was learned from; null without")
    unseen_impact_ci: Interval | None = Field(description="95 % interval")


class UserHalf(Numbers):
    """The reported outcome: the picked mask itself, scored once."""

    path: str = Field(description="outcome.json it was read from, relative to the search directory")


class OverSeeds(Numbers):
    """The mean over the picked mask and masks learned with other seeds at the same point."""

    mask_seeds: tuple[int, ...] = Field(description="learning seeds of these masks; the first is that of the picked")


class Choice(Record):
    """Which mask the search recommends for a domain, by which rule, and what it achieved."""

    schema_version: Literal[1]
    domain: str
    config_hash: str
    seed: int
    rule: str = Field(description="the rule of the choice, in one sentence")
    legal_budget: float = Field(ge=0, le=1)
    base_loss_budget: float | None = Field(
        ge=0, description="largest rise of the release's own loss, as a share; null where masks carry no values"
    )
    legal_penalty: float = Field(
        ge=0, description="weight of the legal impact above the budget in the scores that steered the search"
    )
    meets_budget: bool
    statement: str = Field(description="the choice in plain words")
    chosen: Pick | None = Field(description="null if no candidate meets the budget")
    nearest: Pick | None = Field(description="smallest upper bound of legal impact, if no candidate meets the budget")
    front: tuple[str, ...] = Field(
        description="candidates that no other one beats in mitigation and in the upper bound of legal impact; most "
        "mitigation first"
    )
    considered: int = Field(ge=1, description="candidates scored on the publisher half with every counted class")
    notes: tuple[str, ...] = Field(description="what the intervals on the publisher half cover and are conditional on")
    resolvable_legal_impact: float | None = Field(
        description="smallest legal impact the publisher half can resolve; null if unknown"
    )
    outcome: UserHalf | None = Field(description="null until the picked mask is scored on the user half")
    outcome_over_seeds: OverSeeds | None = Field(
        description="null unless masks of several seeds were scored on the user half; only the first is released"
    )
