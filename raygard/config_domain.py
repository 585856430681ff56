"""The section `domain` of the configuration."""

from __future__ import annotations

from itertools import combinations

from pydantic import Field, model_validator

from raygard.config_section import Section


class DomainConfig(Section):
    """Pictures, and which classes are illegal, legal and general (pretraining) material."""

    name: str = "emoji-styles"
    data: str = Field(
        "zoo:emoji-styles", description="imagefolder with metadata.jsonl or metadata.csv, or 'zoo:emoji-styles'"
    )
    caption_column: str = "text"
    class_column: str | None = Field("class", description="null: a table without classes is one class, 'all'")
    illegal: tuple[str, ...] = Field(("OpenMoji", "Noto Line"), min_length=1)
    legal: tuple[str, ...] = Field(("Fluent High Contrast", "EmojiOne Monotone"), min_length=1)
    unseen: tuple[str, ...] = Field(
        (), description="legal classes that nothing is learned from; users adapt to them too"
    )
    general: tuple[str, ...] = Field(
        (), description="classes the base model was trained on: its own loss, stage values"
    )
    resolution: int | None = Field(None, ge=16, le=2048, description="pixels; null: the model's own")
    center_crop: bool = True
    max_per_class: int | None = Field(None, ge=4)
    publisher_fraction: float = Field(0.5, gt=0, lt=1, description="share of each class for the publisher half")
    learn_fraction: float = Field(
        0.5, gt=0, lt=1, description="share of the publisher half used to learn, rest to select"
    )
    adapt_fraction: float = Field(
        0.5, gt=0, lt=1, description="share of the user half to fine-tune on, rest is reference"
    )
    upper_fraction: float = Field(1 / 3, gt=0, lt=1, description="share of the learn part kept for upper batches only")
    min_part: int = Field(4, ge=1, description="a class with fewer pictures in any part is refused")
    legal_budget: float = Field(0.05, ge=0, le=1, description="largest tolerated legal impact")
    base_loss_budget: float = Field(0.02, ge=0, description="largest rise of the release's own loss by trained values")
    sensitive: bool = Field(False, description="no picture goes into a report or to MLflow (docs/security.md)")

    @model_validator(mode="after")
    def _roles_are_disjoint(self) -> DomainConfig:
        roles = ("illegal", "legal", "unseen", "general")
        for role in roles:
            classes = getattr(self, role)
            if len(set(classes)) != len(classes):
                raise ValueError(f"domain.{role} names a class twice: {', '.join(classes)}")
        for first, second in combinations(roles, 2):
            both = sorted(set(getattr(self, first)) & set(getattr(self, second)))
            if both:
                raise ValueError(f"class '{both[0]}' is both {first} and {second}; give it one role")
        return self

    @property
    def adapted(self) -> tuple[tuple[str, str], ...]:
        """(class, role) of all that users adapt to: illegal ones, then legal ones, the unseen among them last."""
        legal = (*self.legal, *self.unseen)
        return (*((cls, "illegal") for cls in self.illegal), *((cls, "legal") for cls in legal))
