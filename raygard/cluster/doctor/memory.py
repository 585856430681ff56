"""How much memory one worker of a training stage needs, as arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raygard.config import EngineConfig

GIB = 1024**3
FP32, BF16 = 4, 2
# DeepSpeed's defaults, in elements: the buffer that gradients are reduced in, and what ZeRO-3 may keep gathered.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
NOT_COVERED = (
    "not covered: NCCL's buffers, workspaces of convolutions, fragmentation, short-lived temporaries, and evaluation "
    "actors that share the device"
)
# What the CUDA context and its libraries take of a GPU, and Python's libraries of main memory (benchmarks/memory.py).
CUDA_CONTEXT = 1 * GIB
LIBRARIES = 700 * 1024**2
TrainStage = Literal["relearn", "learn", "values", "imma"]
# Those that keep no theta_d: the denoiser itself is trained, or a part of it.
PLAIN = ("values", "imma")
ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Placement:
    """What does not lie on the worker's device as it would without options of `engine`.

    theta_d_bytes: of one element there. no_optimizer, no_weights: they are in main memory, but for what is gathered.
    streamed: gradients are used as they arrive.
    """

    theta_d_bytes: int = FP32
    no_optimizer: bool = False
    no_weights: bool = False
    streamed: bool = False

    @classmethod
    def of(cls, engine: EngineConfig) -> Placement:
        size = BF16 if engine.theta_d_dtype == "bfloat16" else FP32
        if not engine.use_gpu:
            return cls(size, streamed=engine.stream_gradients)
        off = engine.offload_optimizer_device == "cpu"
        away = off or engine.theta_d_device == "cpu"
        return cls(0 if away else size, off, engine.offload_param_device == "cpu", engine.stream_gradients)


def estimate_memory(
    num_params: int,
    *,
    stage: TrainStage,
    num_trained: int,
    largest: int,
    zero_stage: ZeroStage,
    num_workers: int,
    mixed_precision: Literal["no", "bf16"],
    adam: bool,
    samples_per_worker: int,
    saved_elements: int,
    accumulates: bool,
    host: bool,
    placement: Placement = Placement(),
) -> dict[str, int]:
    """Bytes of each thing that lies in one worker's memory at the peak of a training step.

    num_params: of the denoiser; num_trained: of them with a gradient, fewer than all in PLAIN stages only. largest:
    of one tensor. adam: whether the optimizer keeps moments, as all do but a simulated user's SGD. samples_per_worker:
    pictures of one backward pass. saved_elements: what autograd keeps for one of them. accumulates: several backward
    passes make a step. host: the device is the CPU, where theta_pre lies as well; beside a GPU it stays in main memory.
    What is not covered: NOT_COVERED. From how `raygard.cluster.engine` sets DeepSpeed 0.19 up: flat shards in float32,
    theta_d and Adam's moments beside them; without ZeRO, bf16 is autocast over float32 weights. docs/scaling.md has
    measured memory beside it.
    """
    sharded = zero_stage > 0
    half = mixed_precision == "bf16"
    stored = BF16 if half and sharded else FP32
    workers = num_workers if sharded else 1
    shard = -(-num_trained // workers)
    standing = {"weights": (-(-num_params // workers) if zero_stage == 3 else num_params) * stored}
    if placement.no_weights:
        standing["weights"] = 0
    if stage not in PLAIN:
        standing["theta_d"] = shard * placement.theta_d_bytes
    if sharded and not placement.no_optimizer:
        standing["float32 shard"] = shard * FP32
    if adam and not placement.no_optimizer:
        standing["Adam's moments"] = 2 * shard * FP32
    if stage == "values":
        standing["the release"] = num_params * stored
    if host and stage not in PLAIN:
        standing["theta_pre"] = num_params * FP32
    if host and stage in PLAIN and zero_stage in (1, 2) and stored == FP32:
        # Weights are mapped from their file as one piece, which stays while a tensor that is not trained lies in it.
        standing["mapped originals"] = num_trained * FP32
    activations = samples_per_worker * saved_elements * (BF16 if half else FP32)
    # DeepSpeed gathers gradients in a bucket and flattens its content once more to send it. Main memory is taken as it
    # is written to, a GPU's at once.
    sent = min(REDUCE_BUCKET, num_trained) * stored
    bucket = sent if host else REDUCE_BUCKET * stored
    gradients = (shard if zero_stage >= 2 else num_trained) * stored
    step = {"flat gradient": shard * FP32, "Adam's temporary": shard * FP32 if adam else 0}
    if placement.no_optimizer:
        # Gradients follow it as they are reduced.
        gradients, step = 0, {}
    # A backward pass frees activations while it makes gradients: these are its beginning, its middle (half of the
    # activations belong to the half of the network that comes first), its end, and the optimizer's step.
    # Autocast keeps what it has made of the weights until the backward pass has been there.
    cast = num_params * BF16 if half else 0
    if placement.streamed and stage not in PLAIN:
        # A gradient, and in float32 what a step makes of it, of the weights and of theta_d.
        one = {"gradients": largest * (BF16 if half else FP32), "temporaries": (4 if half else 2) * largest * FP32}
        moments = [{"activations": activations, **one}]
    elif zero_stage == 0:
        moments = [
            {"activations": activations, "weights in bf16": cast, "gradients": gradients if accumulates else 0},
            {"activations": activations // 2, "weights in bf16": cast // 2, "gradients": gradients},
            {"gradients": gradients, "reduce copy": sent},
            {"gradients": gradients, "Adam's temporary": largest * FP32 if adam else 0},
        ]
    elif zero_stage < 3:
        # What is reduced waits for the step, unless one bucket holds all of it.
        kept = {"gradients": gradients if accumulates or num_trained > REDUCE_BUCKET else 0}
        first = {"reduce buffer": 0 if host else bucket, **(kept if accumulates else {})}
        moments = [
            {"activations": activations, **first},
            {"activations": activations // 2, "reduce buffer": bucket, **kept},
            {"reduce buffer": bucket, "reduce copy": sent, **kept},
            step,
        ]
    else:
        standing |= {"gradients": gradients, "reduce buffer": bucket}
        gathered = {"gathered weights": min(num_params, MAX_LIVE) * stored}
        moments = [
            {"activations": activations, **gathered},
            {"activations": activations // 2, "reduce copy": sent, **gathered},
            step,
        ]
    return standing | max(moments, key=lambda part: sum(part.values()))


def most_trained(sizes: Sequence[int], freeze_ratio: float, budget: Literal["count", "params"]) -> int:
    """The most elements that a mask of this budget can freeze, and stage "values" train. sizes: of the N tensors."""
    if budget == "params":
        return round(freeze_ratio * sum(sizes))
    return sum(sorted(sizes, reverse=True)[: round(freeze_ratio * len(sizes))])


def describe_memory(terms: dict[str, int]) -> str:
    """`9.1 GiB = weights 3.2 + ...`, largest first; what rounds to nothing is left out."""
    parts = sorted(terms.items(), key=lambda term: -term[1])
    said = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size / GIB >= 0.05)
    return f"{sum(terms.values()) / GIB:.1f} GiB" + (f" = {said}" if said else "")
