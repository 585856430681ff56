"""IMMA in Ray Train and DeepSpeed: the worker's side and the driver's.

One engine holds the tensors of both sides, in one parameter group for each set of sides that trains them. DeepSpeed's
clipping sees the gradients of the side at hand alone, because `TwoSidedAdamW` lets no others through.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from raygard.cluster.engine import Checkpointed, deepspeed_config, initialize
from raygard.cluster.session import node_resources, workers_fit
from raygard.cluster.training import OnRow, fit
from raygard.cluster.values import gather
from raygard.cluster.worker import (
    RELEARN_STEPS_PER_UNIT,
    STORAGE,
    History,
    Notice,
    begin,
    compile_blocks,
    load_engine,
    prepare,
    report_engine,
    save_tensors,
)
from raygard.config import EngineConfig, RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.model import load_denoiser
from raygard.editing import EditMaterial, IMMASettings
from raygard.editing.imma import Immunisation, Pictures, Place, StepRecord, TwoSidedAdamW, immunise, pictures
from raygard.errors import RaygardError

log = logging.getLogger("raygard")

RESULT = "values.safetensors"


def learn_imma(
    config: RunConfig,
    settings: IMMASettings,
    cache: Path,
    general: Path | None,
    out: Path,
    *,
    on_row: OnRow | None = None,
) -> dict[str, Tensor]:
    """Immunise the release; return the immunised tensors by name, float32.

    cache, general: as `EditMaterial.of` takes them, on shared storage. out: a folder of its own. Runs `workers` of
    `config.engine` in Ray Train; resumes a run that was cut off in the same folder, and trains nothing where it had
    come to its end. Raises RaygardError as `raygard.editing.imma_values` does.
    """
    if not (out / RESULT).exists():
        number = workers(settings, config.engine, node_resources())
        if number < config.engine.num_workers:
            log.warning(
                "IMMA's train_batch_size %d goes to %d of %d workers", settings.train_batch_size, number,
                config.engine.num_workers,
            )  # fmt: skip
        job = {
            "settings": asdict(settings), "cache": str(cache), "out": str(out),
            "general": None if general is None else str(general),
        }  # fmt: skip
        fit(config.model_copy(update={"engine": _of(config.engine, number)}), imma_worker, job, out, on_row)
    values = load_file(str(out / RESULT))
    shutil.rmtree(out / STORAGE, ignore_errors=True)
    return values


def workers(settings: IMMASettings, engine: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many of `engine.num_workers` the batch can be divided among; one for the published batch of one picture.

    nodes: total resources of each. An elastic run takes fewer where the nodes have no room for all.
    """
    most = math.gcd(engine.num_workers, settings.train_batch_size // settings.gradient_accumulation_steps)
    if engine.min_workers is None:
        return most
    for number in range(most, 1, -1):
        if most % number == 0:
            with contextlib.suppress(RaygardError):
                workers_fit(_of(engine, number), nodes)
                return number
    return 1


def _of(engine: EngineConfig, number: int) -> EngineConfig:
    return engine.model_copy(update={"num_workers": number, "min_workers": None})


def imma_worker(job: dict[str, Any]) -> None:
    """What every Ray Train worker runs, going on from Ray Train's last whole checkpoint.

    job: config (RunConfig as JSON), settings (of IMMASettings), cache, general, out (folder on shared storage).
    Outputs, by rank 0: history.jsonl, values.safetensors.
    """
    from ray.train.torch import get_device

    config, rank, world_size = begin(job)
    out, settings = Path(job["out"]), IMMASettings(**job["settings"])

    denoiser = load_denoiser(config.model)
    prepare(denoiser, config.engine)
    retain = load_cache(Path(job["general"])) if settings.retain_weight > 0 and job["general"] is not None else None
    material = EditMaterial.of(config, load_cache(Path(job["cache"])), retain)
    if material.encoder is not None:
        material.encoder.to(get_device())
    training, optimizer, source = build_imma(config, denoiser, material, settings)
    first_round = load_engine(training, out, "IMMA")
    history = History(out / "history.jsonl", first_round) if rank == 0 else None
    every = config.engine.checkpointing_steps * RELEARN_STEPS_PER_UNIT
    notice = Notice()
    place = Place(rank, world_size, training.engine.device)
    pending: list[StepRecord] = []
    for record in immunise(training.engine, optimizer, *source, settings, place, first_round=first_round):
        pending.append(record)
        if len(pending) < len(settings.round):
            continue
        rows = _average(pending, place.device)
        pending.clear()
        if history is not None:
            history.write(rows, {})
        done = record.k + 1
        noticed = done % RELEARN_STEPS_PER_UNIT == 0 and notice.arrived()
        if noticed or done % every == 0 or done == settings.rounds:
            report_engine(training, out, done, rows[-1])
    values = gather(denoiser, training.engine.module.names, keep=rank == 0)
    if rank == 0:
        save_tensors(values, out / RESULT)


def build_imma(
    config: RunConfig, denoiser: nn.Module, material: EditMaterial, settings: IMMASettings
) -> tuple[Checkpointed, TwoSidedAdamW, tuple[Pictures, Pictures | None]]:
    """A DeepSpeed engine around `Immunisation` of `denoiser`, and what else `immunise` takes. Collective."""
    module = Immunisation(denoiser, material.loss, material.seed, settings, material.text)
    if config.engine.compile and module.inner.release is not None:
        # torch leaves out of a copy what was compiled.
        compile_blocks(module.inner.release)
    source = pictures(module, material.illegal, material.retain, material.seed, settings)
    optimizer = module.optimizer(settings)
    about = deepspeed_config(config.engine, settings, settings.max_grad_norm)
    return Checkpointed(initialize(module, optimizer, config.engine, about)), optimizer, source


def _average(records: Sequence[StepRecord], device: torch.device | str) -> list[dict[str, Any]]:
    """Lines of history.jsonl: mean losses over ranks, one a step. Collective."""
    kept: list[Mapping[str, float]] = [
        {"illegal_loss": r.illegal_loss} | ({} if r.retain_loss is None else {"retain_loss": r.retain_loss})
        for r in records
    ]
    losses = torch.tensor([loss for row in kept for loss in row.values()], dtype=torch.float64, device=device)
    dist.all_reduce(losses)
    means = iter((losses / dist.get_world_size()).tolist())
    return [
        {"kind": r.side, "k": r.k, "l": r.l, "step": r.step, **{name: next(means) for name in row}}
        for r, row in zip(records, kept, strict=True)
    ]
