"""How much memory one worker of a mask-learning run needs, as arithmetic."""

from __future__ import annotations

from typing import Literal

GIB = 1024**3
FP32, BF16 = 4, 2
# DeepSpeed's defaults, in elements: the buffer that gradients are reduced in, and what ZeRO-3 may keep gathered.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
NOT_COVERED = (
    "not covered: the CUDA context and libraries (about 1 GiB), NCCL's buffers, workspaces of convolutions, "
    "fragmentation, short-lived temporaries, and evaluation actors that share the device"
)


def estimate_memory(
    num_params: int,
    *,
    zero_stage: Literal[0, 1, 2, 3],
    num_workers: int,
    mixed_precision: Literal["no", "bf16"],
    user_optimizer: Literal["sgd", "adamw"],
    samples_per_worker: int,
    saved_elements: int,
    host: bool,
) -> dict[str, int]:
    """Bytes of each thing that lies in one worker's memory at the peak of a mask-learning step.

    num_params: of the denoiser. samples_per_worker: pictures of one backward pass. saved_elements: what autograd keeps
    for one of them. host: the device is the CPU, where theta_pre and theta_ft lie as well; beside a GPU they stay in
    main memory. What is not covered: NOT_COVERED. From how `raygard.cluster.engine` sets DeepSpeed 0.19 up: flat
    shards in float32, theta_d and Adam's moments beside them; without ZeRO, bf16 is autocast over float32 weights.
    """
    sharded = zero_stage > 0
    half = mixed_precision == "bf16"
    stored = BF16 if half and sharded else FP32
    shard = -(-num_params // num_workers) if sharded else num_params
    terms = {
        "weights": (shard if zero_stage == 3 else num_params) * stored,
        "gradients": (shard if zero_stage >= 2 else num_params) * stored,
        "theta_d": shard * FP32,
    }
    backward = {"activations": samples_per_worker * saved_elements * (BF16 if half else FP32)}
    step = {}
    if sharded:
        terms["float32 shard"] = shard * FP32
        # Main memory is taken as it is written to, a GPU's at once.
        backward["reduce buffer"] = (min(REDUCE_BUCKET, num_params) if host else REDUCE_BUCKET) * stored
        step["flat gradient"] = shard * FP32
    if zero_stage == 3:
        backward["gathered weights"] = min(num_params, MAX_LIVE) * stored
    if user_optimizer == "adamw":
        terms["Adam's moments"] = 2 * shard * FP32
        step["Adam's temporary"] = shard * FP32
    if host:
        terms["theta_pre and theta_ft"] = 2 * num_params * FP32
    # What a backward pass needs is free again when the optimizer steps.
    return terms | max(backward, step, key=lambda part: sum(part.values()))


def describe_memory(terms: dict[str, int]) -> str:
    """`9.1 GiB = weights 3.2 + ...`, largest first; what rounds to nothing is left out."""
    parts = sorted(terms.items(), key=lambda term: -term[1])
    said = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size / GIB >= 0.05)
    return f"{sum(terms.values()) / GIB:.1f} GiB" + (f" = {said}" if said else "")
