"""The section `compare`: which defences meet which adaptations in the matrix of `raygard compare`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator

from raygard.config_adapt import AdaptConfig, published_values
from raygard.config_section import Section, once
from raygard.errors import nearest

# Keys of a variant of an adaptation that are no settings of `adapt`.
NAME, METHOD, TIMES = "name", "method", "times"
# Of an edit, which has a folder of its own.
FOLDER_NAME = re.compile(r"\w[\w.-]*")
SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class CompareConfig(Section):
    """`raygard compare`: defences x adaptations x classes x `evaluation.adaptation_seeds` (docs/compare.md)."""

    defences: tuple[str, ...] = Field(
        ("none", "freeze", "random", "random-matched", "largest-first", "busy-layer", "uce", "uce+freeze"),
        description="masks, edits, an edit followed by a mask as edit+mask; mask@p has its own p (docs/defences.md)",
    )
    mask: str | None = Field(
        None, min_length=1, description="folder of a learned mask; null: one is learned for each evaluation.mask_seeds"
    )
    edits: tuple[dict[str, Any], ...] = Field(
        (), description="further edits by name: {name, method, settings of the method}; names for compare.defences"
    )
    adaptations: tuple[dict[str, Any], ...] = Field(
        ({"name": "full", "method": "full"}, {"name": "lora", "method": "lora"}),
        description="a method, or {name, method, times, settings of adapt}; times multiplies max_train_steps",
    )
    scorers: tuple[str, ...] = Field((), description="further scorers of the same pictures beside evaluation.scorer")
    legal_scorer: str | None = Field(
        None, min_length=1, description="scorer of the legal classes; null: evaluation.scorer is that of both roles"
    )

    @field_validator("defences", "scorers")
    @classmethod
    def _names_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return once(names)

    @field_validator("defences")
    @classmethod
    def _with_yardstick(cls, defences: tuple[str, ...]) -> tuple[str, ...]:
        if "none" not in defences:
            raise ValueError("defences must contain 'none': every outcome is measured against it")
        return defences

    @field_validator("adaptations", "edits", mode="before")
    @classmethod
    def _names_alone(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            return entries
        return [{NAME: entry, METHOD: entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("edits")
    @classmethod
    def _known_form_of_edits(cls, edits: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        edits = tuple({key: _number(value) for key, value in entry.items()} for entry in edits)
        for entry in edits:
            _check_names(entry, "an edit")
            if not FOLDER_NAME.fullmatch(entry[NAME]):
                raise ValueError(f"an edit's name has letters, digits, '.', '_' and '-' only, got {entry[NAME]!r}")
            for key, value in entry.items():
                # Settings are saved as JSON beside the edit.
                if value is not None and not isinstance(value, str | int | float | bool):
                    raise ValueError(f"edit '{entry[NAME]}': {key} must be a number or a word, got {value!r}")
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"edit '{entry[NAME]}': {key} must be finite, got {value}")
        once(tuple(entry[NAME] for entry in edits))
        return edits

    @field_validator("adaptations")
    @classmethod
    def _valid_variants(cls, variants: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if not variants:
            raise ValueError("names no adaptation; give at least one, e.g. [full]")
        for entry in variants:
            _check_names(entry, "an adaptation")
            times = entry.get(TIMES, 1)
            if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < 1e6:
                raise ValueError(f"adaptation '{entry[NAME]}': times must be a number above 0, got {times!r}")
        once(tuple(entry[NAME] for entry in variants))
        return tuple(_checked(entry) for entry in variants)


def variant_config(entry: Mapping[str, Any], run: AdaptConfig | None = None) -> AdaptConfig:
    """How the users of a variant adapt.

    entry: of `compare.adaptations`. run: the run's own `adapt`, which counts for variants of its method; every other
    method starts from its published values. What is in `run` as if left out counts as left out: it follows the
    variant's own settings (with a class prompt dreambooth has other steps). Raises pydantic's ValidationError.
    """
    settings = {key: value for key, value in entry.items() if key not in (NAME, TIMES)}
    own: dict[str, Any] = {}
    if run is not None and run.method == entry[METHOD]:
        given = run.model_dump(exclude_unset=True)
        left_out = {key: setting.default for key, setting in AdaptConfig.model_fields.items()} | published_values(given)
        own = {key: value for key, value in given.items() if value != left_out[key]}
    config = AdaptConfig.model_validate({**own, **settings})
    if TIMES not in entry:
        return config
    steps = max(1, round(entry[TIMES] * config.max_train_steps))
    return AdaptConfig.model_validate({**own, **settings, "max_train_steps": steps})


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its settings as `adapt` reads them."""
    unknown = [key for key in entry if key not in (*AdaptConfig.model_fields, NAME, TIMES)]
    if unknown:
        known = nearest(unknown[0], [*AdaptConfig.model_fields, NAME, TIMES])
        raise ValueError(f"adaptation '{entry[NAME]}' has no setting '{unknown[0]}'{known}")
    try:
        read = variant_config({**entry, TIMES: 1}).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise ValueError(f"adaptation '{entry[NAME]}': {where}{': ' * bool(where)}{message}") from None
    return {key: entry[key] if key in (NAME, TIMES) else read[key] for key in entry}


def _number(value: Any) -> Any:
    """A number that YAML 1.1 reads as a word because it lacks a point or a sign, such as 1e-4."""
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def _check_names(entry: Mapping[str, Any], what: str) -> None:
    for key in (NAME, METHOD):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"{what} needs a name and a method, got {dict(entry)!r}"[:300])
