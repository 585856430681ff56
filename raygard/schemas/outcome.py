"""outcome.json as typed models; their JSON Schema is shipped as raygard/schemas/outcome.schema.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float]
Role = Literal["illegal", "legal"]


class Record(BaseModel):
    """Base of all records: no unknown keys, no NaN or infinity; `class` needs an alias in Python."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Row(Record):
    """One adapted model: one class under one defence, one mask and one adaptation seed."""

    domain: str
    defence: str
    adaptation: str
    scorer: str
    freeze_ratio: float = Field(ge=0, le=1, description="share of parameter tensors frozen")
    param_share: float = Field(ge=0, le=1, description="share of parameters frozen")
    role: Role
    cls: str = Field(alias="class")
    draw: int | None = Field(description="which draw of a random mask")
    mask_seed: int | None = Field(description="seed of the learned mask this one is, or is compared with")
    seed: int = Field(description="adaptation seed")
    n: int = Field(ge=1, description="generated pictures")
    distance: float = Field(description="mean over the generated pictures, in the scorer's unit")
    d_base: float = Field(description="distance of the original release, mean over its results")
    d_full: float = Field(description="distance under defence 'none', mean over adaptation seeds")
    blocked: float | None = Field(description="(distance - d_full) / (d_base - d_full), not clipped")
    config_hash: str


class WorstClass(Record):
    """Least blocked illegal class, or most blocked legal class."""

    cls: str = Field(alias="class")
    blocked: float


class Summary(Record):
    """One defence over all counted classes; several masks and seeds are pooled."""

    domain: str
    defence: str
    adaptation: str
    scorer: str
    freeze_ratio: float = Field(ge=0, le=1)
    param_share: float = Field(ge=0, le=1)
    mitigation: float | None
    mitigation_ci: Interval | None = Field(description="95 % percentile interval")
    legal_impact: float | None
    legal_impact_ci: Interval | None = Field(description="95 % percentile interval")
    unseen_impact: float | None = Field(description="that of legal classes nothing was learned from; null without")
    unseen_impact_ci: Interval | None = Field(description="95 % percentile interval")
    relative_illegal: float | None = Field(description="d(guarded) / d(full) - 1, mean over counted classes")
    relative_legal: float | None
    base_loss: float | None = Field(description="held-out loss of the released model on general pictures")
    worst_illegal: WorstClass | None
    worst_legal: WorstClass | None


class ClassGap(Record):
    """How far adaptation moves a class; it counts if the gap exceeds three standard errors."""

    cls: str = Field(alias="class")
    role: Role
    d_base: float
    d_full: float
    gap: float = Field(description="positive if full fine-tuning came closer to the class")
    se: float = Field(ge=0, description="standard error of the gap")
    counted: bool


class Comparison(Record):
    """Paired difference of two defences, on the same resampled pictures, classes and seeds."""

    defence: str
    against: str
    mitigation_difference: float | None
    mitigation_difference_ci: Interval | None
    legal_impact_difference: float | None
    legal_impact_difference_ci: Interval | None


class Outcome(Record):
    """What a run measured: every adapted model, every defence, and what the numbers rest on."""

    schema_version: Literal[1]
    domain: str
    scorer: str
    direction: Literal["distance", "similarity"]
    config_hash: str
    legal_budget: float
    rows: tuple[Row, ...]
    summary: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    classes: tuple[ClassGap, ...]
    notes: tuple[str, ...]
    resolvable_legal_impact: float | None = Field(
        description="half-width of the interval of the legal impact of 'freeze' (else of 'none'); smaller "
        "impacts cannot be told from zero by this run"
    )
