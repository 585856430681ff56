"""Training the values of frozen tensors in Ray Train and DeepSpeed: the worker's side and the driver's.

The frozen tensors are the only ones that require a gradient, so DeepSpeed shards, steps and keeps moments for them
alone; the rest of the model is run as it was released. Every worker also holds the whole release, for its answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from raygard.cluster.engine import Checkpointed, all_reduce_sum, deepspeed_config, initialize
from raygard.cluster.evaluation import base_loss
from raygard.cluster.training import OnRow, fit
from raygard.cluster.worker import (
    RELEARN_STEPS_PER_UNIT,
    STORAGE,
    History,
    Notice,
    begin,
    load_engine,
    prepare,
    report_engine,
    save_tensors,
)
from raygard.config import RunConfig
from raygard.defences import with_values
from raygard.diffusion.cache import load_cache
from raygard.diffusion.loss import TrainingLoss
from raygard.diffusion.model import load_denoiser, load_loss
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.values import (
    NUM_BINS,
    ROLES,
    Objective,
    Plan,
    StepRecord,
    TaughtLoss,
    ValuesSource,
    release_errors,
    train_values,
)
from raygard.values.optimizer import make_optimizer, make_schedule

RESULT = "values.safetensors"


@dataclass(frozen=True)
class ValuesInputs:
    """What the stage reads, as paths on shared storage.

    cache: latents of the parts that stage "values" reads, and all captions. general: latents of the general classes.
    store: of finished results.
    """

    cache: str
    general: str
    store: str


def release_values(
    config: RunConfig,
    mask: FreezeMask,
    inputs: ValuesInputs,
    mask_seed: int,
    out: Path,
    *,
    on_row: OnRow | None = None,
    callbacks: Sequence[Any] = (),
) -> FreezeMask:
    """The whole stage: `mask` with trained values, and the release's own loss before and after them as its metrics.

    It is saved as `out/mask`. Otherwise as `learn_values`.
    """
    cache = Path(inputs.cache)
    values = learn_values(config, cache, mask.frozen_names, mask_seed, out, on_row=on_row, callbacks=callbacks)
    before = base_loss(config, inputs.general, inputs.store)
    trained = with_values(config, mask, values, {"base_loss_before": before}).save(out / "trained")
    after = base_loss(config, inputs.general, inputs.store, trained)
    released = with_values(config, mask, values, {"base_loss_before": before, "base_loss_after": after})
    released.save(out / "mask")
    shutil.rmtree(out / "trained")
    return released


def learn_values(
    config: RunConfig,
    cache: Path,
    frozen: Sequence[str],
    mask_seed: int,
    out: Path,
    *,
    on_row: OnRow | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Tensor]:
    """Train the values of the tensors `frozen`; return them by name, float32.

    cache: as in `ValuesInputs`. Runs `config.engine` workers in Ray Train; resumes a run that was cut off in the same
    folder, and trains nothing where it had come to its end. callbacks: Ray Train user callbacks. Raises RaygardError
    for values that are not finite.
    """
    if not (out / RESULT).exists():
        job = {"cache": str(cache), "frozen": list(frozen), "out": str(out), "mask_seed": mask_seed}
        fit(config, values_worker, job, out, on_row, callbacks)
    values = load_file(str(out / RESULT))
    shutil.rmtree(out / STORAGE, ignore_errors=True)
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise RaygardError(f"the values of '{name}' are not finite; lower values.learning_rate")
    return values


def values_worker(job: dict[str, Any]) -> None:
    """What every Ray Train worker runs, going on from Ray Train's last whole checkpoint.

    job: config (RunConfig as JSON), cache, frozen (names), out (stage folder on shared storage), mask_seed.
    Outputs, by rank 0: history.jsonl, values.safetensors.
    """

    config, rank, world_size = begin(job)
    out = Path(job["out"])

    denoiser = load_denoiser(config.model)
    prepare(denoiser, config.engine)
    loss = load_loss(config.model)
    cached = load_cache(Path(job["cache"]))
    source = ValuesSource.of(cached, config.domain, config.values, loss.num_timesteps, int(job["mask_seed"]))
    training = build_values(config, denoiser, loss, job["frozen"])
    plan = make_plan(config, rank, world_size)
    # The release is measured before a checkpoint is loaded, so that a resumed run divides by what a straight one does.
    objective = Objective.of(measure(training, source, plan), source.num_timesteps, config.values)
    first_step = load_engine(training, out, "training the values")
    history = History(out / "history.jsonl", first_step) if rank == 0 else None
    every = config.engine.checkpointing_steps * RELEARN_STEPS_PER_UNIT
    notice = Notice()
    device = training.engine.device
    for record in train_values(training.engine, source, objective, plan, first_step=first_step, device=device):
        row = _row(record, device)
        if history is not None:
            history.write([row], {})
        done = record.step + 1
        noticed = done % RELEARN_STEPS_PER_UNIT == 0 and notice.arrived()
        if noticed or done % every == 0 or done == plan.max_train_steps:
            report_engine(training, out, done, row)
    values = gather(denoiser, job["frozen"], keep=rank == 0)
    if rank == 0:
        save_tensors(values, out / RESULT)


def build_values(config: RunConfig, denoiser: nn.Module, loss: TrainingLoss, frozen: Sequence[str]) -> Checkpointed:
    """A DeepSpeed engine that trains the tensors `frozen` of `denoiser`: AdamW, warm-up, cosine decay. Collective."""
    settings, module = config.values, TaughtLoss(denoiser, loss, load_denoiser(config.model))
    engine = initialize(
        module,
        make_optimizer(denoiser, frozen, settings),
        config.engine,
        deepspeed_config(config.engine, settings, settings.max_grad_norm),
        lambda basic: make_schedule(basic, settings),
    )
    # Run as the engine runs its model, so that answers differ by what is trained and not by rounding.
    # diffusers' own `to` warns of modules that stay in float32, which DeepSpeed casts as well.
    nn.Module.to(module.release, device=engine.device, dtype=next(denoiser.parameters()).dtype)
    return Checkpointed(engine)


def make_plan(config: RunConfig, rank: int, world_size: int) -> Plan:
    """How many steps this rank takes, of which share."""
    return Plan(config.values.max_train_steps, config.values.gradient_accumulation_steps, rank, world_size)


def measure(training: Checkpointed, source: ValuesSource, plan: Plan, num_bins: int = NUM_BINS) -> Tensor:
    """`release_errors` of the model as it is now, over all ranks. Collective."""
    device = training.engine.device
    return release_errors(training.engine, source, plan, num_bins=num_bins, reduce=all_reduce_sum, device=device)


def gather(denoiser: nn.Module, names: Sequence[str], *, keep: bool) -> dict[str, Tensor]:
    """Float32 values of trained tensors, one on the device at a time, kept on the CPU if `keep`. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters, found = dict(denoiser.named_parameters()), {}
    for name in names:
        # None: the engine does not shard, and the parameter is all there is.
        full = safe_get_full_fp32_param(parameters[name])
        value = parameters[name].detach() if full is None else full
        if keep:
            found[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    return found


def _row(record: StepRecord, device: torch.device) -> dict[str, Any]:
    """A line of history.jsonl: mean relative error of each role over ranks. Collective."""
    errors = record.errors.to(device)
    dist.all_reduce(errors)
    means = (errors / dist.get_world_size()).tolist()
    losses = {f"{role}_loss": mean for role, mean in zip(ROLES, means, strict=True)}
    return {"kind": "values", "k": record.step, "l": 0, "step": record.step, **losses}
