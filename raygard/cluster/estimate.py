"""Memory and time of a run's training on GPUs that are not there yet: `raygard estimate`.

Memory is the doctor's arithmetic (`raygard.cluster.doctor`). Time is arithmetic too: operations of forward and
backward at a share of the GPU's peak, and the collectives of a step, as they were counted on real runs
(docs/scaling.md), over the slowest link between the ranks, none of them hidden behind compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raygard.cluster.doctor.memory import (
    BF16,
    CUDA_CONTEXT,
    FP32,
    GIB,
    MAX_LIVE,
    TrainStage,
    ZeroStage,
    describe_memory,
)
from raygard.config import EngineConfig, RunConfig
from raygard.errors import RaygardError, nearest

GPUS_PER_NODE = 8
# A backward pass costs two forward ones; recomputing under gradient checkpointing costs one more.
PASSES, RECOMPUTED = 3, 1
# SD 2's UNet at 512 px on 8 A100s, 290 pictures a second (mosaicml/diffusion, README.md), by operations counted here:
# the share of the peak that a real training run reached. The same share is assumed of every GPU.
UTILISATION = 0.28
# Payload of a user step's collectives by ZeRO stage, in model sizes (benchmarks/scaling.py counted them): DeepSpeed
# 0.19 reduces whole buckets at stages 1 and 2, and gathers the weights after the step.
PAYLOADS: Mapping[ZeroStage, Mapping[str, float]] = {
    0: {"all-reduce": 1.0},
    1: {"all-reduce": 1.0, "all-gather": 1.0},
    2: {"all-reduce": 1.0, "all-gather": 1.0},
    3: {"reduce-scatter": 1.0, "all-gather": 1.0},
}


@dataclass(frozen=True)
class Gpu:
    """memory_bytes. flops: dense matrix products a second, in bf16 and in float32.

    fp32_flops: without TF32 units, which torch takes for convolutions and leaves out of other products.
    link_bytes: a second, one direction, between the GPUs of a node; network_bytes: between nodes, for each GPU.
    """

    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    link_bytes: float
    network_bytes: float


# NVIDIA's data sheets, without sparsity; nodes of 8 GPUs with one 400 (A100: 200) Gb/s card for each.
GPUS = {
    "H200": Gpu(141e9, 989e12, 67e12, 450e9, 50e9),
    "H100": Gpu(80e9, 989e12, 67e12, 450e9, 50e9),
    "A100": Gpu(80e9, 312e12, 19.5e12, 300e9, 25e9),
    "A100-40GB": Gpu(40e9, 312e12, 19.5e12, 300e9, 25e9),
}


def named_gpu(name: str) -> Gpu:
    """Raises RaygardError for an unknown kind."""
    if name not in GPUS:
        raise RaygardError(f"unknown GPU '{name}'{nearest(name, GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class StageEstimate:
    """One training stage on each GPU. compute_s, communication_s: of a user step. steps: user and publisher steps."""

    memory: Mapping[str, int]
    compute_s: float
    communication_s: float
    steps: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of all steps; a publisher step costs what a user step does (docs/scaling.md)."""
        return self.steps * (self.compute_s + self.communication_s)


def sent(kind: str, payload: float, world: int) -> float:
    """Bytes each of `world` ranks sends for a payload, by the ring algorithms (Patarasuk and Yuan 2009)."""
    once = payload * (world - 1) / world
    return {"all-reduce": 2 * once, "barrier": 0.0}.get(kind, once)


def sent_in_a_step(
    payloads: Mapping[str, float], num_params: int, zero_stage: ZeroStage, half: bool, world: int
) -> float:
    """Bytes one rank sends in a step. payloads: of each kind of collective, in model sizes."""
    # Without ZeRO, bf16 is autocast over float32 weights, and gradients are float32.
    size = num_params * (BF16 if half and zero_stage else FP32)
    # The model that was counted stays gathered from the forward pass to the backward one.
    again = {"all-gather": 2} if zero_stage == 3 and num_params > MAX_LIVE else {}
    return sum(sent(kind, share * size * again.get(kind, 1), world) for kind, share in payloads.items())


def compute_seconds(
    flops: float, pictures: int, checkpointing: bool, peak: float, utilisation: float = UTILISATION
) -> float:
    """Forward and backward of so many pictures. flops: of one forward pass of one. peak: of the GPU, a second."""
    return pictures * flops * (PASSES + RECOMPUTED * checkpointing) / (utilisation * peak)


def communication_seconds(engine: EngineConfig, gpu: Gpu, num_params: int) -> float:
    """The collectives of a user step at full bandwidth of the slowest link, none of them hidden by compute."""
    half = engine.mixed_precision == "bf16"
    bytes_sent = sent_in_a_step(PAYLOADS[engine.zero_stage], num_params, engine.zero_stage, half, engine.num_workers)
    return bytes_sent / (gpu.link_bytes if engine.num_workers <= GPUS_PER_NODE else gpu.network_bytes)


def estimate_run(config: RunConfig, gpu: Gpu) -> dict[TrainStage, StageEstimate]:
    """Every training stage of a run on this kind of GPU. Raises RaygardError if the model's shape cannot be found."""
    from raygard.cluster.doctor.facts import worker_memory
    from raygard.diffusion.shape import denoiser_config, family_of, forward_flops, latent_side, meta_denoiser

    config = config.model_copy(update={"engine": config.engine.model_copy(update={"use_gpu": True})})
    engine, b, values = config.engine, config.bilevel, config.values
    content, family = denoiser_config(config.model), family_of(config.model)
    side = latent_side(content, config.model, config.domain.resolution)
    # Comes first, because it says in words why a denoiser cannot be run.
    needed = worker_memory(config)
    denoiser = meta_denoiser(family, content)
    flops = forward_flops(family, denoiser, side)
    peak = gpu.bf16_flops if engine.mixed_precision == "bf16" else gpu.fp32_flops
    communication = communication_seconds(engine, gpu, sum(parameter.numel() for parameter in denoiser.parameters()))
    # The step waits for the rank with most pictures.
    pictures = {
        name: settings.micro_batch(engine.num_workers) * settings.gradient_accumulation_steps
        for name, settings in (("relearn", b), ("learn", b), ("values", values))
    }
    masks = len(config.evaluation.mask_seeds)
    steps = {
        "relearn": config.relearn.max_train_steps,
        "learn": b.publisher_steps * (b.inner_steps + 1) * masks,
        "values": values.max_train_steps * masks,
    }
    found: dict[TrainStage, StageEstimate] = {}
    for stage, memory in needed.items():
        if stage not in steps:
            continue
        compute = compute_seconds(flops, pictures[stage], engine.gradient_checkpointing, peak)
        found[stage] = StageEstimate({**memory, "CUDA context": CUDA_CONTEXT}, compute, communication, steps[stage])
    return found


def fits(found: Mapping[TrainStage, StageEstimate], gpu: Gpu) -> bool:
    return all(stage.memory_bytes <= gpu.memory_bytes for stage in found.values())


def to_json(found: Mapping[TrainStage, StageEstimate], gpu: Gpu) -> dict[str, Any]:
    stages = {
        name: {
            "memory_bytes": stage.memory_bytes,
            "memory": dict(stage.memory),
            "compute_s": stage.compute_s,
            "communication_s": stage.communication_s,
            "steps": stage.steps,
            "seconds": stage.seconds,
        }
        for name, stage in found.items()
    }
    return {"fits": fits(found, gpu), "gpu_memory_bytes": gpu.memory_bytes, "stages": stages}


def to_text(found: Mapping[TrainStage, StageEstimate], name: str) -> str:
    """Two lines for each stage, and what the numbers rest on."""
    gpu = GPUS[name]
    lines = []
    for stage, each in found.items():
        share = each.memory_bytes / gpu.memory_bytes
        lines += [
            f"{stage:<8} {each.memory_bytes / GIB:5.1f} GiB, {share:.0%} of one {name}"
            f"{' (does not fit)' if share > 1 else ''}; user step {each.compute_s:.3g} s + "
            f"{each.communication_s:.2g} s sending; {each.steps} steps in {duration(each.seconds)}",
            f"{'':<8} {describe_memory(dict(each.memory))}",
        ]
    lines.append(
        f"By arithmetic: {UTILISATION:.0%} of the GPU's peak, sending at full bandwidth and not hidden; without users, "
        f"pictures and scores. Nothing of it was measured on an actual {name} (docs/scaling.md)."
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `14 min`, `35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
