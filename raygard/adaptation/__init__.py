"""Adaptations: what a user or an attacker does to a released model. One file and one `register` line each.

An adaptation is called as `adapt(unet, data, config, loss, *, mask, seed, release=None, on_step=None, pause_at=None,
resume=None) -> AdaptResult`. It changes `unet` in place, leaves it with the released model's modules and names, and
never changes a tensor that `mask` freezes, unless `config.ignore_mask` says that it is an attacker's.
"""

from __future__ import annotations

from collections.abc import Callable

from raygard.adaptation.dreambooth import dreambooth
from raygard.adaptation.full import attention, full
from raygard.adaptation.lora import lora
from raygard.adaptation.prompts import Release, learned, learned_captions
from raygard.adaptation.tokens import custom_diffusion, teach, textual_inversion
from raygard.adaptation.training import AdaptResult
from raygard.errors import RaygardError, nearest

__all__ = [
    "ADAPTATIONS",
    "AdaptResult",
    "Release",
    "attention",
    "custom_diffusion",
    "dreambooth",
    "full",
    "get_adaptation",
    "learned",
    "learned_captions",
    "lora",
    "register",
    "teach",
    "textual_inversion",
]

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
register("attention", attention)
register("lora", lora)
register("dreambooth", dreambooth)
register("textual-inversion", textual_inversion)
register("custom-diffusion", custom_diffusion)
