"""Teach, then freeze: the publisher trains the values of the tensors that will be frozen, with no simulated user.

Hypothesis: freezing what the illegal user needs most (`average`) blocks everyone. Frozen values that know the legal
classes let legal users through; values that denoise illegal pictures badly, under any name, cost illegal users more
than what they may train can repair. What a picture becomes is decided at high noise, where the plain loss is a
hundredth of its value at low noise and users under a freeze end worse than the release: so every error counts relative
to the release's at its own noise. Legal pictures are also taught under a name that means nothing. General pictures, and
their mirror images, are to be answered as the release answers them: kept low by their loss, what is memorised is
traded for what is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.selectivity_bench import Bench
from benchmarks.selectivity_rules.freeze import AVERAGE
from raygard.config import ValuesConfig
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.model import load_denoiser
from raygard.mask import FreezeMask
from raygard.values import Objective, Plan, TaughtLoss, release_errors, train_values
from raygard.values.optimizer import make_optimizer, make_schedule

STEPS = 1000


def teach(bench: Bench, frozen: Sequence[str], seed: int, settings: ValuesConfig) -> dict[str, Tensor]:
    """New values of the tensors `frozen`, float32 by name: the product's stage `values` without Ray and DeepSpeed."""
    unet = load_denoiser(bench.config.model).train()
    source = bench.values_source(settings, seed)
    engine = _Engine(TaughtLoss(unet, bench.loss, load_denoiser(bench.config.model)), frozen, settings)
    plan = Plan(settings.max_train_steps)
    objective = Objective.of(release_errors(engine, source, plan), source.num_timesteps, settings)
    for _ in train_values(engine, source, objective, plan):
        pass
    return {name: unet.get_parameter(name).detach().clone() for name in frozen}


class _Engine:
    """What `raygard.cluster.values` sets up in DeepSpeed, in torch alone."""

    def __init__(self, module: TaughtLoss, frozen: Sequence[str], settings: ValuesConfig) -> None:
        self._module, self._norm = module, settings.max_grad_norm
        self._optimizer = make_optimizer(module.denoiser, frozen, settings)
        self._decay = make_schedule(self._optimizer, settings)

    def __call__(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        taught: Tensor | None = None,
    ) -> Tensor:
        errors: Tensor = self._module(latents, conditioning, noise, timesteps, taught)
        return errors

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if self._norm > 0:
            torch.nn.utils.clip_grad_norm_(self._optimizer.param_groups[0]["params"], self._norm)
        self._optimizer.step()
        self._decay.step()
        self._optimizer.zero_grad()


def settings_of(bench: Bench) -> ValuesConfig:
    """The bench's section `values`, at the number of steps that the product has no default for."""
    found = bench.config.values
    return found if found.enabled else ValuesConfig(max_train_steps=STEPS)


def know_average(bench: Bench, p: float, seed: int) -> FreezeMask:
    """The tensors that `average` freezes, with taught values: the product's own two stages."""
    frozen = AVERAGE(bench, p, seed).frozen_names
    return bench.mask(frozen, teach(bench, frozen, seed, settings_of(bench)))


RULES = {"know-average": know_average}
