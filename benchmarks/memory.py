"""Memory of real workers beside what `raygard doctor` estimates for them (docs/scaling.md).

    python benchmarks/memory.py [--out benchmarks/results/memory.json] [--only [NAME ...]]

Every case is one gloo world of CPU processes with DeepSpeed, on a UNet of SD's layout with 79 million parameters (the
cases "large": 140 million, four times the latents) and random weights. Measured is the peak of the resident memory over
set-up, two user and two publisher steps and a checkpoint, less what the process held when a tiny model had been trained
in it, which is what libraries take. The largest of all ranks counts.

Cases that are not run keep their measurement in the file; the estimates beside them are made anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import workers
from benchmarks.resident import reset_peak, resident
from raygard.cluster.engine import Checkpointed, ShardedTraining
from raygard.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
UNET = {"sample_size": 16, "block_out_channels": (96, 192, 384, 384), "cross_attention_dim": 384}
LARGE = {"sample_size": 32, "block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 512}
TINY = {"sample_size": 8, "block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32}
MODELS: dict[str, dict[str, Any]] = {"unet": UNET, "large": LARGE, "tiny": TINY}
SIZES = ("unet", "large")
VALUES_RATIO = 0.3
PHASES = ("set up", "steps", "checkpoint")
STREAMED = ("engine.stream_gradients=true", "bilevel.max_grad_norm=0")
# name: stage, ZeRO stage, workers, further settings.
CASES: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    **{f"learn-zero{zero}-{n}": ("learn", zero, n, ()) for n in (1, 2) for zero in (0, 1, 2, 3)},
    "learn-zero2-2-sgd": ("learn", 2, 2, ("bilevel.user_optimizer=sgd",)),
    "learn-zero2-2-bf16": ("learn", 2, 2, ("engine.mixed_precision=bf16",)),
    "learn-zero2-1-batch16": ("learn", 2, 1, ("bilevel.train_batch_size=16",)),
    "learn-zero2-2-rounded": ("learn", 2, 2, ("engine.theta_d_dtype=bfloat16",)),
    "learn-streamed": ("learn", 0, 1, STREAMED),
    "learn-streamed-rounded-bf16": (
        "learn",
        0,
        1,
        (*STREAMED, "engine.theta_d_dtype=bfloat16", "engine.mixed_precision=bf16"),
    ),
    "relearn-zero2-2": ("relearn", 2, 2, ()),
    "values-zero2-2": (
        "values",
        2,
        2,
        ("values.max_train_steps=2", "domain.general=[c]", "values.lr_warmup_steps=0", "values.train_batch_size=8"),
    ),
    "large-learn-zero2-1": ("learn", 2, 1, ("bilevel.train_batch_size=8",)),
    "large-learn-zero3-2": ("learn", 3, 2, ("bilevel.train_batch_size=8",)),
}
BATCH = ("bilevel.train_batch_size=4", "bilevel.inner_steps=1", "bilevel.publisher_steps=2")


def configuration(model: Path, name: str) -> RunConfig:
    _, zero, world, more = CASES[name]
    engine = (f"engine.zero_stage={zero}", f"engine.num_workers={world}", "relearn.max_train_steps=2")
    return workers.run_config(model, *BATCH, *engine, *more)


def measure(stage: str, config: RunConfig, tiny: RunConfig) -> dict[str, int]:
    """Bytes that this rank's process held more than libraries, at its highest, in setting up and in steps."""
    run(stage, tiny)
    gc.collect()
    libraries = resident("VmRSS")
    return {"libraries": libraries, **{phase: peak - libraries for phase, peak in run(stage, config).items()}}


def run(stage: str, config: RunConfig) -> dict[str, int]:
    """Highest resident bytes of this process in each of PHASES."""
    peaks = {}
    phases = values_phases(config) if stage == "values" else mask_phases(config, stage == "relearn")
    reset_peak()
    for phase, _ in zip(PHASES, phases, strict=True):
        peaks[phase] = resident("VmHWM")
        reset_peak()
    return peaks


def mask_phases(config: RunConfig, relearning: bool) -> Iterator[None]:
    """Yields at the end of each phase of relearning or mask learning."""
    from raygard.cluster.worker import set_up

    model = Path(config.model.pretrained_model_name_or_path)
    training, *_ = set_up(config, workers.learning_job(model), relearning)
    yield
    for _ in workers.steps(training, config, workers.random_latents(model), relearning):
        pass
    yield
    yield from checkpoint(training)


def checkpoint(training: Checkpointed | ShardedTraining) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="raygard-") as folder:
        training.save(Path(folder), 1)
    yield


def values_phases(config: RunConfig) -> Iterator[None]:
    """As `mask_phases`, for the training of frozen tensors' values; the largest tensors are frozen."""
    import torch.distributed as dist

    from raygard.cluster.values import build_values, make_plan
    from raygard.diffusion.model import load_denoiser, load_loss
    from raygard.values import NUM_BINS, ROLES, Objective, ValuesSource, train_values
    from raygard.values.batches import Pictures

    model = Path(config.model.pretrained_model_name_or_path)
    data = workers.random_latents(model)
    unet = load_denoiser(config.model).train()
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    frozen = sorted(sizes, key=lambda name: -sizes[name])[: round(VALUES_RATIO * len(sizes))]
    loss = load_loss(config.model)
    training = build_values(config, unet, loss, frozen)
    pictures = [Pictures(rows, data.conditioning.index[rows][None]) for rows in map(data.rows, workers.CLASSES)]
    roles = ([pictures[1]], [pictures[1]], [pictures[0]])
    source = ValuesSource(data, roles, config.values.train_batch_size, loss.num_timesteps, 0)
    objective = Objective.of(torch.ones(len(ROLES), NUM_BINS), loss.num_timesteps, config.values)
    yield
    plan = make_plan(config, dist.get_rank(), dist.get_world_size())
    for _ in train_values(training.engine, source, objective, plan):
        pass
    yield
    yield from checkpoint(training)


def estimate(name: str, config: RunConfig) -> dict[str, int]:
    """The doctor's terms for a case."""
    from raygard.cluster.doctor.facts import worker_memory

    stages: dict[Any, dict[str, int]] = dict(worker_memory(config))
    return stages[CASES[name][0]]


def size_of(name: str) -> str:
    """Which model a case takes."""
    return "large" if name.startswith("large") else "unet"


def measured(name: str, folder: Path) -> dict[str, int]:
    """Bytes of each phase on the rank that held most."""
    config, tiny = (configuration(folder / which, name) for which in (size_of(name), "tiny"))
    stage, _, world, _ = CASES[name]
    found = workers.run_world(world, measure, stage, config, tiny)
    return {key: max(rank[key] for rank in found) for key in found[0]}


def saved_elements() -> dict[str, int]:
    """What autograd keeps for one picture of each model that is estimated."""
    from raygard.diffusion.shape import measure_denoiser

    return {name: measure_denoiser(MODELS[name], MODELS[name]["sample_size"]).saved_elements for name in SIZES}


def with_estimate(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A measured case with what the doctor says of it, and how far that is off."""
    terms = estimate(name, configuration(folder / size_of(name), name))
    total = sum(terms.values())
    phases = {key: case[key] for key in ("libraries", *PHASES)}
    return {"estimate": total, "terms": terms, **phases, "off": off(total, phases)}


def off(estimated: int, measured: dict[str, int]) -> float:
    """How far the estimate lies above (+) or below (-) the peak, as a share of the peak."""
    peak = max(measured[phase] for phase in PHASES)
    return round(estimated / peak - 1, 4)


def table(cases: dict[str, Any]) -> str:
    """The table of docs/scaling.md."""
    lines = ["| case | estimate MiB | measured MiB | off |", "|---|---:|---:|---:|"]
    for name, case in cases.items():
        peak = max(case[phase] for phase in PHASES)
        lines.append(f"| {name} | {case['estimate'] / 2**20:.0f} | {peak / 2**20:.0f} | {case['off']:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    cases = json.loads(args.out.read_text(encoding="utf-8"))["cases"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="raygard-") as root:
        folder = Path(root)
        for which, unet in MODELS.items():
            workers.make_model(folder / which, **unet)
        for name in args.only:
            cases[name] = measured(name, folder)
            print(name, json.dumps(cases[name]), flush=True)
        cases = {name: with_estimate(name, folder, cases[name]) for name in CASES if name in cases}
    document = {**workers.machine(), **MODELS, "saved_elements": saved_elements(), "cases": cases}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(cases))


if __name__ == "__main__":
    main()
