"""Run in real processes by test_sharded.py: one rank of a gloo world, several ZeRO stages in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from raygard.cluster.engine import cpu_environment

cpu_environment()

from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, Schedule, alternate  # noqa: E402
from raygard.bilevel.batches import BatchSource  # noqa: E402
from raygard.bilevel.optimizer import BilevelOptimizer  # noqa: E402
from raygard.bilevel.rules import RuleSettings, make_rule  # noqa: E402
from raygard.bilevel.segments import ShardLayout  # noqa: E402
from raygard.cluster.checkpoint import SavedState, first_whole  # noqa: E402
from raygard.cluster.engine import ShardedTraining, build  # noqa: E402
from raygard.config import BilevelConfig, EngineConfig  # noqa: E402
from raygard.config_file import load_config  # noqa: E402
from raygard.diffusion.cache import build_cache, load_cache  # noqa: E402
from raygard.diffusion.model import load_denoiser, load_loss  # noqa: E402
from raygard.domain import load_domain  # noqa: E402

GLOBAL_BATCH, INNER, ROUNDS = 16, 2, 6
# Plans whose batches are kept: what the engine's module was called with.
WATCHED = ("sgd3", "accum2")
# Named in a plan in place of a number of micro-batches.
OPTIONS = {
    "offload": {"offload_optimizer_device": "cpu"},
    "offload-all": {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    "host": {"theta_d_device": "cpu"},
    "channels-last": {"channels_last": True},
}


def make_root(root: Path, make_model: Callable[..., Path], make_pictures: Callable[..., Path]) -> Path:
    """A model in `root / "sd"` and its cache of four classes' pictures, which every run reads."""
    make_model(root / "sd")
    data = make_pictures(root / "data", dict.fromkeys("abcd", 48))
    names = [f"domain.data={data}", f"model.pretrained_model_name_or_path={root / 'sd'}", "domain.resolution=16"]
    config = load_config(None, [*names, "domain.illegal=[a,b]", "domain.legal=[c,d]"])
    parts = [(cls, "learn_lower") for cls in "abcd"]
    build_cache(config.model, config.domain, load_domain(config.domain).view("learn"), parts, root / "cache")
    return root


def setting(root: Path, user_optimizer: str, seed: int = 0):
    """Model, batches and optimizer factory shared by the dense reference and the sharded runs."""
    from raygard.config import ModelConfig

    model = ModelConfig(pretrained_model_name_or_path=str(root / "sd"))
    unet = load_denoiser(model).train()
    pre = {name: p.detach().clone() for name, p in unet.named_parameters()}
    rng = torch.Generator().manual_seed(7)
    ft = {name: p + 0.02 * torch.randn(p.shape, generator=rng) for name, p in pre.items()}
    data = load_cache(next((root / "cache").iterdir()))
    roles = [[data.rows(cls, "learn_lower") for cls in classes] for classes in (("a", "b"), ("c", "d"))]
    sources = [BatchSource(data, roles[0], roles[1], GLOBAL_BATCH, seed, stream) for stream in ("lower", "upper")]
    sizes = torch.tensor([p.numel() for p in pre.values()])

    def factory(params, reduce=None):
        rule = make_rule("budget", RuleSettings(len(sizes), 0.3, 0.2, 0.05, 0.0, None, seed))
        lr = 1e-3 if user_optimizer == "adamw" else 1e-2
        return BilevelOptimizer(
            params, rule=rule, user_optimizer=user_optimizer, lr=lr, max_grad_norm=1.0, reduce=reduce
        )

    return unet, DenoiserLoss(unet, load_loss(model)), pre, ft, sources, factory


def watch(module: DenoiserLoss) -> list[tuple[torch.Tensor, ...]]:
    """A list that grows by (latents, text, noise, timesteps) with every forward pass of `module`."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def remember(_: object, batch: tuple) -> None:
        latents, conditioning, *others = batch
        seen.append(tuple(part.clone() for part in (latents, conditioning["text"], *others)))

    module.register_forward_pre_hook(remember)
    return seen


def dense(root: Path, user_optimizer: str) -> dict[str, object]:
    """The plain path: one process, no DeepSpeed."""
    unet, module, pre, ft, sources, factory = setting(root, user_optimizer)
    seen = watch(module)
    parameters = dict(unet.named_parameters())
    optimizer = factory(list(parameters.values()))
    optimizer.bind(list(parameters.values()), ShardLayout.dense({n: p.numel() for n, p in parameters.items()}), pre, ft)
    for _ in alternate(PlainEngine(module, optimizer), optimizer, *sources, Schedule(INNER, ROUNDS)):
        pass
    return {
        "logits": optimizer.logits,
        "theta": torch.cat([p.detach().reshape(-1) for p in parameters.values()]),
        "seen": seen,
    }


def sharded(
    root: Path,
    stage: int,
    precision: str,
    user_optimizer: str,
    rounds: int = ROUNDS,
    resume: Path | None = None,
    save: Path | None = None,
    accumulation: int = 1,
    options: dict[str, object] | None = None,
) -> dict[str, object]:
    """One DeepSpeed run on this rank's shard."""
    world, rank = dist.get_world_size(), dist.get_rank()
    unet, module, pre, ft, sources, factory = setting(root, user_optimizer)
    seen = watch(module)
    engine = EngineConfig(num_workers=world, zero_stage=stage, mixed_precision=precision, **(options or {}))
    bilevel = BilevelConfig(train_batch_size=GLOBAL_BATCH, gradient_accumulation_steps=accumulation)
    with SavedState(resume) if resume is not None else nullcontext() as saved:
        training: ShardedTraining = build(unet, module, factory, pre, ft, engine, bilevel, saved)
    first_k = 0 if saved is None else saved.k
    optimizer = training.optimizer
    calls: list[int] = []
    counted: dict[str, set[int]] = {"user": set(), "publisher": set()}
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    step = optimizer.step

    def spying(*args, **kwargs):
        calls.clear()
        dist.all_reduce = counting
        try:
            step(*args, **kwargs)
        finally:
            dist.all_reduce = original
        counted[optimizer.kind].add(tuple(calls))

    optimizer.step = spying
    schedule = Schedule(INNER, rounds, accumulation=accumulation, rank=rank, world_size=world)
    for _ in alternate(training.engine, optimizer, *sources, schedule, first_k=first_k):
        pass
    if save is not None:
        training.save(save, rounds)
        dist.barrier()
    return {
        "first_k": first_k,
        "logits": optimizer.logits.clone(),
        "pieces": optimizer.layout.pieces(optimizer.theta()),
        "theta_d": optimizer.layout.pieces(optimizer.theta_d()),
        "state": {
            **{kind: optimizer.layout.pieces(shards) for kind, shards in optimizer.sharded_state().items()},
            "shared": {name: value.clone() for name, value in optimizer.shared_state().items()},
        },
        "invariant": optimizer.invariant_error(pre),
        "collectives": counted,
        "seen": seen,
    }


def torn(root: Path, stage: int, precision: str, user_optimizer: str, world: int) -> dict[str, object]:
    """Save two checkpoints, truncate a file of the newer one, and see which one is resumed."""
    storage = root / f"torn-{world}"
    folders = [storage / "checkpoint_1", storage / "checkpoint_2"]
    for folder, rounds in zip(folders, (2, 4), strict=True):
        sharded(root, stage, precision, user_optimizer, rounds=rounds, save=folder)
    newest_first = folders[::-1]
    found = [first_whole(newest_first)]
    for folder in newest_first:
        if dist.get_rank() == 0:
            victim = folder / "state-00001-theta.safetensors"
            os.truncate(victim, victim.stat().st_size // 2)
        dist.barrier()
        found.append(first_whole(newest_first))
        dist.barrier()
    return {"found": [None if folder is None else folder.name for folder in found]}


def main() -> None:
    rank, world, store, root, plan, out = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        *map(Path, sys.argv[3:5]),
        *sys.argv[5:7],
    )
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    results = {}
    for item in plan.split(","):
        name, stage, precision, user_optimizer, *rest = item.split(":")
        stage = int(stage)
        if rest and rest[0] == "resume":
            folder = root / f"half-{name}-{world}"
            half = sharded(root, stage, precision, user_optimizer, rounds=ROUNDS // 2, save=folder)
            results[name] = sharded(root, stage, precision, user_optimizer, resume=folder)
            results[name]["half"] = half["logits"]
            results[name]["half_state"] = half["state"]
        elif rest and rest[0] == "carried":
            # What another world left halfway, at whatever stage.
            folder = root / rest[1]
            taken = sharded(root, stage, precision, user_optimizer, rounds=0, resume=folder)
            results[name] = sharded(root, stage, precision, user_optimizer, resume=folder)
            results[name]["half_state"] = taken["state"]
        elif rest and rest[0] == "torn":
            results[name] = torn(root, stage, precision, user_optimizer, world)
        elif rest and rest[0] in OPTIONS:
            results[name] = sharded(root, stage, precision, user_optimizer, options=OPTIONS[rest[0]])
        else:
            accumulation = int(rest[0]) if rest else 1
            results[name] = sharded(root, stage, precision, user_optimizer, accumulation=accumulation)
        if name not in WATCHED:
            results[name].pop("seen", None)
    torch.save(results, f"{out}/world{world}-rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
