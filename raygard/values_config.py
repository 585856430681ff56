"""The section `values` of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from raygard.config_section import Section, check_batch
from raygard.shares import largest_share


class ValuesConfig(Section):
    """Training of the values of the tensors that the mask freezes (docs/values.md); off while max_train_steps is 0.

    AdamW with linear warm-up and cosine decay. Errors count relative to the release's.
    """

    max_train_steps: int = Field(0, ge=0, description="0: the mask carries no values; the bench took 1000")
    learning_rate: float = Field(4e-4, gt=0)
    lr_warmup_steps: int = Field(20, ge=0)
    train_batch_size: int = Field(32, ge=4, description="global: a quarter legal, a half general, a quarter illegal")
    gradient_accumulation_steps: int = Field(1, ge=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    adam_weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    legal_weight: float = Field(10.0, ge=0)
    general_weight: float = Field(30.0, ge=0, description="of how far answers for general pictures leave the release's")
    illegal_weight: float = Field(0.3, ge=0, description="of the illegal error, which is driven up; 0 only teaches")
    max_illegal_error: float = Field(1.5, gt=0, description="relative error of a sample above which no more is asked")
    legal_names: int = Field(1, ge=0, description="meaningless names each legal class is also trained under")
    illegal_names: int = Field(3, ge=0, description="meaningless names each illegal class is also trained under")

    @property
    def enabled(self) -> bool:
        return self.max_train_steps > 0

    @model_validator(mode="after")
    def _no_inert_setting(self) -> ValuesConfig:
        if self.enabled:
            if self.lr_warmup_steps > self.max_train_steps:
                raise ValueError(
                    f"values.lr_warmup_steps {self.lr_warmup_steps} exceeds values.max_train_steps "
                    f"{self.max_train_steps}; lower it"
                )
            return self
        for key, setting in type(self).model_fields.items():
            if getattr(self, key) != setting.default:
                raise ValueError(f"values.{key} has no effect with values.max_train_steps=0; remove it or train values")
        return self

    def micro_batch(self, num_workers: int) -> int:
        """Pictures of the largest micro-batch."""
        return 4 * largest_share(self.train_batch_size // 4, num_workers * self.gradient_accumulation_steps)

    def check_run(self, general: Sequence[str], num_workers: int) -> None:
        """Raise ValueError if a run with these general classes and at most so many workers cannot train values."""
        if not self.enabled:
            return
        if not general:
            raise ValueError(
                "values.max_train_steps needs domain.general: name classes the base model was trained on, so that "
                "training the values does not spoil them"
            )
        accumulation = self.gradient_accumulation_steps
        check_batch("values", self.train_batch_size, 4, "4 quarters", accumulation, num_workers)
