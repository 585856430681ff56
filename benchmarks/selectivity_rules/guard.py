"""Guard: values learned through users. Two simulated users live beside the release and share the values that will be
frozen; one learns illegal pictures, the other legal ones, each under a name of its own. The publisher moves the values
so that the legal user does well where he is and the illegal one badly, and the release stays what it was.

Hypotheses. (1) Whom a freeze blocks is decided by what the few trainable tensors can do from these values, so values
trained at the places users reach (first order, as in FOMAML) carry selectivity that values trained at the release do
not. (2) What a picture becomes is decided at high noise, where the plain loss is a hundredth of its value at low noise:
`largest-first` users end *above* the release's loss there though their mean loss is that of full fine-tuning. So the
publisher weighs each timestep by the release's own loss at that noise, half and half with the plain loss.
(3) Users under random names make the guard look at pictures.

Publisher's loss, each term relative to the release's own on the same pictures:
    L_legal(legal user) + general * L_general(release) - poison * min(L_illegal(illegal user), cap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import Bench
from benchmarks.selectivity_rules.freeze import largest_names
from benchmarks.selectivity_rules.teach import share
from benchmarks.selectivity_rules.weights import Weigh, batches, pseudoword, timestep_weights
from raygard.diffusion.model import load_unet
from raygard.mask import FreezeMask
from raygard.seeding import generator


@dataclass(frozen=True)
class GuardSettings:
    """steps, lr, batch: of the publisher (AdamW, cosine); each step is also one of both users. life: user steps before
    he starts anew from the release. user_lr: lowest and highest, drawn log-uniformly for each life. named: share of
    lives under the class's own name. general, poison, cap: of the loss.
    """

    steps: int = 1000
    lr: float = 5e-4
    batch: int = 8
    life: int = 100
    user_lr: tuple[float, float] = (3e-4, 1e-3)
    named: float = 0.4
    general: float = 6.0
    poison: float = 0.5
    cap: float = 1.5


def guard(bench: Bench, frozen: list[str], seed: int, settings: GuardSettings) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name."""
    values = {name: nn.Parameter(bench.base[name].clone()) for name in frozen}
    held = list(values.values())
    release = load_unet(bench.config.model)
    share(release, values)
    optimizer = torch.optim.AdamW(held, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(n / settings.steps, 1)))
    )
    weigh = timestep_weights(bench)
    general = batches(bench, [bench.general["rehearsed"]], seed, "guard general", 2 * settings.batch)
    users = [_User(bench, role, values, seed, settings) for role in ("legal", "illegal")]
    for step in range(settings.steps):
        latents, text, noise, timesteps = next(general)
        errors = bench.loss.per_sample(release, latents, text, noise, timesteps)
        loss = settings.general * weigh("general", errors, timesteps).mean()
        total = list(torch.autograd.grad(loss, held))
        for user in users:
            if step % settings.life == 0:
                user.restart(step // settings.life)
            for gradient, own in zip(total, user.step(held, weigh), strict=True):
                gradient.add_(own)
        for value, gradient in zip(held, total, strict=True):
            value.grad = gradient
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        decay.step()
    return {name: value.detach().clone() for name, value in values.items()}


class _User:
    """Trains what is not frozen; the frozen values are the publisher's own storage."""

    def __init__(
        self, bench: Bench, role: str, values: Mapping[str, nn.Parameter], seed: int, settings: GuardSettings
    ) -> None:
        self.bench, self.role, self.seed, self.settings = bench, role, seed, settings
        self.unet = load_unet(bench.config.model)
        share(self.unet, values)
        held = {id(value) for value in values.values()}
        self.trained = {name: p for name, p in self.unet.named_parameters() if id(p) not in held}
        self.batches: Iterator[tuple[Tensor, ...]] = iter(())

    def restart(self, number: int) -> None:
        """Begin a new life at the release, with another class, name and learning rate."""
        rng = generator(self.seed, "guard", self.role, number)
        chance, height = torch.rand(2, generator=rng).tolist()
        low, high = self.settings.user_lr
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.bench.base[name])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=low * (high / low) ** height)
        classes = getattr(self.bench.config.domain, self.role)
        cls = classes[number % len(classes)]
        data = self.bench.learn.subset(self.bench.learn.rows(cls))
        if chance >= self.settings.named:
            data = self.bench.alias(data, cls, pseudoword(self.seed, cls, number))
        self.batches = batches(self.bench, [data], self.seed, f"guard {self.role} {number}", self.settings.batch)

    def step(self, values: list[nn.Parameter], weigh: Weigh) -> tuple[Tensor, ...]:
        """One step of the user on the plain loss; the publisher's gradient at the user's place before it."""
        latents, text, noise, timesteps = next(self.batches)
        errors = self.bench.loss.per_sample(self.unet, latents, text, noise, timesteps)
        trained = list(self.trained.values())
        own = torch.autograd.grad(errors.mean(), trained, retain_graph=True)
        relative = weigh(self.role, errors, timesteps)
        loss = relative.mean() if self.role == "legal" else -self.settings.poison * _capped(relative, self.settings.cap)
        gradients = torch.autograd.grad(loss, values)
        for parameter, gradient in zip(trained, own, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        return gradients


def _capped(relative: Tensor, cap: float) -> Tensor:
    return relative.clamp(max=cap).mean()


def _rule(settings: GuardSettings) -> Callable[[Bench, float, int], FreezeMask]:
    def rule(bench: Bench, p: float, seed: int) -> FreezeMask:
        frozen = largest_names(bench, p)
        return bench.mask(frozen, guard(bench, frozen, seed, settings))

    return rule


RULES = {"guard": _rule(GuardSettings())}
