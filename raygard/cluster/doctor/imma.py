"""What IMMA trains, counted on tensors that are not allocated, for the estimate of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raygard.compare.plan import AT, FOLLOWED_BY, edit_settings
from raygard.config import RunConfig
from raygard.diffusion.families import Family
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.shape import fake_denoiser
from raygard.editing import EDITS, IMMASettings, choose_edit
from raygard.editing.imma import Immunisation
from raygard.editing.inner import INNER, LoRA, TextualInversion


@dataclass(frozen=True)
class Trained:
    """Numbers of elements. trained: by either side. both: by both, which keep moments of their own.

    more: of the attacker's own modules, and of the copy of what he alone trains, for the retain term.
    """

    trained: int
    both: int
    more: int


def immunisations(config: RunConfig) -> list[IMMASettings]:
    """The settings of every IMMA among `compare.defences`. Raises RaygardError for a wrong `compare.edits`."""
    wanted = {part for name in config.compare.defences for part in name.partition(AT)[0].split(FOLLOWED_BY)}
    chosen = (choose_edit(m, **s)[1] for name, (m, s) in edit_settings(EDITS, config).items() if name in wanted)
    return [settings for settings in chosen if isinstance(settings, IMMASettings)]


def count_trained(config: Mapping[str, Any], settings: IMMASettings, family: Family | None = None) -> Trained:
    """What an immunisation trains of a denoiser with this `config.json`. Raises RaygardError as `Immunisation`.

    family: None for Stable Diffusion.
    """
    from diffusers import DDPMScheduler

    # New tokens need a text encoder to be made, and are fewer numbers than LoRA's.
    inner = next(name for name, made in INNER.items() if made is LoRA)
    if INNER.get(settings.inner) is not TextualInversion:
        inner = settings.inner
    loss = DiffusionLoss(DDPMScheduler())
    with fake_denoiser(config, family) as denoiser:
        own = {id(parameter) for parameter in denoiser.parameters()}
        module = Immunisation(denoiser, loss, 0, replace(settings, inner=inner, retain_weight=0.0), None)
    immunised = {id(denoiser.get_parameter(name)): denoiser.get_parameter(name).numel() for name in module.names}
    phi = {id(parameter): parameter.numel() for parameter in module.inner.phi()}
    alone = {key: size for key, size in phi.items() if key not in immunised}
    copied = sum(size for key, size in alone.items() if key in own) if settings.retain_weight > 0 else 0
    return Trained(
        trained=sum((immunised | phi).values()),
        both=sum(size for key, size in phi.items() if key in immunised),
        more=copied + sum(size for key, size in alone.items() if key not in own),
    )
