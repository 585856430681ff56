"""Edits of the released values on a cluster: IMMA on learning's workers, UCE as a task on an adaptation's resources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from raygard.cluster.errors import user_mistake
from raygard.cluster.evaluation import remote_task
from raygard.cluster.evaluators import device_for
from raygard.cluster.imma import RESULT, learn_imma
from raygard.cluster.pool import reason
from raygard.cluster.training import OnRow
from raygard.config import RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.model import load_denoiser
from raygard.editing import Edit, EditMaterial, IMMASettings, choose_edit, edit_model
from raygard.errors import RaygardError


def edit_task(
    config_dict: dict[str, Any], method: str, settings: Mapping[str, Any], cache: str, general: str | None, out: str
) -> None:
    """Edit the release of a run and save the result to `out`. cache, general: as `EditMaterial.of` takes them."""
    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    denoiser = load_denoiser(config.model).to(device_for(config.evaluation.gpus_per_job))
    retain = load_cache(Path(general)) if general is not None else None
    material = EditMaterial.of(config, load_cache(Path(cache)), retain)
    edit_model(method, denoiser, material, **settings).save(out)


def make_edit(
    config: RunConfig,
    method: str,
    settings: Mapping[str, Any],
    cache: Path,
    general: Path | None,
    out: Path,
    *,
    on_row: OnRow | None = None,
) -> Path:
    """Run the edit `method` and return its file, `out`, in a folder where a training that was cut off goes on.

    cache: latents of the illegal classes' pictures for learning. general: latents of pretraining pictures. Paths are
    on shared storage. on_row: called with each line of a training's history. Raises RaygardError with the reason when
    the work has failed too often (`evaluation.max_attempts` of a task, `engine.max_failures` of a training), or by a
    user's mistake.
    """
    _, chosen = choose_edit(method, **settings)
    if isinstance(chosen, IMMASettings):
        values = learn_imma(config, chosen, cache, general, out.parent, on_row=on_row)
        Edit.create(load_denoiser(config.model), values, method, **asdict(chosen), seed=config.seed).save(out)
        (out.parent / RESULT).unlink()
    else:
        _in_a_task(config, method, settings, cache, general, out)
    return out


def _in_a_task(
    config: RunConfig, method: str, settings: Mapping[str, Any], cache: Path, general: Path | None, out: Path
) -> None:
    import ray

    task = remote_task(edit_task, config)
    arguments = (config.model_dump(mode="json"), method, dict(settings), str(cache))
    for attempt in range(1, config.evaluation.max_attempts + 1):
        try:
            ray.get(task.remote(*arguments, None if general is None else str(general), str(out)))
            return
        except ray.exceptions.RayError as error:
            if user_mistake(error) is not None or attempt == config.evaluation.max_attempts:
                raise RaygardError(reason(error)) from None
