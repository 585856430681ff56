"""The section `adapt`: how a user adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raygard.config_section import UNQUOTED_NO, Section
from raygard.published import PRIOR_PRESERVATION, PUBLISHED, READ_BY


def published_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapt` takes for settings that are left out beside the given ones, where it differs from `full`."""
    method = settings.get("method")
    if not isinstance(method, str):
        return {}
    published = dict(PUBLISHED.get(method, {}))
    if settings.get("instance_prompt") and method == "dreambooth":
        del published["learn_as"]
    if settings.get("class_prompt"):
        published |= PRIOR_PRESERVATION.get(method, {})
    return published


class AdaptConfig(Section):
    """The user's fine-tuning (the simulated user runs the same code).

    What is left out takes the published value of `adapt.method` (docs/adaptations.md); the defaults here are of `full`.
    """

    method: str = Field("full", description="full, attention, lora, dreambooth, textual-inversion, custom-diffusion")
    max_train_steps: int = Field(2000, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    train_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit", "sgd"] = Field(
        "adamw", description="adamw-fused: one kernel a step; adamw-8bit: moments of 8 bits, by bitsandbytes"
    )
    sgd_momentum: float | None = Field(None, ge=0, lt=1, description="optimizer sgd only; null: 0")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    adam_weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    snr_gamma: float | None = Field(None, gt=0)
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], UNQUOTED_NO] = "no"
    gradient_checkpointing: bool = Field(False, description="of the denoiser: less memory for one more forward pass")
    ignore_mask: bool = Field(False, description="an attacker's: carried values are loaded, but nothing is frozen")
    learn_as: str | None = Field(
        None, min_length=1, description="word that replaces the class's name in its captions; null: none"
    )
    instance_prompt: str | None = Field(None, min_length=1, description="one caption for all pictures; null: their own")
    rank: int | None = Field(None, ge=1, description="of LoRA; 4 if left out")
    target_modules: tuple[str, ...] = Field(
        (), description="module names LoRA adapts, also convolutions; [to_k, to_q, to_v, to_out.0] if left out"
    )
    class_prompt: str | None = Field(
        None, min_length=1, description="dreambooth, custom-diffusion: given, the prior of this class is preserved"
    )
    num_class_images: int | None = Field(None, ge=1, description="drawn from the release; 200 if left out")
    prior_loss_weight: float | None = Field(None, gt=0, description="1 if left out")
    initializer_token: str | None = Field(
        None, min_length=1, description="word a new token starts from; null: the class's name"
    )

    @model_validator(mode="before")
    @classmethod
    def _published_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {**published_values(data), **data}

    @model_validator(mode="after")
    def _no_inert_setting(self) -> AdaptConfig:
        for key, methods in READ_BY.items():
            if getattr(self, key) not in (None, ()) and self.method not in methods:
                raise ValueError(f"adapt.{key} has no effect with adapt.method={self.method}; remove it")
        for key in ("num_class_images", "prior_loss_weight"):
            if getattr(self, key) is not None and self.class_prompt is None:
                raise ValueError(f"adapt.{key} has no effect without adapt.class_prompt; remove it or give both")
        if self.sgd_momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"adapt.sgd_momentum has no effect with adapt.optimizer={self.optimizer}; remove it")
        if self.optimizer == "sgd":
            for key, setting in type(self).model_fields.items():
                if key.startswith("adam_") and getattr(self, key) != setting.default:
                    raise ValueError(f"adapt.{key} has no effect with adapt.optimizer={self.optimizer}; remove it")
        # A token's embedding is smaller than any tensor that bitsandbytes keeps 8-bit moments of.
        if self.optimizer == "adamw-8bit" and self.method == "textual-inversion":
            raise ValueError("adapt.optimizer=adamw-8bit has no effect with adapt.method=textual-inversion; remove it")
        needed = ["rank", "target_modules"] if self.method == "lora" else []
        needed += ["num_class_images", "prior_loss_weight"] if self.class_prompt is not None else []
        for key in needed:
            if getattr(self, key) in (None, ()):
                raise ValueError(f"adapt.{key} is empty; leave it out for the published value")
        if self.method == "textual-inversion" and self.learn_as is None:
            raise ValueError("adapt.method=textual-inversion learns a new token: name it in adapt.learn_as")
        if self.initializer_token is not None and self.learn_as is None:
            raise ValueError("adapt.initializer_token has no effect without adapt.learn_as; remove it or give both")
        if self.instance_prompt and self.learn_as and self.learn_as not in self.instance_prompt:
            raise ValueError(f"adapt.instance_prompt must name adapt.learn_as, '{self.learn_as}'")
        return self
