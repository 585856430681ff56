"""What the publisher may release: masks from learned logits, and the control masks they are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygard.baselines import DEFENCES, DRAWN, NEED_RELEARNED, choose_frozen, relative_change
from raygard.bilevel.rules import read_off
from raygard.config import RunConfig, config_hash, flatten
from raygard.diffusion.model import load_denoiser
from raygard.errors import RaygardError
from raygard.mask import FreezeMask, select_frozen
from raygard.mask.weights import load_denoiser_state
from raygard.rundir import RunDirectory
from raygard.seeding import generator

# In run.json: SHA-256 of masks that were measured and are not the run's own.
GIVEN_MASKS = "given_masks"
CONTROLS = tuple(name for name, choose in DEFENCES.items() if choose is not None)


def make_mask(
    config: RunConfig, logits: Tensor, soft: Tensor, mask_seed: int, ratio: float | None = None
) -> FreezeMask:
    """The mask of freeze ratio `ratio` (default mask.freeze_ratio) read off learned logits, float64 (N,)."""
    denoiser = load_denoiser(config.model)
    sizes = torch.tensor([parameter.numel() for parameter in denoiser.parameters()])
    ratio = config.mask.freeze_ratio if ratio is None else ratio
    logits, soft = read_off(config.mask, logits, soft, sizes, ratio)
    frozen = select_frozen(logits, sizes, ratio, config.mask.budget)
    return FreezeMask.create(
        denoiser,
        frozen,
        logits=logits,
        soft=soft,
        metrics={"rounding_gap": float((soft - frozen.double()).abs().mean())},
        **_info(config, mask_seed, **{"mask.freeze_ratio": ratio}),
    )


def unlearned_mask(config: RunConfig, mask_seed: int) -> FreezeMask:
    """The mask of a rule that learns nothing: with `largest-first`, tensors in order of their size."""
    assert config.mask.rule == "largest-first"
    denoiser = load_denoiser(config.model)
    sizes = torch.tensor([parameter.numel() for parameter in denoiser.parameters()])
    frozen = select_frozen(sizes.double(), sizes, config.mask.freeze_ratio, config.mask.budget)
    return FreezeMask.create(denoiser, frozen, **_info(config, mask_seed))


def with_values(
    config: RunConfig, mask: FreezeMask, values: Mapping[str, Tensor], metrics: Mapping[str, float]
) -> FreezeMask:
    """`mask` carrying new values of its frozen tensors, with further metrics. Raises RaygardError as `create`."""
    return FreezeMask.create(
        load_denoiser(config.model),
        mask.frozen,
        logits=mask.logits,
        soft=mask.soft,
        values=values,
        base_model=mask.base_model,
        domain=mask.domain,
        config=mask.config,
        config_hash=mask.config_hash,
        metrics={**mask.metrics, **metrics},
    )


def masks_to_evaluate(
    config: RunConfig, paths: Sequence[Path], out: Path, require_signature: Path | None = None
) -> list[FreezeMask]:
    """The masks at `paths`; without any those of the run directory `out`, one for each mask seed.

    require_signature: public key whose owner must have signed them. Raises RaygardError if one cannot be read, was made
    for another model, or was not learned yet, and if `out` holds the evaluation of others; SignatureError for one that
    the key's owner did not sign.
    """
    if require_signature is not None and not paths:
        raise RaygardError("--require-signature has no effect without --mask; give the mask, or leave it out")
    seeds = config.evaluation.mask_seeds
    if not paths and not config.mask.learned and not config.values.enabled:
        return [unlearned_mask(config, seed) for seed in seeds]
    last = "values" if config.values.enabled else "learn"
    learned = [out / last / f"seed-{seed}" / "mask" for seed in seeds]
    missing = [seed for seed, path in zip(seeds, learned, strict=True) if not path.is_dir()]
    if not paths and missing:
        raise RaygardError(
            f"{out} has no mask of seed {missing[0]}; give --mask, or learn it there first (raygard learn with the "
            "same configuration)"
        )
    masks = [FreezeMask.load(path, require_signature=require_signature) for path in paths or learned]
    for mask in masks:
        # Values are loaded in place: each needs a model as it was released.
        mask.apply(load_denoiser(config.model))
    if paths:
        _refuse_others(masks, out)
    return masks


def _refuse_others(masks: Sequence[FreezeMask], out: Path) -> None:
    noted = RunDirectory.noted(out)
    before = [noted["mask"]["sha256"]] if "mask" in noted else noted.get(GIVEN_MASKS, [])
    if before and before != [mask.sha256 for mask in masks][: len(before)]:
        raise RaygardError(
            f"{out} holds the run of another mask ({before[0][:12]}), whose outcome would be lost; choose another --out"
        )


def _info(config: RunConfig, mask_seed: int, **changed: Any) -> dict[str, Any]:
    return {
        "base_model": config.model.pretrained_model_name_or_path,
        "domain": config.domain.name,
        "config": {**flatten(config), **changed, "mask_seed": mask_seed},
        "config_hash": config_hash(config),
    }


def save_controls(
    config: RunConfig,
    learned: FreezeMask,
    folder: Path,
    names: Sequence[str],
    relearned: Callable[[], Path],
) -> dict[tuple[str, int], str]:
    """Save the control masks `names`, matched to a learned mask; `{(name, draw): folder}`.

    relearned: gives the file of theta_ft; called only for controls that look at what relearning changed.
    """
    denoiser, paths = load_denoiser(config.model), {}
    change = None
    if any(name in NEED_RELEARNED for name in names):
        change = relative_change(dict(denoiser.named_parameters()), load_denoiser_state(relearned()))
    for name in names:
        for draw in range(config.evaluation.random_draws if name in DRAWN else 1):
            rng = generator(config.seed, "defence", name, draw)
            mask = FreezeMask.create(
                denoiser,
                choose_frozen(name, learned.sizes, learned.frozen, rng, names=learned.names, relative_change=change),
                base_model=learned.base_model,
                domain=learned.domain,
                config_hash=learned.config_hash,
            )
            paths[name, draw] = str(mask.save(folder / f"{name}-{draw}"))
    return paths


def seed_agreement(masks: Sequence[Tensor]) -> dict[str, float]:
    """Mean overlap of the frozen sets over pairs of seeds, as a share of the smaller set, and what chance gives."""
    overlaps, chances = [], []
    for index, first in enumerate(masks):
        for second in masks[index + 1 :]:
            smaller = int(min(first.sum(), second.sum()))
            overlaps.append(int((first & second).sum()) / smaller)
            chances.append(int(first.sum()) * int(second.sum()) / len(first) / smaller)
    return {"seed_agreement": float(np.mean(overlaps)), "seed_agreement_chance": float(np.mean(chances))}
