"""Algorithm 1: L user steps, one publisher step, K times over; and relearning, which is user steps alone.

The same loop drives one process (`PlainEngine`) and DeepSpeed (its engine has the same three methods).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from raygard.bilevel.batches import Batch, BatchSource
from raygard.bilevel.optimizer import BilevelOptimizer, StepKind
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import Teacher, TrainingLoss
from raygard.errors import RaygardError


class DenoiserLoss(nn.Module):
    """A denoiser with its training loss, so that an engine wraps one module with one forward.

    autocast: run float32 weights in this dtype; for engines that do not convert the weights themselves.
    memory_format: of pictures, which convolutions pass on; weights keep theirs.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        loss: TrainingLoss,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.loss = loss
        self.autocast = autocast
        self.memory_format = memory_format

    def forward(self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Loss of each sample, (B,) (Eq 1)."""
        return self.errors(self.denoiser, latents, conditioning, noise, timesteps)

    def errors(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """`forward` with another denoiser, which is part of the same engine, or with a teacher."""
        dtype, enabled = self.autocast or torch.float32, self.autocast is not None
        latents = latents.contiguous(memory_format=self.memory_format)
        noise = noise.contiguous(memory_format=self.memory_format)
        with torch.autocast(latents.device.type, dtype=dtype, enabled=enabled):
            return self.loss.per_sample(denoiser, latents, conditioning, noise, timesteps, teacher)


class Engine(Protocol):
    """What the loop needs of DeepSpeed's engine: a forward, a backward that scales by accumulation, a step."""

    def __call__(self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


class PlainEngine:
    """One process without DeepSpeed."""

    def __init__(self, module: DenoiserLoss, optimizer: BilevelOptimizer, accumulation: int = 1) -> None:
        self.module, self.optimizer, self.accumulation = module, optimizer, accumulation
        self._micro = 0

    def __call__(self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.module(latents, conditioning, noise, timesteps)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._micro += 1
        if self._micro % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclass(frozen=True)
class Schedule:
    """Numbers of Algorithm 1 and this process's place among the ranks."""

    inner_steps: int
    publisher_steps: int
    illegal_weight: float = 1.0
    legal_weight: float = 1.0
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class StepRecord:
    """Losses of one step on this rank: means over its illegal and its legal samples, times what its share weighs."""

    kind: StepKind
    k: int
    l: int  # noqa: E741  (the paper's index of the lower loop)
    step: int
    illegal_loss: float
    legal_loss: float


def alternate(
    engine: Engine,
    optimizer: BilevelOptimizer,
    lower: BatchSource,
    upper: BatchSource | None,
    schedule: Schedule,
    *,
    first_k: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[StepRecord]:
    """Run Algorithm 1 from publisher step `first_k`, yielding a record after every step.

    upper=None leaves the publisher steps out: relearning. Collective: every rank must exhaust the iterator.
    Raises RaygardError if a loss is not finite.
    """

    def run(kind: StepKind, source: BatchSource, k: int, l: int, step: int) -> StepRecord:  # noqa: E741
        optimizer.kind = kind
        sums = torch.zeros(2, dtype=torch.float64)
        batches = source.batches(
            step, rank=schedule.rank, world_size=schedule.world_size, accumulation=schedule.accumulation
        )
        for batch in batches:
            loss, illegal, legal = _objective(engine, batch.to(device), kind, schedule)
            engine.backward(loss)
            engine.step()
            sums += torch.stack([illegal, legal]).detach().double().cpu()
        illegal_loss, legal_loss = (sums / len(batches)).tolist()
        if not torch.isfinite(sums).all():
            raise RaygardError(
                f"the {kind} loss is not finite at publisher step {k} (illegal {illegal_loss}, legal {legal_loss}); "
                "lower bilevel.user_lr or mask.mask_lr"
            )
        return StepRecord(kind, k, l, step, illegal_loss, legal_loss)

    for k in range(first_k, schedule.publisher_steps):
        for l in range(schedule.inner_steps):  # noqa: E741
            yield run("user", lower, k, l, k * schedule.inner_steps + l)
        if upper is not None:
            yield run("publisher", upper, k, schedule.inner_steps, k)


def _objective(engine: Engine, batch: Batch, kind: StepKind, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    losses = engine(batch.latents, batch.conditioning, batch.noise, batch.timesteps)
    illegal, legal = (losses[role].mean() * batch.weight for role in (batch.illegal, ~batch.illegal))
    if kind == "user":
        return illegal + legal, illegal, legal  # Eq 7
    return schedule.legal_weight * legal - schedule.illegal_weight * illegal, illegal, legal  # Eq 5
