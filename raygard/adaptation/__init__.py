"""Adaptations: what a user or an attacker does to a released model. One file and one `register` line each.

An adaptation is called as `adapt(unet, data, config, loss, *, mask, seed, on_step=None) -> AdaptResult`,
changes `unet` in place, and never changes a tensor that `mask` freezes.
"""

from __future__ import annotations

from collections.abc import Callable

from raygard.adaptation.full import AdaptResult, full
from raygard.errors import RaygardError, nearest

__all__ = ["ADAPTATIONS", "AdaptResult", "full", "get_adaptation", "register"]

ADAPTATIONS: dict[str, Callable[..., AdaptResult]] = {}


def register(name: str, adaptation: Callable[..., AdaptResult]) -> None:
    """Add an adaptation. Raises RaygardError if the name is taken."""
    if name in ADAPTATIONS:
        raise RaygardError(f"adaptation '{name}' is registered twice")
    ADAPTATIONS[name] = adaptation


def get_adaptation(name: str) -> Callable[..., AdaptResult]:
    """The adaptation called `name` (`adapt.method`). Raises RaygardError with the nearest known name."""
    if name not in ADAPTATIONS:
        raise RaygardError(f"unknown adaptation '{name}' (adapt.method){nearest(name, ADAPTATIONS)}")
    return ADAPTATIONS[name]


register("full", full)
