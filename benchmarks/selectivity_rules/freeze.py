"""Which tensors to freeze, values as released: the controls, and the budget rule of Algorithm 1.

Hypothesis: with classes of one kind the same tensors move for the illegal and the legal, so no choice of whole tensors
discriminates; these rules differ in strength for a share of parameters, and not in the ratio of illegal to legal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.selectivity_bench import Bench, moved
from raygard.baselines import choose_frozen
from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, Schedule, alternate
from raygard.bilevel.batches import BatchSource
from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.bilevel.rules import make_rule
from raygard.bilevel.segments import ShardLayout
from raygard.cluster.worker import rule_settings
from raygard.diffusion.model import load_unet
from raygard.mask import FreezeMask, select_frozen
from raygard.seeding import generator


def sizes(bench: Bench) -> torch.Tensor:
    """Elements of each tensor, int64 (N,)."""
    return torch.tensor([value.numel() for value in bench.base.values()])


def busy_names(bench: Bench, p: float, seed: int) -> list[str]:
    """Tensors that relearning moved most relative to their norm, a share p of them by count; the seed does nothing."""
    ranked = sorted(moved(bench).items(), key=lambda item: -item[1])
    return [name for name, _ in ranked[: round(p * len(ranked))]]


def largest_names(bench: Bench, p: float, seed: int) -> list[str]:
    """The largest tensors, a share p of them by count; the seed does nothing."""
    return list(control("largest-first")(bench, p, seed).frozen_names)


def random_names(bench: Bench, p: float, seed: int) -> list[str]:
    """Tensors drawn at random, a share p of them by count."""
    return list(control("random")(bench, p, seed).frozen_names)


def busy_layer(bench: Bench, p: float, seed: int) -> FreezeMask:
    """Most moved by relearning."""
    return FreezeMask.create(load_unet(bench.config.model), busy_names(bench, p, seed))


def control(name: str) -> Callable[[Bench, float, int], FreezeMask]:
    """A rule from raygard.baselines; random-matched takes the parameter share of the learned mask."""

    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        count = sizes(bench)
        like = torch.zeros(len(count), dtype=torch.bool)
        like[: round(p * len(count))] = True
        if name == "random-matched":
            like = budget(bench, p, seed).frozen
        frozen = choose_frozen(name, count, like, generator(seed, "selectivity", name))
        return FreezeMask.create(load_unet(bench.config.model), frozen)

    return rule


def budget(bench: Bench, p: float, seed: int) -> FreezeMask:
    """Algorithm 1 with the exact budget, in one process."""
    config = bench.config.model_copy(update={"mask": bench.config.mask.model_copy(update={"freeze_ratio": p})})
    b, unet, data = config.bilevel, load_unet(config.model), bench.learn
    optimizer = BilevelOptimizer(
        unet.parameters(),
        rule=make_rule(config.mask.rule, rule_settings(config, sizes(bench), seed)),
        user_optimizer=b.user_optimizer,
        lr=b.user_lr,
        weight_decay=b.adam_weight_decay,
    )
    optimizer.bind(
        list(unet.parameters()),
        ShardLayout.dense({name: value.numel() for name, value in bench.base.items()}),
        bench.base,
        bench.relearned,
    )

    def source(part: str, stream: str) -> BatchSource:
        rows = [[data.rows(cls, part) for cls in getattr(config.domain, role)] for role in ("illegal", "legal")]
        return BatchSource(data, rows[0], rows[1], b.train_batch_size, seed, stream)

    engine = PlainEngine(DenoiserLoss(unet, bench.loss), optimizer)
    schedule = Schedule(b.inner_steps, b.publisher_steps, b.illegal_weight, b.legal_weight)
    for _ in alternate(engine, optimizer, source("learn_lower", "lower"), source("learn_upper", "upper"), schedule):
        pass
    frozen = select_frozen(optimizer.logits, sizes(bench), p, config.mask.budget)
    return FreezeMask.create(load_unet(config.model), frozen, logits=optimizer.logits, soft=optimizer.soft)


RULES = {
    "budget": budget,
    "busy-layer": busy_layer,
    **{name: control(name) for name in ("random", "random-matched", "largest-first")},
}
