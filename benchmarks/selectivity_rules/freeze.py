"""Which tensors to freeze, values as released: the controls, and Algorithm 1 by raygard's rules of its mask.

Hypothesis: with classes of one kind the same tensors move for the illegal and the legal, so no choice of whole tensors
discriminates; these rules differ in strength for a share of parameters, and not in the ratio of illegal to legal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from benchmarks.selectivity_bench import Bench
from raygard.baselines import NEED_RELEARNED, choose_frozen, relative_change
from raygard.bilevel import BilevelOptimizer
from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, alternate
from raygard.bilevel.rules import make_rule
from raygard.bilevel.segments import ShardLayout
from raygard.cluster.worker import batch_sources, make_optimizer, make_schedule, rule_settings
from raygard.config import RunConfig
from raygard.defences import make_mask
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.model import load_denoiser, load_loss
from raygard.mask import FreezeMask
from raygard.seeding import generator

Rule = Callable[[Bench, float, int], FreezeMask]


def sizes(bench: Bench) -> torch.Tensor:
    """Elements of each tensor, int64 (N,)."""
    return torch.tensor([value.numel() for value in bench.base.values()])


def largest_names(bench: Bench, p: float) -> list[str]:
    """The largest tensors, a share p of them by count."""
    frozen = choose_frozen("largest-first", sizes(bench), share_of(bench, p), torch.Generator())
    return [name for name, flag in zip(bench.base, frozen.tolist(), strict=True) if flag]


def share_of(bench: Bench, p: float) -> torch.Tensor:
    """Some share p of the tensors by count, bool (N,), for baselines that only look at how many there are."""
    return torch.arange(len(bench.base)) < round(p * len(bench.base))


def control(name: str, like: Rule | None = None) -> Rule:
    """A rule from raygard.baselines; random-matched has the share of parameters of the mask `like`."""

    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        learned = share_of(bench, p) if like is None else like(bench, p, seed).frozen
        change = relative_change(bench.base, bench.relearned) if name in NEED_RELEARNED else None
        rng = generator(seed, "selectivity", name)
        return bench.mask(choose_frozen(name, sizes(bench), learned, rng, relative_change=change))

    return rule


def learned(rule: str) -> Rule:
    """Algorithm 1 as `raygard learn` runs it with mask.rule=`rule`, in one process."""

    @cache
    def learn(bench: Bench, p: float, seed: int) -> FreezeMask:
        mask = bench.config.mask.model_copy(update={"freeze_ratio": p, "rule": rule})
        config = bench.config.model_copy(update={"mask": mask})
        optimizer = learn_in_one_process(config, bench.learn, bench.relearned, seed)
        return make_mask(config, optimizer.logits, optimizer.soft, seed)

    return learn


def learn_in_one_process(
    config: RunConfig, data: LatentSet, relearned: Mapping[str, torch.Tensor], seed: int
) -> BilevelOptimizer:
    """Algorithm 1 to its end, without Ray and DeepSpeed; the optimizer with its logits."""
    unet = load_denoiser(config.model)
    released = {name: p.detach().clone() for name, p in unet.named_parameters()}
    numels = {name: value.numel() for name, value in released.items()}
    rule = make_rule(config.mask.rule, rule_settings(config, torch.tensor(list(numels.values())), seed))
    optimizer = make_optimizer(config, unet.parameters(), rule)
    optimizer.bind(list(unet.parameters()), ShardLayout.dense(numels), released, relearned)
    engine = PlainEngine(DenoiserLoss(unet, load_loss(config.model)), optimizer)
    sources = batch_sources(config, data, False, seed)
    for _ in alternate(engine, optimizer, *sources, make_schedule(config, False, 0, 1)):
        pass
    return optimizer


AVERAGE, BUDGET = learned("average"), learned("budget")
RULES: dict[str, Rule] = {
    "average": AVERAGE,
    "budget": BUDGET,
    **{name: control(name) for name in ("busy-layer", "random", "largest-first")},
    "random-matched": control("random-matched", like=BUDGET),
    "random-as-average": control("random-matched", like=AVERAGE),
    "random-as-largest": control("random-matched", like=control("largest-first")),
}
