"""The function every Ray Train worker runs: relearning or mask learning on its shard."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from raygard.bilevel.alternation import DenoiserLoss, Schedule, StepRecord, alternate
from raygard.bilevel.batches import BatchSource
from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.bilevel.rules import RULES, Rule, RuleSettings, make_rule, read_off
from raygard.cluster.checkpoint import SavedState, first_whole, read_manifest
from raygard.cluster.engine import Checkpointed, ShardedTraining, build, cpu_environment
from raygard.config import EngineConfig, RunConfig
from raygard.diffusion.cache import LatentSet, load_cache
from raygard.diffusion.model import load_denoiser, load_loss
from raygard.errors import RaygardError
from raygard.files import readable_disk_errors, scratch, write_text
from raygard.mask.soft import select_frozen

log = logging.getLogger("raygard")

DEFAULT_SPARSITY_WEIGHT = 5e3
# Relearning has no publisher steps; its checkpoints come at the rhythm of the paper's L = 10.
RELEARN_STEPS_PER_UNIT = 10
# Ray Train's place for checkpoints in a stage's folder.
STORAGE, RUN_NAME = "ray", "train"
# Of the folders that DeepSpeed's state lies in until Ray Train has copied it.
UNFINISHED = "rank-"
LOGITS, PARTS = "logits.safetensors", "parts"


def train_worker(job: dict[str, Any]) -> None:
    """Relearn or learn a mask (`job["stage"]`), resuming from Ray Train's last whole checkpoint.

    job: config (RunConfig as JSON), stage "relearn" | "learn", cache, out (stage folder on shared storage),
    relearned (file, stage "learn" only), mask_seed.
    Outputs: history.jsonl (rank 0), parts/rank-*.safetensors (relearn) or logits.safetensors (learn).
    """
    import ray.train
    import ray.train.collective

    config, rank, world_size = begin(job)
    relearning = job["stage"] == "relearn"
    out = Path(job["out"])

    training, sizes, first_k = set_up(config, job, relearning, last_checkpoint(out))
    optimizer = training.optimizer
    sources = batch_sources(config, load_cache(Path(job["cache"])), relearning, int(job["mask_seed"]))
    schedule = make_schedule(config, relearning, rank, world_size)
    history = History(out / "history.jsonl", first_k) if rank == 0 else None
    device = training.engine.device
    unit = RELEARN_STEPS_PER_UNIT if relearning else 1
    every = config.engine.checkpointing_steps * unit
    last_k = schedule.publisher_steps - 1
    notice = Notice()
    # A step repeated after a torn checkpoint must not be kept, and one day deleted, under the torn one's name.
    attempt = ray.train.collective.broadcast_from_rank_zero(secrets.token_hex(4))

    pending: list[StepRecord] = []
    for record in alternate(training.engine, optimizer, *sources, schedule, first_k=first_k, device=device):
        pending.append(record)
        k = record.k
        if not (record.kind == "publisher" or relearning):
            continue
        rows = _average(pending, device)
        extra = {} if relearning else _mask_metrics(config, optimizer, sizes)
        pending.clear()
        if history is not None:
            history.write(rows, extra)
        noticed = (k + 1) % unit == 0 and notice.arrived()
        if noticed or (k + 1) % every == 0 or k == last_k:
            extra["invariant_error"] = optimizer.invariant_error(training.theta_pre)
            # Straight to its place: a copy of every checkpoint would cost its time again, and a killed worker would
            # leave its half behind.
            folder = out / STORAGE / RUN_NAME / f"checkpoint_{k + 1:08d}_{attempt}"
            training.save(folder, k + 1)
            ray.train.report(
                {"k": k + 1, **rows[-1], **extra},
                checkpoint=ray.train.Checkpoint.from_directory(folder.resolve()),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )
    _write_result(training, out, rank, relearning)


def set_up(
    config: RunConfig, job: dict[str, Any], relearning: bool, checkpoint: Path | None = None
) -> tuple[ShardedTraining, Tensor, int]:
    """This rank's engine, the sizes of the model's tensors, int64 (N,), and the step to go on from. Collective.

    job: relearned and mask_seed, as for `train_worker`; not read when relearning. checkpoint: a whole one to go on
    from.
    """
    denoiser = load_denoiser(config.model)
    prepare(denoiser, config.engine)
    theta_pre = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    theta_ft = theta_pre if relearning else load_file(job["relearned"])
    sizes = torch.tensor([parameter.numel() for parameter in theta_pre.values()])
    b = config.bilevel
    loss = load_loss(config.model, b.snr_gamma)

    def factory(params: Iterable[Tensor], reduce: Callable[[Tensor], None]) -> BilevelOptimizer:
        rule = None if relearning else make_rule(config.mask.rule, rule_settings(config, sizes, job["mask_seed"]))
        return make_optimizer(config, params, rule, reduce)

    arguments = denoiser, DenoiserLoss(denoiser, loss), factory, theta_pre, theta_ft, config.engine, b
    if checkpoint is None:
        return build(*arguments), sizes, 0
    with SavedState(checkpoint) as saved:
        if saved.world_size != dist.get_world_size() and dist.get_rank() == 0:
            log.warning(
                "%s was written by %d workers and goes on with %d: logits, theta_d and the optimizer's moments are "
                "carried over exactly; from here on float sums are grouped otherwise",
                checkpoint.name, saved.world_size, dist.get_world_size(),
            )  # fmt: skip
        return build(*arguments, saved), sizes, saved.k


def prepare(denoiser: Any, engine: EngineConfig) -> None:
    """Put a denoiser that DeepSpeed has not seen yet into training mode, as `engine` asks for it.

    Raises RaygardError if there is nothing in it that `engine.compile` could compile.
    """
    if engine.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if engine.compile:
        compile_blocks(denoiser)
    denoiser.train()


def compile_blocks(denoiser: Any) -> None:
    """torch.compile of each repeated block, when it is first called. Raises RaygardError if there is none."""
    # diffusers' compile_repeated_blocks, which knows the blocks of all denoisers here but SD3's.
    names = denoiser._repeated_blocks or ["JointTransformerBlock"]
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise RaygardError(f"engine.compile finds no {' or '.join(names)} in this model's denoiser; set it to false")
    for block in blocks:
        block.compile()


def make_optimizer(
    config: RunConfig, params: Iterable[Tensor], rule: Rule | None, reduce: Callable[[Tensor], None] | None = None
) -> BilevelOptimizer:
    """The optimizer `bilevel.*` asks for; without a rule that of relearning."""
    b = config.bilevel
    return BilevelOptimizer(
        params,
        rule=rule,
        user_optimizer="adamw" if rule is None else b.user_optimizer,
        lr=config.relearn.learning_rate if rule is None else b.user_lr,
        betas=(b.adam_beta1, b.adam_beta2),
        eps=b.adam_epsilon,
        weight_decay=b.adam_weight_decay,
        max_grad_norm=b.max_grad_norm,
        reduce=reduce,
        theta_d_dtype=getattr(torch, config.engine.theta_d_dtype),
        theta_d_on_host=config.engine.theta_d_device == "cpu",
    )


def rule_settings(config: RunConfig, sizes: Tensor, mask_seed: int) -> RuleSettings:
    """Settings of the update rule for a model whose tensors have `sizes` elements."""
    mask = config.mask
    return RuleSettings(
        num_tensors=len(sizes),
        freeze_ratio=mask.freeze_ratio,
        temperature=mask.temperature,
        mask_lr=RULES[mask.rule].default_mask_lr if mask.mask_lr is None else mask.mask_lr,
        sparsity_weight=DEFAULT_SPARSITY_WEIGHT if mask.sparsity_weight is None else mask.sparsity_weight,
        weights=sizes.double() if mask.budget == "params" else None,
        seed=mask_seed,
        draw_ratios=mask.draw_ratios,
    )


def batch_sources(
    config: RunConfig, data: LatentSet, relearning: bool, mask_seed: int
) -> tuple[BatchSource, BatchSource | None]:
    """Lower and upper batches; relearning has no upper ones."""
    b = config.bilevel
    num_timesteps = load_loss(config.model, b.snr_gamma).num_timesteps

    def source(part: str, stream: str, seed: int) -> BatchSource:
        roles = [[data.rows(cls, part) for cls in classes] for classes in (config.domain.illegal, config.domain.legal)]
        return BatchSource(data, roles[0], roles[1], b.train_batch_size, seed, stream, num_timesteps)

    if relearning:
        return source("learn_lower", "relearn", config.seed), None
    upper_part = RULES[config.mask.rule].upper_part
    return source("learn_lower", "lower", mask_seed), source(upper_part, "upper", mask_seed)


def make_schedule(config: RunConfig, relearning: bool, rank: int, world_size: int) -> Schedule:
    """How many steps of which kind this rank takes."""
    b = config.bilevel
    # Relearning must not depend on L, so that trials with different L share it: one user step a round.
    inner, rounds = (1, config.relearn.max_train_steps) if relearning else (b.inner_steps, b.publisher_steps)
    # What is relearned takes no publisher step, and its mask may be of a rule without an upper loss.
    weighs = relearning or RULES[config.mask.rule].weighs_losses
    weights = (b.illegal_weight, b.legal_weight) if weighs else (1.0, 0.0)
    return Schedule(inner, rounds, *weights, b.gradient_accumulation_steps, rank, world_size)


def begin(job: dict[str, Any]) -> tuple[RunConfig, int, int]:
    """Make this Ray Train worker's process ready; `job`'s configuration, rank and world size.

    The configuration's number of workers is the one there is, which an elastic run does not know before.
    """
    import ray.train

    config = RunConfig.model_validate(job["config"])
    torch.set_num_threads(config.engine.torch_threads)
    if not config.engine.use_gpu:
        cpu_environment()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    engine = config.engine.model_copy(update={"num_workers": world_size, "min_workers": None})
    return config.model_copy(update={"engine": engine}), rank, world_size


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of the stage in `out` that is whole, None at the start. Collective.

    That may be one whose report was under way when the workers were lost, of which Ray Train knows nothing. What it
    does not know and is not whole, a killed attempt's half, is removed, and so is state that was never handed to it.
    Raises RaygardError if there are checkpoints and none is whole.
    """
    import ray.train
    import ray.train.collective
    import ray.train.torch

    storage = (out / STORAGE / RUN_NAME).resolve()
    names = sorted((path.name for path in storage.glob("checkpoint_*") if path.is_dir()), reverse=True)
    names = ray.train.collective.broadcast_from_rank_zero(names)
    known = ray.train.get_checkpoint()
    found = first_whole([storage / name for name in names], ray.train.torch.get_device())
    if found is None and known is not None:
        raise RaygardError(f"no usable checkpoint in {storage}; remove the folder to start over")
    if dist.get_rank() == 0:
        for name in names:
            if (found is None or name > found.name) and (known is None or name > Path(known.path).name):
                shutil.rmtree(storage / name)
        # No rank reports before rank 0 takes a step with it.
        for unfinished in (out / STORAGE).glob(f"{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    return found


def load_engine(training: Checkpointed, out: Path, what: str) -> int:
    """Go on from the newest whole checkpoint of DeepSpeed's own form; the finished steps, 0 without one. Collective.

    Only as many workers as wrote it can take it on; others start anew and say so. what: the words for what does.
    """
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        return 0
    writers = int(read_manifest(checkpoint)["world_size"])
    if writers != dist.get_world_size():
        if dist.get_rank() == 0:
            log.warning(
                "%s starts anew: the optimizer's state in %s is divided among %d workers, now there are %d",
                what, checkpoint.name, writers, dist.get_world_size(),
            )  # fmt: skip
        return 0
    return training.load(checkpoint)


def report_engine(training: Checkpointed, out: Path, done: int, row: dict[str, Any]) -> None:
    """Save DeepSpeed's state after `done` steps as a checkpoint of Ray Train, with a line of history. Collective."""
    import ray.train

    # Where the next start, or the stage's end, removes what a killed worker left.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out / STORAGE) as folder:
        training.save(Path(folder), done)
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Notice:
    """Whether a node of this run is about to be taken away; told once, so that one more checkpoint is written."""

    def __init__(self) -> None:
        self._told = False

    def arrived(self) -> bool:
        """Collective: every rank hears the same at the same call."""
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None or self._told:
            return False
        self._told = True
        if dist.get_rank() == 0:
            log.warning("ranks %s are about to lose their node; writing a checkpoint now", info.preempted_ranks)
        return True


def _average(records: list[StepRecord], device: torch.device) -> list[dict[str, Any]]:
    """Mean of the losses over ranks, one row a step. Collective."""
    losses = torch.tensor([[r.illegal_loss, r.legal_loss] for r in records], dtype=torch.float64, device=device)
    dist.all_reduce(losses)
    means = (losses / dist.get_world_size()).tolist()
    return [
        {"kind": r.kind, "k": r.k, "l": r.l, "step": r.step, "illegal_loss": ill, "legal_loss": leg}
        for r, (ill, leg) in zip(records, means, strict=True)
    ]


def _mask_metrics(config: RunConfig, optimizer: BilevelOptimizer, sizes: Tensor) -> dict[str, float]:
    logits, soft = read_off(config.mask, optimizer.logits, optimizer.soft, sizes)
    frozen = select_frozen(logits, sizes, config.mask.freeze_ratio, config.mask.budget)
    return {
        "soft_mean": float(soft.mean()),
        "frozen_by_count": float(frozen.double().mean()),
        "frozen_by_params": float(sizes[frozen].sum() / sizes.sum()),
        "rounding_gap": float((soft - frozen.double()).abs().mean()),
        "signal_norm": optimizer.last["signal_norm"],
        "theta_d_norm": optimizer.theta_d_norm(),
    }


class History:
    """history.jsonl on shared storage; a resumed run drops what lies beyond its checkpoint."""

    def __init__(self, path: Path, first_k: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["k"] < first_k:
                        kept.append(line + "\n")
                except ValueError:
                    break
        write_text(path, "".join(kept))

    def write(self, rows: list[dict[str, Any]], extra: dict[str, float]) -> None:
        lines = [json.dumps(row if row is not rows[-1] else {**row, **extra}) + "\n" for row in rows]
        with readable_disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))


def _write_result(training: ShardedTraining, out: Path, rank: int, relearning: bool) -> None:
    optimizer = training.optimizer
    if not relearning:
        if rank == 0:
            arrays = {"logits": optimizer.logits.contiguous(), "soft": optimizer.soft.contiguous()}
            save_tensors(arrays, out / LOGITS)
        return
    arrays = {}
    for name, (start, values) in optimizer.layout.pieces(optimizer.theta()).items():
        arrays[f"{start}:{name}"] = values.contiguous()
    save_tensors(arrays, out / PARTS / f"rank-{rank:05d}.safetensors")


def save_tensors(arrays: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all. Raises RaygardError if the disk is full."""
    with scratch(path) as unfinished:
        save_file(arrays, str(unfinished))
