"""Run in real processes by test_imma_sharded.py: one rank of a gloo world, several ZeRO stages in turn."""

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
from torch import Tensor, nn

from raygard.cluster.engine import cpu_environment

cpu_environment()

from raygard.cluster.imma import build_imma  # noqa: E402
from raygard.cluster.values import gather  # noqa: E402
from raygard.config import RunConfig  # noqa: E402
from raygard.config_file import load_config  # noqa: E402
from raygard.diffusion.loss import DiffusionLoss  # noqa: E402
from raygard.diffusion.model import load_denoiser, load_noise_scheduler, load_text_encoder  # noqa: E402
from raygard.editing import EditMaterial, IMMASettings  # noqa: E402
from raygard.editing.imma import Immunisation, OneProcess, Place, StepRecord, immunise, pictures  # noqa: E402
from tests.latents import flat_latents  # noqa: E402

ROUNDS, STOP, SEED = 3, 2, 1
RETAINS = "-retain"
# Last in a plan's item.
OFFLOAD = {
    "offload": ("engine.offload_optimizer_device=cpu",),
    "offload-all": ("engine.offload_optimizer_device=cpu", "engine.offload_param_device=cpu"),
}


def configuration(root: Path, *overrides: str) -> RunConfig:
    domain = ["domain.data=x", "domain.illegal=[a]", "domain.legal=[b]"]
    return load_config(None, [f"model.pretrained_model_name_or_path={root / 'sd'}", *domain, *overrides])


def setting(root: Path, case: str, accumulation: int = 1) -> tuple[nn.Module, EditMaterial, IMMASettings]:
    """case: name of an inner adaptation, with `RETAINS` behind it for a retain term."""
    model, retains = configuration(root).model, case.endswith(RETAINS)
    loss = DiffusionLoss(load_noise_scheduler(model))
    kept = flat_latents(1) if retains else None
    material = EditMaterial(flat_latents(), ("x",), ("y",), loss, *load_text_encoder(model), retain=kept, seed=SEED)
    # Norms lie between 0.02 and 2, so that some steps are clipped and some are not.
    settings = IMMASettings(
        inner=case.removesuffix(RETAINS),
        layers="cross-kv",
        rounds=ROUNDS,
        train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        inner_lr=1e-3,
        outer_lr=2e-3,
        max_grad_norm=0.03,
        retain_weight=0.5 if retains else 0.0,
    )
    return load_denoiser(model), material, settings


def dense(root: Path, case: str) -> dict[str, Any]:
    """One process, torch alone."""
    unet, material, settings = setting(root, case)
    module = Immunisation(unet, material.loss, material.seed, settings, material.text)
    optimizer = module.optimizer(settings)
    source = pictures(module, material.illegal, material.retain, material.seed, settings)
    records = list(immunise(OneProcess(module, optimizer, settings), optimizer, *source, settings))
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {"names": module.names, "parameters": parameters, "losses": losses(records)}


def losses(records: list[StepRecord]) -> Tensor:
    """Illegal and retain loss of every step, (steps, 2); the latter is 0 where there is none."""
    return torch.tensor([[record.illegal_loss, record.retain_loss or 0.0] for record in records])


def sharded(
    root: Path, case: str, stage: int, precision: str, accumulation: int = 1, *, options: Sequence[str] = (),
    stop: int | None = None, save: Path | None = None, load: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One DeepSpeed run on this rank; stop: ends after so many rounds, as a killed run does."""
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = [f"engine.num_workers={world}", f"engine.zero_stage={stage}", f"engine.mixed_precision={precision}"]
    unet, material, settings = setting(root, case, accumulation)
    training, optimizer, source = build_imma(configuration(root, *engine, *options), unet, material, settings)
    first_round = 0 if load is None else training.load(load)
    records = []
    for record in immunise(training.engine, optimizer, *source, settings, Place(rank, world), first_round=first_round):
        records.append(record)
        if stop is not None and len(records) == stop * len(settings.round):
            break
    if save is not None:
        assert stop is not None
        training.save(save, stop)
        dist.barrier()
    module = training.engine.module
    # What is not trained has no float32 copy to gather in bf16, nor a place outside its shards under ZeRO-3.
    readable = [n for n, p in module.named_parameters() if p.requires_grad or (stage < 3 and precision == "no")]
    return {"first_round": first_round, "parameters": gather(module, readable, keep=True), "losses": losses(records)}


def resumed(root: Path, name: str, case: str, stage: int, precision: str, options: Sequence[str]) -> dict[str, Any]:
    """A part of a run, saved by each rank into a folder of its own as under Ray Train, and the rest from the merged
    one."""
    with tempfile.TemporaryDirectory() as own:
        part = sharded(root, case, stage, precision, options=options, stop=STOP, save=Path(own))
        merged = root / f"merged-{name}-{dist.get_world_size()}"
        merged.mkdir(exist_ok=True)
        shutil.copytree(own, merged, dirs_exist_ok=True)
        dist.barrier()
    return {**sharded(root, case, stage, precision, options=options, load=merged), "part": part["parameters"]}


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
        case, stage, precision, *rest = item.split(":")
        options = OFFLOAD[rest.pop()] if rest and rest[-1] in OFFLOAD else ()
        if rest == ["resume"]:
            results[item] = resumed(root, item.replace(":", "-"), case, int(stage), precision, options)
        else:
            accumulation = int(rest[0]) if rest else 1
            results[item] = sharded(root, case, int(stage), precision, accumulation, options=options)
    torch.save(results, root / f"world{world}-rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
