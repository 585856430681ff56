"""IMMA: weights from which an illegal class is hard to learn (Zheng and Yeh, arXiv 2311.18815).

With phi the parameters of an inner adaptation and theta_U the immunised tensors, the published code alternates
    phi     <- phi - a dL(x_A; theta, phi)/dphi            inner: the attacker learns the illegal pictures
    theta_U <- theta_U + b dL(x_I; theta, phi)/dtheta_U    outer: the publisher raises his loss
to first order: nothing is unrolled, phi is carried from round to round (methods.md, section 7.1). Both steps are AdamW
with clipped gradients, as in the scripts. The same loop drives one process and DeepSpeed.

Shape letters: B pictures of a batch, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raygard.bilevel.alternation import DenoiserLoss
from raygard.diffusion.cache import LatentSet
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.layers import attention_tensors
from raygard.diffusion.loss import TrainingLoss, draw
from raygard.editing.inner import INNER, TextModel
from raygard.editing.sides import SIDES, Side, TwoSidedAdamW
from raygard.errors import RaygardError, nearest
from raygard.seeding import generator
from raygard.shares import largest_share, share


@dataclass(frozen=True)
class IMMASettings:
    """inner: name in `raygard.editing.inner.INNER`. layers: immunised tensors, see `attention_tensors`; "attention" is
    the published code's, "cross-kv" has a fifth of its parameters in Stable Diffusion 1.x.

    rounds: alternations; the LoRA script takes 1,000 steps in turn, so 500. inner_steps, outer_steps: of one
    round; inner_steps 0 is plain ascent on the illegal loss (the code's `--max`).
    inner_lr, outer_lr: None takes the inner adaptation's published ones, which suit Stable Diffusion at 512 px.
    train_batch_size: pictures of one step over all workers and accumulation steps.
    retain_weight: weight of the loss on pictures that must stay drawable, 0 as in IMMA (MIMA: 1); it is taken on the
    release itself, from which legal users start.
    """

    inner: str = "lora"
    layers: str = "attention"
    rounds: int = 500
    inner_steps: int = 1
    outer_steps: int = 1
    inner_lr: float | None = None
    outer_lr: float | None = None
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    retain_weight: float = 0.0

    def micro_batch(self, num_workers: int) -> int:
        """Pictures of one micro-batch; `num_workers` divides the batch."""
        return largest_share(self.train_batch_size, num_workers * self.gradient_accumulation_steps)

    def __post_init__(self) -> None:
        for field in ("rounds", "inner_steps", "outer_steps", "train_batch_size", "gradient_accumulation_steps"):
            lowest = 0 if field == "inner_steps" else 1
            if getattr(self, field) < lowest:
                raise RaygardError(f"IMMA's {field} must be at least {lowest}, got {getattr(self, field)}")
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise RaygardError(
                f"IMMA's train_batch_size {self.train_batch_size} must be a multiple of its "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        for field in ("inner_lr", "outer_lr"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise RaygardError(f"IMMA's {field} must be above 0, got {getattr(self, field)}")
        for field in ("weight_decay", "max_grad_norm", "retain_weight"):
            if not getattr(self, field) >= 0:
                raise RaygardError(f"IMMA's {field} must be at least 0, got {getattr(self, field)}")

    @property
    def round(self) -> tuple[Side, ...]:
        """The sides of one round's steps, in order."""
        inner: list[Side] = ["inner"] * self.inner_steps
        outer: list[Side] = ["outer"] * self.outer_steps
        return (*inner, *outer)


class Immunisation(DenoiserLoss):
    """A denoiser as the attacker has it, and as it is released, with the training loss: one module for an engine.

    The denoiser's float32 parameters are trained in place. names: of the immunised tensors. Raises RaygardError for an
    unknown inner adaptation or layers.
    """

    def __init__(
        self, denoiser: nn.Module, loss: TrainingLoss, seed: int, settings: IMMASettings, text: TextModel | None
    ) -> None:
        super().__init__(denoiser, loss)
        if settings.inner not in INNER:
            raise RaygardError(f"unknown inner adaptation '{settings.inner}'{nearest(settings.inner, INNER)}")
        self.names = attention_tensors(denoiser, settings.layers)
        denoiser.requires_grad_(False)
        self._immunised = {name: denoiser.get_parameter(name) for name in self.names}
        self.inner = INNER[settings.inner](denoiser, self._immunised, seed, text, settings.retain_weight > 0)
        for parameter in [*self._immunised.values(), *self.inner.phi()]:
            parameter.requires_grad_(True)

    def forward(
        self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor, *kept: Any
    ) -> Tensor:
        """Loss of each picture under attack, then that of each picture retained, under the release: (B + R,).

        conditioning: as `InnerAdaptation.conditioning` gives it. kept: latents, conditioning, noise and timesteps of R
        pictures; may be left out.
        """
        attacked = self.inner.embed(conditioning).to(latents.device)
        errors = self.errors(self.denoiser, latents, attacked, noise, timesteps)
        if not kept:
            return errors
        release = self.denoiser if self.inner.release is None else self.inner.release
        return torch.cat([errors, self.errors(release, *kept)])

    def optimizer(self, settings: IMMASettings) -> TwoSidedAdamW:
        """The optimizer of both sides, with the published learning rates where none are set."""
        published = dict(zip(SIDES, self.inner.published_lr, strict=True))
        chosen: dict[Side, float | None] = {"inner": settings.inner_lr, "outer": settings.outer_lr}
        lr = {side: published[side] if rate is None else rate for side, rate in chosen.items()}
        sides: dict[Side, list[nn.Parameter]] = {"inner": self.inner.phi(), "outer": list(self._immunised.values())}
        return TwoSidedAdamW(sides, lr, weight_decay=settings.weight_decay)


class Engine(Protocol):
    """What the loop needs of DeepSpeed's engine around `Immunisation`."""

    def __call__(self, *batch: Any) -> Tensor: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


class OneProcess:
    """One process without DeepSpeed; gradients are computed and clipped for the side at hand alone."""

    def __init__(self, module: Immunisation, optimizer: TwoSidedAdamW, settings: IMMASettings) -> None:
        self.module, self.optimizer, self.max_norm = module, optimizer, settings.max_grad_norm
        self.accumulation, self._micro = settings.gradient_accumulation_steps, 0

    def __call__(self, *batch: Any) -> Tensor:
        errors: Tensor = self.module(*batch)
        return errors

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward(inputs=self.optimizer.trained())

    def step(self) -> None:
        self._micro += 1
        if self._micro % self.accumulation:
            return
        if self.max_norm > 0:
            nn.utils.clip_grad_norm_(self.optimizer.trained(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Place:
    """This process among the ranks, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Pictures:
    """Deals batches of one stream, as a function of (seed, stream, step, slot) alone.

    conditioning: what of the captions goes into a batch, by rows. Pictures are drawn uniformly.
    """

    data: LatentSet
    conditioning: Callable[[LatentSet, Tensor], Conditioning]
    seed: int
    stream: str
    num_timesteps: int

    def batches(self, step: int, settings: IMMASettings, place: Place) -> list[tuple[Any, ...]]:
        """Latents, conditioning, noise and timesteps of this rank at `step`, one tuple for each accumulation step."""
        size, num_shares = settings.train_batch_size, place.world_size * settings.gradient_accumulation_steps
        rows = torch.randint(len(self.data), (size,), generator=generator(self.seed, self.stream, "rows", step))
        dealt = []
        for index in range(place.rank, num_shares, place.world_size):
            slots = share(size, num_shares, index)
            eps, noise, timesteps = draw(self.seed, self.stream, step, slots, self.data.shape, self.num_timesteps)
            picked = rows[slots.start : slots.stop]
            batch = self.data.latents(picked, eps), self.conditioning(self.data, picked), noise, timesteps
            dealt.append(tuple(part.to(place.device) for part in batch))
        return dealt


@dataclass(frozen=True)
class StepRecord:
    """Mean losses of one step on this rank. k: round. l: step of the round. step: over all rounds.

    retain_loss: of the release on what it must keep, of outer steps with a retain term.
    """

    side: Side
    k: int
    l: int  # noqa: E741
    step: int
    illegal_loss: float
    retain_loss: float | None


def immunise(
    engine: Engine,
    optimizer: TwoSidedAdamW,
    illegal: Pictures,
    retain: Pictures | None,
    settings: IMMASettings,
    place: Place | None = None,
    *,
    first_round: int = 0,
) -> Iterator[StepRecord]:
    """Alternate from round `first_round` on, yielding a record after every step.

    engine: around an `Immunisation` and its `optimizer`. Collective: every rank must exhaust the iterator. Raises
    RaygardError if the batch cannot be divided among the ranks, or a loss is not finite.
    """
    place = place or Place()
    shares = place.world_size * settings.gradient_accumulation_steps
    if settings.train_batch_size % shares:
        raise RaygardError(
            f"IMMA's train_batch_size {settings.train_batch_size} cannot be divided among {place.world_size} workers x "
            f"{settings.gradient_accumulation_steps} accumulation steps; give it a multiple of {shares}"
        )
    turns = settings.round
    for k, (l, side) in product(range(first_round, settings.rounds), enumerate(turns)):  # noqa: E741
        step, sums = k * len(turns) + l, torch.zeros(2, dtype=torch.float64)
        optimizer.side = side
        batches = illegal.batches(step, settings, place)
        keeps = retain is not None and side == "outer"
        kept = retain.batches(step, settings, place) if retain is not None and keeps else [()] * len(batches)
        for batch, also in zip(batches, kept, strict=True):
            errors = engine(*batch, *also)
            count = len(batch[-1])
            error, release = errors[:count].mean(), errors[count:].sum() / count
            engine.backward(error if side == "inner" else settings.retain_weight * release - error)
            engine.step()
            sums += torch.stack([error, release]).detach().double().cpu()
        illegal_loss, retain_loss = (sums / len(batches)).tolist()
        if not math.isfinite(illegal_loss):
            raise RaygardError(
                f"the illegal loss is {illegal_loss} at IMMA step {step + 1}; lower the learning rates "
                f"(inner {optimizer.lr['inner']:g}, outer {optimizer.lr['outer']:g})"
            )
        yield StepRecord(side, k, l, step, illegal_loss, retain_loss if keeps else None)


def pictures(
    module: Immunisation, illegal: LatentSet, retain: LatentSet | None, seed: int, settings: IMMASettings
) -> tuple[Pictures, Pictures | None]:
    """What both sides learn from, and what the release must keep.

    illegal: x_A and x_I, the same in the published scripts. Raises RaygardError for missing pictures, and for a retain
    weight without pictures or the reverse.
    """
    if len(illegal) == 0:
        raise RaygardError("IMMA needs illegal pictures to learn from")
    if settings.retain_weight > 0 and (retain is None or len(retain) == 0):
        raise RaygardError("retain_weight is above 0 but there are no pictures to retain; give some or set it to 0")
    if settings.retain_weight == 0 and retain is not None:
        raise RaygardError("pictures to retain have no effect with retain_weight 0; leave them out or raise it")
    steps = module.loss.num_timesteps
    attacked = Pictures(illegal, module.inner.conditioning, seed, "imma", steps)
    return attacked, None if retain is None else Pictures(retain, _cached, seed, "imma retain", steps)


def _cached(data: LatentSet, rows: Tensor) -> Conditioning:
    return data.conditioning[rows]


def imma_values(
    denoiser: nn.Module,
    illegal: LatentSet,
    loss: TrainingLoss,
    *,
    seed: int,
    settings: IMMASettings | None = None,
    retain: LatentSet | None = None,
    text: TextModel | None = None,
) -> dict[str, Tensor]:
    """Immunised tensors by name, float32, CPU; `denoiser` is not changed. One process.

    illegal, retain: as `pictures` takes them. text: for the inner adaptation "textual-inversion" only.
    Equal seeds give equal values on the CPU. Local, on the device of `denoiser`.
    Raises RaygardError as `pictures`, `Immunisation` and `immunise` do.
    """
    settings = settings or IMMASettings()
    own = copy.deepcopy(denoiser).float()
    module = Immunisation(own, loss, seed, settings, text)
    optimizer = module.optimizer(settings)
    material = pictures(module, illegal, retain, seed, settings)
    place = Place(device=next(own.parameters()).device)
    for _ in immunise(OneProcess(module, optimizer, settings), optimizer, *material, settings, place):
        pass
    return {name: own.get_parameter(name).detach().cpu().clone() for name in module.names}
