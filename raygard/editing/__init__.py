"""Defences that edit the released values instead of freezing them: UCE and IMMA, and an edit followed by a mask.

A method is called as `method(denoiser, material, settings) -> values by name`, never changes `denoiser`, and is one
`register_edit` line with its default settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from raygard.config import ModelConfig, RunConfig
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.families import StableDiffusion
from raygard.diffusion.loss import TrainingLoss
from raygard.diffusion.model import load_loss, load_text_encoder, model_family, require_one_text_encoder
from raygard.editing.artifact import Edit
from raygard.editing.imma import IMMASettings, imma_values
from raygard.editing.inner import TextModel
from raygard.editing.release import Guarded, freeze_after, save_edited_model, save_guarded
from raygard.editing.uce import UCESettings, uce, uce_values
from raygard.errors import RaygardError, nearest

__all__ = [
    "EDITS",
    "Edit",
    "EditMaterial",
    "Guarded",
    "IMMASettings",
    "TextModel",
    "UCESettings",
    "check_family",
    "choose_edit",
    "edit_model",
    "freeze_after",
    "imma_values",
    "register_edit",
    "save_edited_model",
    "save_guarded",
    "uce",
    "uce_values",
]


@dataclass(frozen=True, eq=False)
class EditMaterial:
    """What an edit may learn from; publisher's half only (stages "learn" and "base_loss").

    illegal: pictures of the illegal classes; retain: pictures whose loss must not rise, for methods with such a term.
    illegal_prompts, legal_prompts: what is to be erased and what is to be preserved, usually the classes' names.
    tokenizer, encoder: the model's own; None where it has several, which no method here can work on.
    """

    illegal: LatentSet
    illegal_prompts: tuple[str, ...]
    legal_prompts: tuple[str, ...]
    loss: TrainingLoss
    tokenizer: Any
    encoder: Any
    retain: LatentSet | None = None
    seed: int = 0

    @property
    def text(self) -> TextModel | None:
        """For methods that learn words: those of the illegal classes. None if the model has several text encoders."""
        if self.encoder is None:
            return None
        return TextModel(self.tokenizer, self.encoder, self.illegal_prompts)

    @classmethod
    def of(cls, config: RunConfig, learn: LatentSet, general: LatentSet | None = None) -> EditMaterial:
        """The material of a run's domain, with the classes' names as prompts.

        learn: pictures of the illegal classes (and others), parts of the publisher's half. general: pretraining
        pictures to retain. Raises RaygardError if `learn` has no pictures of an illegal class.
        """
        domain = config.domain
        rows = [learn.rows(name) for name in domain.illegal]
        for name, found in zip(domain.illegal, rows, strict=True):
            if len(found) == 0:
                raise RaygardError(f"no pictures of the illegal class '{name}' to edit against")
        single = isinstance(model_family(config.model), StableDiffusion)
        tokenizer, encoder = load_text_encoder(config.model) if single else (None, None)
        return cls(
            illegal=learn.subset(torch.cat(rows)),
            illegal_prompts=domain.illegal,
            legal_prompts=(*domain.legal, *domain.general),
            loss=load_loss(config.model),
            tokenizer=tokenizer,
            encoder=encoder,
            retain=general,
            seed=config.seed,
        )


Method = Callable[[nn.Module, EditMaterial, Any], dict[str, Tensor]]
EDITS: dict[str, tuple[Method, Any]] = {}


def register_edit(name: str, method: Method, settings: Any) -> None:
    """Add a weight-editing defence with its default settings, a dataclass. Raises RaygardError if the name is taken."""
    if name in EDITS:
        raise RaygardError(f"weight-editing defence '{name}' is registered twice")
    EDITS[name] = (method, settings)


def edit_model(name: str, denoiser: nn.Module, material: EditMaterial, **settings: Any) -> Edit:
    """Run the weight-editing defence `name` on the base `denoiser`, which is not changed.

    settings: override fields of the method's settings.
    Raises RaygardError for an unknown name or setting, listing the known ones, and what the method raises.
    """
    method, chosen = choose_edit(name, **settings)
    return Edit.create(denoiser, method(denoiser, material, chosen), name, **asdict(chosen), seed=material.seed)


def choose_edit(name: str, **settings: Any) -> tuple[Method, Any]:
    """The method called `name` and its settings with the given ones. Raises RaygardError as `edit_model` does."""
    if name not in EDITS:
        raise RaygardError(f"unknown weight-editing defence '{name}'{nearest(name, EDITS)}")
    method, defaults = EDITS[name]
    known = [field.name for field in fields(defaults)]
    for key in settings:
        if key not in known:
            raise RaygardError(f"'{name}' has no setting '{key}'{nearest(key, known)}")
    try:
        return method, replace(defaults, **settings)
    except TypeError as error:
        raise RaygardError(f"'{name}': a setting is of the wrong kind ({error})") from None


def check_family(name: str, model: ModelConfig, **settings: Any) -> None:
    """Raise RaygardError if the edit `name` with these settings does not work on the model's family."""
    chosen = choose_edit(name, **settings)[1]
    if isinstance(chosen, UCESettings):
        require_one_text_encoder(model, "UCE")
    elif isinstance(chosen, IMMASettings) and chosen.inner == "textual-inversion":
        require_one_text_encoder(model, "IMMA against textual inversion")


def _uce(denoiser: nn.Module, material: EditMaterial, settings: UCESettings) -> dict[str, Tensor]:
    if material.encoder is None:
        raise RaygardError(f"UCE is for {StableDiffusion.name} only; choose another defence or model")
    prompts = material.illegal_prompts, material.legal_prompts
    return uce(denoiser, material.tokenizer, material.encoder, *prompts, settings)


def _imma(denoiser: nn.Module, material: EditMaterial, settings: IMMASettings) -> dict[str, Tensor]:
    retain = material.retain if settings.retain_weight > 0 else None
    text, seed = material.text, material.seed
    return imma_values(
        denoiser, material.illegal, material.loss, seed=seed, settings=settings, retain=retain, text=text
    )


register_edit("uce", _uce, UCESettings())
register_edit("uce-all-tokens", _uce, UCESettings(tokens="all"))
register_edit("imma", _imma, IMMASettings())
register_edit("imma-retain", _imma, IMMASettings(retain_weight=1.0))
