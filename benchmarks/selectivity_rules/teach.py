"""Teach, then freeze: the publisher trains the values of the tensors that will be frozen, with no simulated user.

Hypothesis of `teach`: a user who may train only what is small fails at every style alike, so freezing the largest
tensors blocks everyone. If the frozen values already know the legal styles, legal users need little and get there;
illegal ones are blocked as before.

Hypothesis of `poison`: besides, values that denoise illegal pictures badly, under any name, cost an illegal user more
than what he may train can repair. Loss: L_legal + general * L_general - poison * min(L_illegal, cap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import ALIASES, Bench
from benchmarks.selectivity_rules.freeze import largest_names
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.loss import draw
from raygard.diffusion.model import load_unet
from raygard.mask import FreezeMask
from raygard.seeding import generator


@dataclass(frozen=True)
class TeachSettings:
    """steps, lr, batch: of the publisher's training (AdamW, cosine); a step sees twice as many general pictures.

    general, poison: weights of the loss. cap: illegal loss above which nothing more is asked.
    """

    steps: int = 400
    lr: float = 4e-4
    batch: int = 8
    general: float = 10.0
    poison: float = 0.0
    cap: float = 1.0


def teach(bench: Bench, frozen: Sequence[str], seed: int, settings: TeachSettings) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name."""
    values = {name: nn.Parameter(bench.base[name].clone()) for name in frozen}
    release, held = load_unet(bench.config.model), list(values.values())
    share(release, values)
    optimizer = torch.optim.AdamW(held, lr=settings.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 20) * 0.5 * (1 + math.cos(math.pi * n / settings.steps))
    )
    size, domain = settings.batch, bench.config.domain
    legal = [bench.learn.subset(bench.learn.rows(cls)) for cls in domain.legal]
    sources = [
        batches(bench, legal, seed, "teach legal", size),
        batches(bench, [bench.general[0]], seed, "teach general", 2 * size),
    ]
    if settings.poison > 0:
        illegal = {cls: bench.learn.subset(bench.learn.rows(cls)) for cls in domain.illegal}
        renamed = [bench.alias(data, cls, word) for cls, data in illegal.items() for word in ALIASES[1:4]]
        sources.append(batches(bench, list(illegal.values()), seed, "teach illegal", size // 2))
        sources.append(batches(bench, renamed, seed, "teach renamed", size // 2))
    for _ in range(settings.steps):
        joined = [torch.cat(tensors) for tensors in zip(*(next(source) for source in sources), strict=True)]
        losses = bench.loss.per_sample(release, *joined)
        total = losses[:size].mean() + settings.general * losses[size : 3 * size].mean()
        if settings.poison > 0:
            total = total - settings.poison * losses[3 * size :].clamp(max=settings.cap).mean()
        for value, gradient in zip(held, torch.autograd.grad(total, held), strict=True):
            value.grad = gradient
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        decay.step()
    return {name: value.detach().clone() for name, value in values.items()}


def share(unet: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Put `values` in the place of the module's parameters of these names, so that they are one storage."""
    for name, value in values.items():
        module, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(module), leaf, value)


def batches(bench: Bench, sets: Sequence[LatentSet], seed: int, stream: str, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless (latents, text, noise, timesteps); each row from one of `sets`, drawn with equal chance."""
    step = 0
    while True:
        rng = generator(seed, stream, step)
        eps, noise, timesteps = draw(seed, stream, step, range(size), sets[0].shape, bench.loss.num_timesteps)
        latents, text = [], []
        for sample in range(size):
            data = sets[int(torch.randint(len(sets), (), generator=rng))]
            row = torch.randint(len(data), (1,), generator=rng)
            latents.append(data.latents(row, eps[sample : sample + 1]))
            text.append(data.text[row])
        yield torch.cat(latents), torch.cat(text), noise, timesteps
        step += 1


def _rule(settings: TeachSettings) -> Callable[[Bench, float, int], FreezeMask]:
    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        frozen = largest_names(bench, p)
        return bench.mask(frozen, teach(bench, frozen, seed, settings))

    return rule


RULES = {
    "teach": _rule(TeachSettings()),
    "poison": _rule(TeachSettings(poison=0.3)),
    "poison-long": _rule(TeachSettings(poison=0.3, steps=1200)),
}
