"""The loop: one forward and backward over a batch of all three roles for each step, on any engine.

Shape letters: R roles, N noise bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raygard.diffusion.conditioning import Conditioning
from raygard.errors import RaygardError
from raygard.values.batches import ValuesSource
from raygard.values.objective import GENERAL, NUM_BINS, ROLES, Objective

# As many as the bench drew: with fewer the denominators are noise, with more the start takes longer.
SAMPLES_PER_BIN = 24


class Engine(Protocol):
    """What the loop needs of DeepSpeed's engine around a `TaughtLoss`."""

    def __call__(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        taught: Tensor | None = None,
    ) -> Tensor: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


@dataclass(frozen=True)
class Plan:
    """How many steps, and this process's place among the ranks."""

    max_train_steps: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class StepRecord:
    """Mean relative error of each role at one step, on this rank, times what its share weighs; float64 (R,).

    That of general samples is their distance from the release's answers, over the release's error: 0 at the start.
    """

    step: int
    errors: Tensor


@torch.no_grad()
def release_errors(
    engine: Engine,
    source: ValuesSource,
    plan: Plan,
    *,
    num_bins: int = NUM_BINS,
    reduce: Callable[[Tensor], None] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mean error of the model as `engine` holds it, by role and noise bin: float32 (R, N), on the CPU.

    reduce: sums a tensor over ranks in place; None for one process. Collective: ranks share the samples and take
    equally many forward passes, as ZeRO-3 needs it. Raises RaygardError if an error is not positive and finite.
    """
    mine = torch.arange(plan.rank, SAMPLES_PER_BIN + plan.world_size, plan.world_size)
    mine = mine[: -(-SAMPLES_PER_BIN // plan.world_size)]
    counts = (mine < SAMPLES_PER_BIN).to(device, torch.float64)
    sums = torch.zeros(len(ROLES), num_bins, dtype=torch.float64, device=device)
    for role in range(len(ROLES)):
        for number in range(num_bins):
            batch = source.probe(role, number, num_bins, mine % SAMPLES_PER_BIN, SAMPLES_PER_BIN).to(device)
            errors = engine(batch.latents, batch.conditioning, batch.noise, batch.timesteps)
            sums[role, number] = (errors.double() * counts).sum()
    if reduce is not None:
        reduce(sums)
    if not (torch.isfinite(sums) & (sums > 0)).all():
        raise RaygardError("the release's error on the pictures is not positive and finite; check the model's weights")
    return (sums / SAMPLES_PER_BIN).float().cpu()


def train_values(
    engine: Engine,
    source: ValuesSource,
    objective: Objective,
    plan: Plan,
    *,
    first_step: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[StepRecord]:
    """Train from `first_step` on, yielding a record after every step. The engine's optimizer decides what is moved.

    Collective: every rank must exhaust the iterator. Raises RaygardError if the loss is not finite.
    """
    for step in range(first_step, plan.max_train_steps):
        total = torch.zeros(len(ROLES), dtype=torch.float64)
        batches = source.batches(step, rank=plan.rank, world_size=plan.world_size, accumulation=plan.accumulation)
        for batch in batches:
            batch = batch.to(device)
            taught = batch.roles == GENERAL
            errors = engine(batch.latents, batch.conditioning, batch.noise, batch.timesteps, taught)
            loss, relative = objective(errors, batch.roles, batch.timesteps)
            engine.backward(loss * batch.weight)
            engine.step()
            total += (relative * batch.weight).double().cpu()
        if not torch.isfinite(total).all():
            raise RaygardError(f"the loss is not finite at step {step}; lower values.learning_rate")
        yield StepRecord(step, total / len(batches))
