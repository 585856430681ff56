"""Edit against simulated users: after `poison`, the frozen values are moved along the way of users who adapt.

Hypothesis: what an illegal user can repair depends on where he goes, so values tuned at the places users reach block
them for longer than values tuned at the release alone.

In each round an illegal and a legal user restart from the current release and share the frozen tensors' storage. After
every `every` user steps the publisher moves the frozen values with Adam along the first-order gradient of
    L_legal(legal user) / L0_legal - min(L_illegal(illegal user) / L0_illegal, ceiling)
    + mu * (L_general + |eps - eps_base|^2)(release) / L0_general,
L0 being the original release's losses. mu follows dual ascent on "the release's general loss rises by at most
`general_budget`". In a share `names` of the rounds the users' classes have other names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.selectivity_bench import ALIASES, Bench
from benchmarks.selectivity_rules.freeze import largest_names
from benchmarks.selectivity_rules.teach import TeachSettings, batches, share, teach
from raygard.diffusion.model import load_unet
from raygard.mask import FreezeMask
from raygard.seeding import generator


@dataclass(frozen=True)
class EditSettings:
    """rounds, steps: of the simulated users; every: user steps for each publisher step. lr: of the values.

    user_lr: lowest and highest learning rate of the users, drawn log-uniformly for each round.
    """

    rounds: int = 8
    steps: int = 60
    every: int = 2
    lr: float = 1e-4
    user_lr: tuple[float, float] = (3e-4, 1e-3)
    batch: int = 8
    ceiling: float = 2.5
    names: float = 0.4
    general_budget: float = 0.01
    dual_rate: float = 0.5
    mu: float = 10.0


def edit(bench: Bench, start: Mapping[str, Tensor], seed: int, settings: EditSettings) -> dict[str, Tensor]:
    """New values of the frozen tensors, float32 by name, from `start` on."""
    values = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    held = list(values.values())
    publisher = torch.optim.Adam(held, lr=settings.lr, betas=(0.9, 0.99))
    total = settings.rounds * settings.steps // settings.every
    decay = torch.optim.lr_scheduler.LambdaLR(publisher, lambda n: 0.5 * (1 + math.cos(math.pi * min(n / total, 1))))
    release, original = load_unet(bench.config.model), load_unet(bench.config.model).requires_grad_(False)
    share(release, values)
    retained = batches(bench, [bench.general[0]], seed, "retain", settings.batch)
    draws = torch.rand(settings.rounds, 2, generator=generator(seed, "edit", "rounds"))
    mu, rise, (low, high) = settings.mu, 0.0, settings.user_lr
    for number in range(settings.rounds):
        alias = ALIASES[1 + number % (len(ALIASES) - 1)] if draws[number, 0] < settings.names else None
        lr = low * (high / low) ** float(draws[number, 1])
        users = [_User(bench, role, values, alias, seed, number, lr, settings.batch) for role in ("illegal", "legal")]
        for step in range(settings.steps):
            publishes = step % settings.every == 0
            for value in held:
                value.grad = None
            for user in users:
                loss, gradients = user.step(held if publishes else [])
                if publishes and not (user.role == "illegal" and loss > settings.ceiling * user.loss_before):
                    _accumulate(held, gradients, (-1 if user.role == "illegal" else 1) / user.loss_before)
            if publishes:
                change, gradients = _retain(bench, release, original, next(retained), held)
                _accumulate(held, gradients, mu / bench.retain_loss)
                rise = 0.95 * rise + 0.05 * change / bench.retain_loss
                mu = min(max(mu * math.exp(settings.dual_rate * (rise - settings.general_budget)), 0.3), 300.0)
                publisher.step()
                decay.step()
    return {name: value.detach().clone() for name, value in values.items()}


class _User:
    """A simulated user of one class, who has the published values and trains everything else."""

    def __init__(
        self,
        bench: Bench,
        role: str,
        values: Mapping[str, nn.Parameter],
        alias: str | None,
        seed: int,
        number: int,
        lr: float,
        batch: int,
    ) -> None:
        classes = getattr(bench.config.domain, role)
        self.bench, self.role, self.cls = bench, role, classes[number % len(classes)]
        self.loss_before = bench.learn_loss(self.cls)
        self.unet = load_unet(bench.config.model)
        share(self.unet, values)
        held = {id(value) for value in values.values()}
        self.trained = [p for p in self.unet.parameters() if id(p) not in held]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr)
        data = bench.learn.subset(bench.learn.rows(self.cls))
        data = bench.alias(data, self.cls, alias) if alias else data
        self.batches = batches(bench, [data], seed, f"edit {number} {role}", batch)

    def step(self, values: list[nn.Parameter]) -> tuple[float, tuple[Tensor, ...]]:
        """One step of the user; its loss, and the loss's gradient by the frozen values at the user's place."""
        loss = self.bench.loss.per_sample(self.unet, *next(self.batches)).mean()
        gradients = torch.autograd.grad(loss, [*self.trained, *values])
        for parameter, gradient in zip(self.trained, gradients, strict=False):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss.detach()), gradients[len(self.trained) :]


def _retain(
    bench: Bench, release: nn.Module, original: nn.Module, batch: tuple[Tensor, ...], values: list[nn.Parameter]
) -> tuple[float, tuple[Tensor, ...]]:
    """By how much the release's loss exceeds the original's, and the gradient of loss and distance to the original."""
    latents, text, noise, timesteps = batch
    noisy, target = bench.loss.noised(latents, noise, timesteps)
    predicted = release(noisy, timesteps, text, return_dict=False)[0]
    with torch.no_grad():
        before = original(noisy, timesteps, text, return_dict=False)[0]
    loss = (predicted - target).square().mean()
    gradients = torch.autograd.grad(loss + (predicted - before).square().mean(), values)
    return float(loss.detach() - (before - target).square().mean()), gradients


def _accumulate(values: Sequence[nn.Parameter], gradients: Sequence[Tensor], weight: float) -> None:
    for value, gradient in zip(values, gradients, strict=True):
        if value.grad is None:
            value.grad = torch.zeros_like(value)
        value.grad.add_(gradient, alpha=weight)


def poison_edit(bench: Bench, p: float, seed: int) -> FreezeMask:
    """`poison`, then rounds of simulated users."""
    frozen = largest_names(bench, p)
    values = edit(bench, teach(bench, frozen, seed, TeachSettings(poison=0.3)), seed, EditSettings())
    return bench.mask(frozen, values)


RULES = {"poison-edit": poison_edit}
