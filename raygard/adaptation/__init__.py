"""Adaptations: what a user or an attacker does to a released model. One file and one `register` line each.

How one is called: `Adaptation`. What it is given: `Task`.
"""

from __future__ import annotations

from raygard.adaptation.dreambooth import dreambooth
from raygard.adaptation.full import attention, full
from raygard.adaptation.lora import lora
from raygard.adaptation.prompts import Release, learned, learned_captions
from raygard.adaptation.task import Adaptation
from raygard.adaptation.tokens import custom_diffusion, teach, textual_inversion
from raygard.adaptation.training import AdaptResult, check_optimizer
from raygard.config import AdaptConfig, ModelConfig
from raygard.errors import RaygardError, nearest

__all__ = [
    "ADAPTATIONS",
    "AdaptResult",
    "Adaptation",
    "Release",
    "attention",
    "check_adaptation",
    "check_optimizer",
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

ADAPTATIONS: dict[str, Adaptation] = {}


def register(name: str, adaptation: Adaptation) -> None:
    """Add an adaptation. Raises RaygardError if the name is taken."""
    if name in ADAPTATIONS:
        raise RaygardError(f"adaptation '{name}' is registered twice")
    ADAPTATIONS[name] = adaptation


def get_adaptation(name: str) -> Adaptation:
    """The adaptation called `name` (`adapt.method`). Raises RaygardError with the nearest known name."""
    if name not in ADAPTATIONS:
        raise RaygardError(f"unknown adaptation '{name}' (adapt.method){nearest(name, ADAPTATIONS)}")
    return ADAPTATIONS[name]


def check_adaptation(config: AdaptConfig, model: ModelConfig) -> None:
    """Raise RaygardError for an adaptation that a model of this family or this installation cannot have."""
    get_adaptation(config.method).check_family(model)
    check_optimizer(config)


register("full", full)
register("attention", attention)
register("lora", lora)
register("dreambooth", dreambooth)
register("textual-inversion", textual_inversion)
register("custom-diffusion", custom_diffusion)
