"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

# YAML 1.1 reads an unquoted `no` as false.
UNQUOTED_NO = BeforeValidator(lambda value: "no" if value is False else value)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as true, which would pass as the number 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds and (float in kinds or int in kinds):
            raise ValueError(f"needs a number, got {value}")
        return value


def check_batch(section: str, batch: int, roles: int, said_roles: str, accumulation: int, num_workers: int) -> None:
    """Raise ValueError unless `batch` pictures give every micro-batch of every worker one of each role, and all alike.

    roles: into how many equal parts roles divide the batch, and that in words.
    """
    least = roles * num_workers * accumulation
    if batch % roles:
        raise ValueError(f"{section}.train_batch_size {batch} must be a multiple of {roles} ({said_roles})")
    if batch < least:
        raise ValueError(
            f"{section}.train_batch_size {batch} must be at least {least} "
            f"({said_roles} x engine.num_workers x {section}.gradient_accumulation_steps)"
        )


def once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values themselves. Raises ValueError if one is repeated."""
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        raise ValueError(f"names {repeated[0]!r} twice; once is enough")
    return values
