"""DeepSpeed around the bilevel optimizer: configuration and shard layout; and checkpoints by DeepSpeed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raygard.bilevel.alternation import DenoiserLoss
from raygard.bilevel.optimizer import MOMENTS, BilevelOptimizer
from raygard.bilevel.segments import ShardLayout
from raygard.bilevel.streamed import StreamedEngine
from raygard.cluster.checkpoint import SavedState, save_state, write_manifest
from raygard.config import BilevelConfig, EngineConfig, ValuesConfig
from raygard.editing import IMMASettings
from raygard.errors import RaygardError

TAG = "state"
PLAIN_LINEAR = torch.nn.functional.linear


def deepspeed_config(
    engine: EngineConfig, settings: BilevelConfig | ValuesConfig | IMMASettings, gradient_clipping: float = 0.0
) -> dict[str, Any]:
    """DeepSpeed's configuration for one sub-group of each parameter group.

    In mask learning, clipping, weight decay and schedules belong to user steps only, so they live in BilevelOptimizer.
    """
    # DeepSpeed wants its three numbers to agree, and takes whatever a rank gives it: shares may be smaller than this.
    micro, accumulation = settings.micro_batch(engine.num_workers), settings.gradient_accumulation_steps
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": False, "round_robin_gradients": False}
    if engine.zero_stage == 3:
        # One sub-group and no persistent small parameters: one flat shard that holds a part of every tensor.
        zero |= {"sub_group_size": int(1e12), "stage3_param_persistence_threshold": 0}
    for part in ("optimizer", "param"):
        if getattr(engine, f"offload_{part}_device") == "cpu":
            zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": engine.use_gpu}
    return {
        "train_batch_size": micro * accumulation * engine.num_workers,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": engine.mixed_precision == "bf16" and engine.zero_stage > 0},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def all_reduce_sum(values: Tensor) -> None:
    # Offloaded shards make their sums in main memory, where NCCL does not reach.
    away = dist.get_backend() == "nccl" and not values.is_cuda
    reduced = values.cuda() if away else values
    dist.all_reduce(reduced, op=dist.ReduceOp.SUM)
    if away:
        values.copy_(reduced)


@dataclass
class Checkpointed:
    """A DeepSpeed engine with DeepSpeed's own checkpoints, which only as many workers can load as wrote them."""

    engine: Any

    def save(self, folder: Path, k: int) -> None:
        """Write this rank's files and a manifest of their hashes. Collective."""
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"k": k}, exclude_frozen_parameters=False)
        dist.barrier()
        write_manifest(folder, k, [file for file in sorted(folder.rglob("*")) if file.is_file()])

    def load(self, folder: Path) -> int:
        """Restore weights and all that the optimizer keeps; return k. Collective."""
        _, client_state = self.engine.load_checkpoint(str(folder), tag=TAG)
        return int(client_state["k"])


@dataclass
class ShardedTraining:
    """An engine whose client optimizer is the bilevel optimizer, bound to its shards."""

    engine: Any
    optimizer: BilevelOptimizer
    theta_pre: Mapping[str, Tensor]

    def save(self, folder: Path, k: int) -> None:
        """Write this rank's part of a checkpoint that any number of workers can go on from (`build`'s `saved`)."""
        optimizer = self.optimizer
        save_state(folder, k, optimizer.layout, optimizer.sharded_state(), optimizer.shared_state())


def build(
    denoiser: nn.Module,
    module: DenoiserLoss,
    optimizer_factory: Any,
    theta_pre: Mapping[str, Tensor],
    theta_ft: Mapping[str, Tensor],
    engine_config: EngineConfig,
    bilevel: BilevelConfig,
    saved: SavedState | None = None,
) -> ShardedTraining:
    """Initialise DeepSpeed and bind the optimizer to this rank's shards. Collective.

    denoiser holds theta_pre on entry. optimizer_factory(params, reduce) returns the BilevelOptimizer. saved: a
    checkpoint to go on from. The process group must exist (Ray Train made it).
    """
    parameters = dict(denoiser.named_parameters())
    named_sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    optimizer: BilevelOptimizer = optimizer_factory(list(parameters.values()), all_reduce_sum)
    soft = optimizer.initial_soft(len(parameters))
    with torch.no_grad():
        for (name, parameter), m in zip(parameters.items(), soft.tolist(), strict=True):
            if saved is not None:
                parameter.copy_(saved.read("theta", name, 0, parameter.numel()).view(parameter.shape))
                continue
            difference = theta_pre[name].float() - theta_ft[name].float()
            parameter.copy_(theta_pre[name].float() - (1 - m) * difference)
    if engine_config.stream_gradients:
        module.to(torch.device("cuda", torch.cuda.current_device()) if engine_config.use_gpu else "cpu")
        if engine_config.mixed_precision == "bf16":
            # As DeepSpeed does it: all of it, also what diffusers would warn about.
            nn.Module.to(denoiser, torch.bfloat16)
        if engine_config.channels_last:
            module.memory_format = torch.channels_last
        shards, layout = list[Tensor](parameters.values()), ShardLayout.dense(named_sizes)
        _bind(optimizer, shards, layout, theta_pre, theta_ft, saved)
        return ShardedTraining(StreamedEngine(module, optimizer), optimizer, theta_pre)
    engine = initialize(module, optimizer, engine_config, deepspeed_config(engine_config, bilevel))
    shards, layout = _find_shards(engine, parameters, named_sizes, engine_config.zero_stage)
    _check_layout(shards, layout, parameters, engine_config.zero_stage)
    _bind(optimizer, shards, layout, theta_pre, theta_ft, saved)
    return ShardedTraining(engine, optimizer, theta_pre)


def _bind(
    optimizer: BilevelOptimizer,
    shards: list[Tensor],
    layout: ShardLayout,
    theta_pre: Mapping[str, Tensor],
    theta_ft: Mapping[str, Tensor],
    saved: SavedState | None,
) -> None:
    optimizer.bind(shards, layout, theta_pre, theta_ft)
    if saved is not None:
        kinds = [kind for kind in ("theta", "theta_d", *MOMENTS) if saved.has(kind)]
        optimizer.restore({kind: saved.fill(kind, layout, shards) for kind in kinds}, saved.shared)


def initialize(
    module: DenoiserLoss,
    optimizer: torch.optim.Optimizer,
    engine_config: EngineConfig,
    config: dict[str, Any],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Any:
    """DeepSpeed's engine around `module`, in the precision of `engine_config`. Collective.

    config: as from `deepspeed_config`. lr_scheduler: makes a scheduler, which is advanced after every step.
    """
    import deepspeed

    # Building the shared-memory collective compiles C++ for a minute and is of no use beside gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 puts its own in the place of this for as long as the process lives; with it gradients round otherwise, and
    # what an engine of another stage computes would depend on whether one of ZeRO-3 came before.
    torch.nn.functional.linear = PLAIN_LINEAR
    if engine_config.channels_last:
        module.memory_format = torch.channels_last
    if engine_config.zero_stage == 0 and engine_config.mixed_precision == "bf16":
        # Without ZeRO, DeepSpeed's bf16 optimizer takes no client optimizer; autocast keeps float32 weights.
        module.autocast = torch.bfloat16
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, lr_scheduler=lr_scheduler, dist_init_required=False
    )
    return engine


def _find_shards(
    engine: Any, parameters: Mapping[str, nn.Parameter], named_sizes: Mapping[str, int], stage: int
) -> tuple[list[Tensor], ShardLayout]:
    """The flat float32 tensors the client optimizer will be stepped with, and what lies in them."""
    if stage == 0:
        return list(parameters.values()), ShardLayout.dense(named_sizes)
    zero = engine.optimizer
    order = {id(parameter): name for name, parameter in parameters.items()}
    if stage == 3:
        if len(zero.fp32_partitioned_groups_flat) != 1:
            raise RaygardError("ZeRO-3 made several sub-groups; raise zero_optimization.sub_group_size above the model")
        params = zero.fp16_groups[0]
        assert [order[id(p)] for p in params] == list(named_sizes)
        layout = ShardLayout.partitioned(named_sizes, [p.partition_numel() for p in params], dist.get_rank())
        return [zero.fp32_partitioned_groups_flat[0]], layout
    params, offsets = zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0]
    assert [order[id(p)] for p in params] == list(named_sizes)
    shard = zero.single_partition_of_fp32_groups[0]
    start = dist.get_rank() * zero.partition_size[0]
    return [shard], ShardLayout.flat_slice(named_sizes, offsets, start, shard.numel())


def _check_layout(shards: list[Tensor], layout: ShardLayout, full: Mapping[str, nn.Parameter], stage: int) -> None:
    # A silent change of DeepSpeed's internal order would scramble the mask, so the layout is proven on the values.
    context: Any = contextlib.nullcontext()
    if stage == 3:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(list(full.values()), modifier_rank=None)
    with context:
        values = {name: parameter.detach().float().cpu().clone() for name, parameter in full.items()}
    for name, (start, piece) in layout.pieces(shards).items():
        expected = values[name].reshape(-1)[start : start + len(piece)]
        if not torch.equal(expected, piece.float()):
            raise RaygardError(f"this DeepSpeed release lays out '{name}' differently than raygard knows; use 0.19")


def cpu_environment() -> None:
    """DeepSpeed on a machine without accelerator; must run before deepspeed is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
