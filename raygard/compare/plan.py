"""What the matrix consists of: defences by name, variants of adaptations, and one cell for each user."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from raygard.baselines import DEFENCES
from raygard.baselines.manual import CHOOSERS as FIXED
from raygard.config import RunConfig
from raygard.config_adapt import AdaptConfig
from raygard.config_compare import NAME, variant_config
from raygard.config_file import describe_error
from raygard.errors import RaygardError, nearest
from raygard.outcome import BASE, LEARNED, NONE

FOLLOWED_BY, AT = "+", "@"


@dataclass(frozen=True)
class Defence:
    """edit: name of an edit of the released values, None for none. mask: name of a mask that freezes after it.
    ratio: freeze ratio of the mask, None for `mask.freeze_ratio`."""

    name: str
    edit: str | None = None
    mask: str | None = None
    ratio: float | None = None

    @property
    def key(self) -> tuple[str | None, float | None]:
        """What tells its mask from others."""
        return self.mask, self.ratio


def learned_alone(name: str) -> bool:
    """Whether a defence is the learned mask, of any freeze ratio, without an edit before it."""
    return name.partition(AT)[0] == LEARNED


def holds_learned(name: str) -> bool:
    """Whether the learned mask, of any freeze ratio, is all or a part of a defence."""
    return LEARNED in name.partition(AT)[0].split(FOLLOWED_BY)


@dataclass(frozen=True)
class Variant:
    """One way to adapt, by the name it has in the matrix."""

    name: str
    config: AdaptConfig

    @property
    def around(self) -> tuple[str, ...]:
        """What the configuration alone says about going around a mask, in words."""
        return ("the mask is ignored: every tensor is trained",) if self.config.ignore_mask else ()

    def without_mask(self) -> AdaptConfig:
        """The same users where there is no mask to ignore, so that both are one entry of the store."""
        return self.config.model_copy(update={"ignore_mask": False})


@dataclass(frozen=True)
class Cell:
    """One user in the matrix. draw, mask_seed: which mask of the defence, as in `EvaluationJob`."""

    adaptation: str
    defence: str
    role: str
    cls: str
    draw: int = 0
    mask_seed: int | None = None
    seed: int = 0


def parse_defences(
    names: Sequence[str], edits: Collection[str], masks: Collection[str], own_ratio: float | None = None
) -> tuple[Defence, ...]:
    """`none`, a mask, `mask@p` with a freeze ratio of its own, an edit, or `edit+mask`, by name and in order.

    edits, masks: known names. own_ratio: the run's own freeze ratio, so that `mask@p` of the same p is the same mask.
    Raises RaygardError for an unknown name, listing the known ones, or a wrong ratio.
    """
    found = (_parse(name, edits, masks) for name in names)
    return tuple(replace(each, ratio=None) if each.ratio == own_ratio else each for each in found)


def _parse(name: str, edits: Collection[str], masks: Collection[str]) -> Defence:
    plain, at, ratio = name.partition(AT)
    if at:
        found = _parse(plain, edits, masks)
        if found.mask is None:
            raise RaygardError(f"defence '{name}': {AT} gives a mask its freeze ratio, and '{plain}' freezes nothing")
        if found.mask in FIXED:
            raise RaygardError(f"defence '{name}': '{found.mask}' freezes all of its kind; leave out {AT}{ratio}")
        return replace(found, name=name, ratio=_ratio(name, ratio))
    freezing = [mask for mask in masks if mask != NONE]
    edit, plus, mask = name.partition(FOLLOWED_BY)
    if not plus:
        if name == NONE:
            return Defence(name)
        if name in freezing:
            return Defence(name, mask=name)
        if name in edits:
            return Defence(name, edit=name)
        raise RaygardError(
            f"unknown defence '{name}' (compare.defences){nearest(name, [*masks, *edits])}; an edit followed by a mask "
            "is written edit+mask"
        )
    if edit not in edits:
        raise RaygardError(f"defence '{name}': no edit is called '{edit}'{nearest(edit, edits)}")
    if mask not in freezing:
        raise RaygardError(f"defence '{name}': no mask is called '{mask}'{nearest(mask, freezing)}")
    return Defence(name, edit=edit, mask=mask)


def _ratio(name: str, text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1:
        raise RaygardError(f"defence '{name}': a freeze ratio p lies between 0 and 1, got '{text}'")
    return ratio


def variants(config: RunConfig) -> tuple[Variant, ...]:
    """The adaptations of `compare.adaptations`; what they leave out is as `variant_config` says.

    Raises RaygardError for one whose settings do not go with those of the run's `adapt`.
    """
    found = []
    for entry in config.compare.adaptations:
        try:
            found.append(Variant(entry[NAME], variant_config(entry, config.adapt)))
        except ValidationError as error:
            raise RaygardError(f"adaptation '{entry[NAME]}' (compare.adaptations): {describe_error(error)}") from None
    return tuple(found)


def classes(config: RunConfig) -> list[tuple[str, str]]:
    """(class, role), illegal ones first."""
    return list(config.domain.adapted)


def plan_cells(
    config: RunConfig, adaptation: str, places: Mapping[str, Sequence[tuple[int, int | None]]]
) -> list[Cell]:
    """Every user of one adaptation, in the order of the defences.

    places: the (draw, mask_seed) of every mask of a defence, by the defence's name.
    """
    return [
        Cell(adaptation, name, role, cls, draw, mask_seed, seed)
        for name, masks in places.items()
        for draw, mask_seed in masks
        for cls, role in classes(config)
        for seed in config.evaluation.adaptation_seeds
    ]


def edit_settings(known: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every edit that may be named: {name: (method, settings that differ from the method's)}.

    known: the registered methods. Raises RaygardError for an edit of an unknown method, or with the name of another
    method, of a defence or of the untouched release (`base`), whose results it would be taken for.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in known}
    for entry in config.compare.edits:
        name, method = entry["name"], entry["method"]
        if method not in known:
            raise RaygardError(f"edit '{name}': unknown weight-editing defence '{method}'{nearest(method, known)}")
        settings = {key: value for key, value in entry.items() if key not in ("name", "method")}
        if FOLLOWED_BY in name or name in (BASE, *DEFENCES) or (name in known and name != method):
            raise RaygardError(f"an edit cannot be called '{name}': that name is taken; choose another")
        found[name] = (method, settings)
    return found
