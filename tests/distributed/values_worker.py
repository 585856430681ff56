"""Run in real processes by test_values_sharded.py: one rank of a gloo world, several ZeRO stages in turn."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raygard.cluster.engine import cpu_environment

cpu_environment()

from raygard.cluster.values import build_values, gather, make_plan, measure  # noqa: E402
from raygard.config import RunConfig  # noqa: E402
from raygard.config_file import load_config  # noqa: E402
from raygard.diffusion.cache import load_cache  # noqa: E402
from raygard.diffusion.loss import DiffusionLoss  # noqa: E402
from raygard.diffusion.model import load_denoiser, load_noise_scheduler  # noqa: E402
from raygard.values import Objective, Plan, TaughtLoss, ValuesSource, release_errors, train_values  # noqa: E402

# Few bins, because a pass under ZeRO-3 takes a third of a second.
STEPS, SEED, NUM_BINS = 6, 1, 4
# Last in a plan's item.
OFFLOAD = {
    "offload": ("engine.offload_optimizer_device=cpu",),
    "offload-all": ("engine.offload_optimizer_device=cpu", "engine.offload_param_device=cpu"),
}


def configuration(root: Path, *overrides: str) -> RunConfig:
    return load_config(
        None,
        [
            f"domain.data={root / 'data'}",
            f"model.pretrained_model_name_or_path={root / 'sd'}",
            "domain.resolution=16",
            "domain.illegal=[a]",
            "domain.legal=[b]",
            "domain.general=[c]",
            f"values.max_train_steps={STEPS}",
            "values.lr_warmup_steps=2",
            "values.train_batch_size=16",
            "values.learning_rate=1e-3",
            *overrides,
        ],
    )


def frozen_names(root: Path) -> list[str]:
    """Every third tensor: small ones and large ones, early and late in the model."""
    return [name for name, _ in load_denoiser(configuration(root).model).named_parameters()][::3]


def setting(config: RunConfig, root: Path):
    unet = load_denoiser(config.model).train()
    loss = DiffusionLoss(load_noise_scheduler(config.model))
    data = load_cache(next((root / "cache").iterdir()))
    return unet, loss, ValuesSource.of(data, config.domain, config.values, loss.num_timesteps, SEED)


class Dense:
    """One process, torch alone, with the schedule written out."""

    def __init__(self, module: TaughtLoss, config: RunConfig) -> None:
        self.module, self.settings, self.done = module, config.values, 0
        self.held = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.held, weight_decay=self.settings.adam_weight_decay)

    def __call__(self, *batch: Tensor) -> Tensor:
        return self.module(*batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        warm, steps = self.settings.lr_warmup_steps, self.settings.max_train_steps
        progress = torch.tensor((self.done - warm) / (steps - warm))
        factor = self.done / warm if self.done < warm else 0.5 * float(1 + torch.cos(torch.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * factor
        torch.nn.utils.clip_grad_norm_(self.held, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def dense(root: Path) -> dict[str, dict[str, Tensor]]:
    config, frozen = configuration(root), set(frozen_names(root))
    unet, loss, source = setting(config, root)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in frozen)
    engine = Dense(TaughtLoss(unet, loss, load_denoiser(config.model)), config)
    objective = Objective.of(
        release_errors(engine, source, Plan(STEPS), num_bins=NUM_BINS), source.num_timesteps, config.values
    )
    records = list(train_values(engine, source, objective, Plan(STEPS)))
    return {
        "values": {name: p.detach().clone() for name, p in unet.named_parameters()},
        "curves": objective.curves,
        "errors": torch.stack([record.errors for record in records]),
    }


def sharded(
    root: Path, stage: int, precision: str, accumulation: int = 1, *, options: Sequence[str] = (),
    stop: int | None = None, save: Path | None = None, load: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One DeepSpeed run on this rank; stop: ends after so many steps, as a killed run does."""
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = [f"engine.num_workers={world}", f"engine.zero_stage={stage}", f"engine.mixed_precision={precision}"]
    config = configuration(root, *engine, *options, f"values.gradient_accumulation_steps={accumulation}")
    frozen = frozen_names(root)
    unet, loss, source = setting(config, root)
    training = build_values(config, unet, loss, frozen)
    plan = make_plan(config, rank, world)
    objective = Objective.of(measure(training, source, plan, NUM_BINS), source.num_timesteps, config.values)
    first_step = 0 if load is None else training.load(load)
    errors = []
    for record in train_values(training.engine, source, objective, plan, first_step=first_step):
        errors.append(record.errors)
        if record.step + 1 == stop:
            break
    if save is not None:
        assert stop is not None
        training.save(save, stop)
        dist.barrier()
    every = [name for name, _ in unet.named_parameters()]
    # What is not trained has no float32 copy to gather in bf16, nor a place outside its shards under ZeRO-3.
    readable = every if stage < 3 and precision == "no" else frozen
    return {
        "first_step": first_step,
        "values": gather(unet, readable, keep=True),
        "curves": objective.curves,
        "errors": torch.stack(errors),
    }


def resumed(root: Path, name: str, stage: int, precision: str, options: Sequence[str]) -> dict[str, Any]:
    """Half a run, saved by each rank into a folder of its own as under Ray Train, and the rest from the merged one."""
    with tempfile.TemporaryDirectory() as own:
        half = sharded(root, stage, precision, options=options, stop=STEPS // 2, save=Path(own))
        merged = root / f"merged-{name}-{dist.get_world_size()}"
        merged.mkdir(exist_ok=True)
        shutil.copytree(own, merged, dirs_exist_ok=True)
        dist.barrier()
    return {**sharded(root, stage, precision, options=options, load=merged), "half": half["values"]}


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    store, root, plan = Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    results: dict[str, dict[str, Any]] = {}
    for item in plan.split(","):
        name, stage, precision, *rest = item.split(":")
        options = OFFLOAD[rest.pop()] if rest and rest[-1] in OFFLOAD else ()
        if rest == ["resume"]:
            results[name] = resumed(root, name, int(stage), precision, options)
        else:
            results[name] = sharded(root, int(stage), precision, int(rest[0]) if rest else 1, options=options)
    torch.save(results, root / f"world{world}-rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
