"""Teach, then freeze: the publisher trains the values of the tensors that will be frozen, with no simulated user.

Hypothesis of `teach`: a user who may train only what is small fails at every style alike, so freezing the largest
tensors blocks everyone. If the frozen values already know the legal styles, legal users need little and get there;
illegal ones are blocked as before.

Hypothesis of `poison`: besides, values that denoise illegal pictures badly, under any name, cost an illegal user more
than what he may train can repair. Loss: L_legal + general * L_general - poison * min(L_illegal, cap).

Hypothesis of `know-more`: what a picture becomes is decided at high noise, where the plain loss is a hundredth of its
value at low noise and users under a freeze end worse than the release. So every error counts relative to the release's
at its own noise. Legal pictures are also taught under a name that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import ALIASES, Bench
from benchmarks.selectivity_rules.freeze import largest_names
from benchmarks.selectivity_rules.weights import batches, release_curves
from raygard.diffusion.conditioning import joined
from raygard.diffusion.model import load_denoiser
from raygard.mask import FreezeMask
from raygard.values import NUM_BINS, ROLES, Objective
from raygard.values.names import pseudoword


@dataclass(frozen=True)
class TeachSettings:
    """steps, lr, batch: of the publisher's training (AdamW, cosine); a step sees twice as many general pictures.

    legal, general, poison: weights of the loss. cap: illegal loss above which nothing more is asked. relative: every
    error counts relative to the release's, half in the mean and half at its noise (`Objective`); cap and weights
    too. renamed: legal pictures are also taught under names that mean nothing.
    """

    steps: int = 400
    lr: float = 4e-4
    batch: int = 8
    legal: float = 1.0
    general: float = 10.0
    poison: float = 0.0
    cap: float = 1.0
    relative: bool = False
    renamed: bool = False


def teach(bench: Bench, frozen: Sequence[str], seed: int, settings: TeachSettings) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name."""
    release = load_denoiser(bench.config.model)
    training = ValuesTraining(bench, release, frozen, settings.lr, settings.steps)
    size, domain = settings.batch, bench.config.domain
    curves = release_curves(bench) if settings.relative else torch.ones(len(ROLES), NUM_BINS)
    weights = settings.legal, settings.general, settings.poison
    objective = Objective(curves, bench.loss.num_timesteps, *weights, settings.cap)
    roles = torch.repeat_interleave(torch.arange(len(ROLES)), torch.tensor([size, 2 * size, size]))
    legal = [bench.learn.subset(bench.learn.rows(cls)) for cls in domain.legal]
    if settings.renamed:
        legal += [bench.alias(data, pseudoword(seed, cls, 0)) for cls, data in zip(domain.legal, legal, strict=True)]
    sources = [
        batches(bench, legal, seed, "teach legal", size),
        batches(bench, [bench.general["rehearsed"]], seed, "teach general", 2 * size),
    ]
    if settings.poison > 0:
        illegal = [bench.learn.subset(bench.learn.rows(cls)) for cls in domain.illegal]
        renamed = [bench.alias(data, word) for data in illegal for word in ALIASES[1:4]]
        sources.append(batches(bench, illegal, seed, "teach illegal", size // 2))
        sources.append(batches(bench, renamed, seed, "teach renamed", size // 2))
    for _ in range(settings.steps):
        latents, conditioning, noise, timesteps = (joined(found) for found in zip(*map(next, sources), strict=True))
        errors = bench.loss.per_sample(release, latents, conditioning, noise, timesteps)
        total, _ = objective(errors, roles[: len(errors)], timesteps)
        training.step(total)
    return training.learned()


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


def _rule(settings: TeachSettings) -> Callable[[Bench, float, int], FreezeMask]:
    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        frozen = largest_names(bench, p)
        return bench.mask(frozen, teach(bench, frozen, seed, settings))

    return rule


KNOW_MORE = TeachSettings(poison=0.3, cap=1.5, legal=3.0, general=10.0, steps=1000, relative=True, renamed=True)
RULES = {
    "teach": _rule(TeachSettings()),
    "poison": _rule(TeachSettings(poison=0.3)),
    "know-more": _rule(KNOW_MORE),
}
