"""Teach, then freeze: the publisher trains the values of the tensors that will be frozen, with no simulated user.

Hypothesis of `know-more`: a user who may train only what is small fails at everything alike, so freezing the largest
tensors blocks everyone. Frozen values that know the legal classes let legal users through; values that denoise illegal
pictures badly, under any name, cost illegal users more than what they may train can repair. And what a picture becomes
is decided at high noise, where the plain loss is a hundredth of its value at low noise and users under a freeze end
worse than the release: so every error counts relative to the release's at its own noise. Legal pictures are also
taught under a name that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import ALIASES, Bench
from benchmarks.selectivity_rules.freeze import largest_names
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import joined
from raygard.diffusion.loss import draw
from raygard.diffusion.model import load_denoiser
from raygard.mask import FreezeMask
from raygard.seeding import generator
from raygard.values import NUM_BINS, ROLES, Objective
from raygard.values.names import pseudoword


@dataclass(frozen=True)
class TeachSettings:
    """steps, lr, batch: of the publisher's training (AdamW, cosine); a step sees twice as many general pictures.

    legal, general, poison: weights of the loss (`raygard.values.Objective`). cap: relative illegal error above which
    nothing more is asked.
    """

    steps: int = 1000
    lr: float = 4e-4
    batch: int = 8
    legal: float = 3.0
    general: float = 10.0
    poison: float = 0.3
    cap: float = 1.5


KNOW_MORE = TeachSettings()


def teach(bench: Bench, frozen: Sequence[str], seed: int, settings: TeachSettings = KNOW_MORE) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name."""
    release = load_denoiser(bench.config.model)
    training = ValuesTraining(bench, release, frozen, settings.lr, settings.steps)
    size, domain = settings.batch, bench.config.domain
    weights = settings.legal, settings.general, settings.poison
    objective = Objective(release_curves(bench), bench.loss.num_timesteps, *weights, settings.cap)
    roles = torch.repeat_interleave(torch.arange(len(ROLES)), torch.tensor([size, 2 * size, size]))
    legal = [bench.learn.subset(bench.learn.rows(cls)) for cls in domain.legal]
    legal += [bench.alias(data, pseudoword(seed, cls, 0)) for cls, data in zip(domain.legal, legal, strict=True)]
    illegal = [bench.learn.subset(bench.learn.rows(cls)) for cls in domain.illegal]
    renamed = [bench.alias(data, word) for data in illegal for word in ALIASES[1:4]]
    sources = [
        batches(bench, legal, seed, "teach legal", size),
        batches(bench, [bench.general["rehearsed"]], seed, "teach general", 2 * size),
        batches(bench, illegal, seed, "teach illegal", size // 2),
        batches(bench, renamed, seed, "teach renamed", size // 2),
    ]
    for _ in range(settings.steps):
        latents, conditioning, noise, timesteps = (joined(found) for found in zip(*map(next, sources), strict=True))
        errors = bench.loss.per_sample(release, latents, conditioning, noise, timesteps)
        total, _ = objective(errors, roles, timesteps)
        training.step(total)
    return training.learned()


def batches(bench: Bench, sets: Sequence[LatentSet], seed: int, stream: str, size: int) -> Iterator[tuple[Any, ...]]:
    """Endless (latents, conditioning, noise, timesteps); each row from one of `sets`, drawn with equal chance."""
    step = 0
    while True:
        rng = generator(seed, stream, step)
        eps, noise, timesteps = draw(seed, stream, step, range(size), sets[0].shape, bench.loss.num_timesteps)
        latents, conditioning = [], []
        for sample in range(size):
            data = sets[int(torch.randint(len(sets), (), generator=rng))]
            row = torch.randint(len(data), (1,), generator=rng)
            latents.append(data.latents(row, eps[sample : sample + 1]))
            conditioning.append(data.conditioning[row])
        yield torch.cat(latents), joined(conditioning), noise, timesteps
        step += 1


@cache
def release_curves(bench: Bench) -> Tensor:
    """The release's mean error on what a rule learns from, by role (in the order of ROLES) and noise bin: (R, N)."""
    release = load_denoiser(bench.config.model).requires_grad_(False)
    sets = {
        "general": [bench.general["rehearsed"]],
        **{
            role: [bench.learn.subset(bench.learn.rows(cls)) for cls in getattr(bench.config.domain, role)]
            for role in ("legal", "illegal")
        },
    }
    span = bench.loss.num_timesteps // NUM_BINS
    curves = []
    for role in ROLES:
        source, means = batches(bench, sets[role], bench.config.seed, f"timestep weights {role}", 24), []
        for number in range(NUM_BINS):
            latents, conditioning, noise, timesteps = next(source)
            timesteps = number * span + timesteps % span
            with torch.no_grad():
                means.append(bench.loss.per_sample(release, latents, conditioning, noise, timesteps).mean())
        curves.append(torch.stack(means))
    return torch.stack(curves)


class ValuesTraining:
    """New values of the tensors `frozen` of a release: AdamW, 20 steps of warm-up, cosine decay, clipped to norm 1.

    unet: the release; from here on its tensors of these names are what is trained.
    """

    def __init__(self, bench: Bench, unet: nn.Module, frozen: Sequence[str], lr: float, steps: int) -> None:
        self._values = {name: nn.Parameter(bench.base[name].clone()) for name in frozen}
        self._held = list(self._values.values())
        share(unet, self._values)
        self._optimizer = torch.optim.AdamW(self._held, lr=lr, weight_decay=0.0)
        self._decay = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda n: min(1, (n + 1) / 20) * 0.5 * (1 + math.cos(math.pi * n / steps))
        )

    def step(self, loss: Tensor) -> None:
        for value, gradient in zip(self._held, torch.autograd.grad(loss, self._held), strict=True):
            value.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._held, 1.0)
        self._optimizer.step()
        self._decay.step()

    def learned(self) -> dict[str, Tensor]:
        """Float32 by name."""
        return {name: value.detach().clone() for name, value in self._values.items()}


def share(unet: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Put `values` in the place of the module's parameters of these names, so that they are one storage."""
    for name, value in values.items():
        module, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(module), leaf, value)


def know_more(bench: Bench, p: float, seed: int) -> FreezeMask:
    """The largest tensors, with values taught as `raygard.values` does."""
    frozen = largest_names(bench, p)
    return bench.mask(frozen, teach(bench, frozen, seed))


RULES = {"know-more": know_more}
