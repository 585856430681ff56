"""Edits of the released values as Ray tasks: what UCE and IMMA compute, on an adaptation's resources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raygard.cluster.errors import user_mistake
from raygard.cluster.evaluation import remote_task
from raygard.cluster.evaluators import device_for
from raygard.cluster.pool import reason
from raygard.config import RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.model import load_unet
from raygard.editing import EditMaterial, edit_model
from raygard.errors import RaygardError


def edit_task(
    config_dict: dict[str, Any], method: str, settings: Mapping[str, Any], cache: str, general: str | None, out: str
) -> None:
    """Edit the release of a run and save the result to `out`. cache, general: as `EditMaterial.of` takes them."""
    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    unet = load_unet(config.model).to(device_for(config.evaluation.gpus_per_job))
    retain = load_cache(Path(general)) if general is not None else None
    material = EditMaterial.of(config, load_cache(Path(cache)), retain)
    edit_model(method, unet, material, **settings).save(out)


def make_edit(
    config: RunConfig, method: str, settings: Mapping[str, Any], cache: Path, general: Path | None, out: Path
) -> Path:
    """Run the edit `method` in a task and return its file, `out`.

    cache: latents of the illegal classes' pictures for learning. general: latents of pretraining pictures. Paths are
    on shared storage. Raises RaygardError with the reason when the task has failed `evaluation.max_attempts` times, or
    by a user's mistake.
    """
    import ray

    task = remote_task(edit_task, config)
    arguments = (config.model_dump(mode="json"), method, dict(settings), str(cache))
    for attempt in range(1, config.evaluation.max_attempts + 1):
        try:
            ray.get(task.remote(*arguments, None if general is None else str(general), str(out)))
            break
        except ray.exceptions.RayError as error:
            if user_mistake(error) is not None or attempt == config.evaluation.max_attempts:
                raise RaygardError(reason(error)) from None
    return out
