"""An edit followed by a freeze mask, as the published FreezeAsGuard scripts do it: erase first, freeze after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygard.config import ModelConfig
from raygard.diffusion.model import load_denoiser, load_pipeline
from raygard.editing.artifact import Edit
from raygard.files import whole_folder
from raygard.mask import FreezeMask

MODEL, MASK = "model", "mask"


@dataclass(frozen=True, eq=False)
class Guarded:
    """A combination as it is released.

    mask: freezes tensors of the base below. loose: names of edited tensors that the mask leaves trainable. They are
    part of the release, but nothing holds them; the mask then belongs to the edited base and carries no values.
    """

    mask: FreezeMask
    loose: tuple[str, ...]

    @property
    def needs_edited_base(self) -> bool:
        """Whether users need the edited model; otherwise the original release and the mask are the whole of it."""
        return bool(self.loose)


def freeze_after(denoiser: nn.Module, edit: Edit, frozen: Tensor | Sequence[str], **info: Any) -> Guarded:
    """The mask that freezes `frozen` of the edited release.

    denoiser: the original base, which has its values again at the end. frozen, info: as in `FreezeMask.create`.
    If every edited tensor is frozen, the mask carries the edit as its values and belongs to the original base.
    Otherwise it is made against the edited base. It never carries part of an edit: applied to the original base such
    a mask would pass every check and the rest of the edit would be missing.
    A mask that freezes no edited tensor cannot tell the edited base from the original one: publish its base with it.
    Raises RaygardError as `FreezeMask.create` and `Edit.check` do.
    """
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters() if name in edit.values}
    edit.apply(denoiser)
    try:
        mask = FreezeMask.create(denoiser, frozen, **info)
    finally:
        with torch.no_grad():
            for name, value in before.items():
                denoiser.get_parameter(name).copy_(value)
    held = set(mask.frozen_names)
    loose = tuple(name for name in edit.values if name not in held)
    return Guarded(mask if loose else replace(mask, values=edit.values), loose)


def save_edited_model(model: ModelConfig, edit: Edit, out: str | Path) -> Path:
    """Write the edited base as a diffusers pipeline folder (safetensors), whole or not at all.

    Raises RaygardError if `out` is not empty, the edit was made for another model, or the disk is full.
    """
    with whole_folder(Path(out)) as folder:
        denoiser = edit.apply(load_denoiser(model))
        load_pipeline(model, denoiser).save_pretrained(str(folder), safe_serialization=True)
    return Path(out)


def save_guarded(model: ModelConfig, edit: Edit, frozen: Tensor | Sequence[str], out: str | Path, **info: Any) -> Path:
    """Write what is released for an edit followed by a mask: `out/mask` and, where it is needed, `out/model`.

    All of it is written or nothing. info: metadata of the mask, such as domain.
    Raises RaygardError as `freeze_after` and `save_edited_model` do.
    """
    denoiser = load_denoiser(model)
    guarded = freeze_after(denoiser, edit, frozen, **info)
    base = model.pretrained_model_name_or_path
    with whole_folder(Path(out)) as folder:
        if guarded.needs_edited_base:
            load_pipeline(model, edit.apply(denoiser)).save_pretrained(str(folder / MODEL), safe_serialization=True)
            base = f"{base} edited by {edit.method or 'an unnamed method'}"
        replace(guarded.mask, base_model=base).save(folder / MASK)
    return Path(out)
