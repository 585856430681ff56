"""The training loop of all adaptations: what requires a gradient is trained, as diffusers' own scripts do it.

Built on accelerate, so that `accelerate launch` runs it on several processes. Pictures and noise are keyed by
their position in one global stream: W processes with batch B see what one process with batch W x B sees.
Shape letters: B batch, C latent channels, H, W latent sides, L tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from raygard.config import AdaptConfig
from raygard.diffusion.conditioning import Conditioning, joined
from raygard.diffusion.loss import TrainingLoss, draw
from raygard.errors import RaygardError, nearest, require_packages
from raygard.seeding import generator

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet


@dataclass(frozen=True)
class AdaptResult:
    """losses: one mean over the global batch for each optimizer step. optimizer_bytes: state of this process.

    paused: what goes on from here, if the adaptation was to pause before its end. Tensors, numbers, lists and
    dictionaries only, so that `torch.load(weights_only=True)` reads it.
    adapter: LoRA tensors under the names of diffusers' file; they are merged into the denoiser as well.
    embeddings: the vector (D,) of each token that the text encoder was taught. embeddings_only: the method trains
    nothing else.
    outside_mask: what was trained that no freeze mask governs, in words; empty if the mask governs all of it.
    """

    losses: list[float]
    seconds: float
    trainable_params: int
    optimizer_bytes: int
    paused: dict[str, Any] | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    embeddings_only: bool = False
    outside_mask: tuple[str, ...] = ()


class Run(TypedDict, total=False):
    """How far an adaptation goes and who watches it.

    on_step(step, loss) is called after every optimizer step, counted from 1. pause_at: stop after this step.
    resume: `paused` of a result with the same other arguments; the two parts equal one straight run bit for bit.
    """

    on_step: Callable[[int, float], None] | None
    pause_at: int | None
    resume: Mapping[str, Any] | None


class Learner(nn.Module):
    """Denoiser, and text encoder where that is trained, as one module: one wrapper synchronises all gradients."""

    def __init__(self, denoiser: nn.Module, loss: TrainingLoss, text: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser, self.loss, self.text = denoiser, loss, text

    def forward(self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Loss of each sample, float32 (B,). conditioning: its text is token ids (B, L) if the text encoder is live."""
        if self.text is not None:
            conditioning = Conditioning(text=self.text(conditioning["text"]))
        return self.loss.per_sample(self.denoiser, latents, conditioning, noise, timesteps)

    def trained(self) -> dict[str, nn.Parameter]:
        """What requires a gradient, the denoiser's tensors under their own names."""
        return {name.removeprefix("denoiser."): p for name, p in self.named_parameters() if p.requires_grad}


def train(
    denoiser: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    loss: TrainingLoss,
    *,
    seed: int,
    text: nn.Module | None = None,
    prior: LatentSet | None = None,
    **run: Unpack[Run],
) -> AdaptResult:
    """Train what requires a gradient in `denoiser` and `text`, in place, for `config.max_train_steps` optimizer steps.

    config.train_batch_size counts pictures for each process and accumulation step. Collective under
    `accelerate launch`.
    text: a live text encoder; the text of `data.conditioning` is then token ids (n, L). prior: pictures whose loss,
    times `config.prior_loss_weight`, is added (Ruiz et al. 2023, Eq 2).
    Equal seeds give equal weights on the CPU.
    Raises RaygardError if nothing is trainable, there are no pictures, or the loss is no longer finite.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_step, pause_at, resume = run.get("on_step"), run.get("pause_at"), run.get("resume")
    if len(data) == 0:
        raise RaygardError("no pictures to fine-tune on")
    learner = Learner(denoiser, loss, text)
    trained = learner.trained()
    if not trained:
        raise RaygardError("nothing to train: every tensor of the model is frozen")
    trainable = list(trained.values())
    started = time.monotonic()
    # accelerate keeps the precision of a process's first Accelerator and refuses another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
    )
    optimizer = _optimizer(config, trainable)
    scheduler = _lr_scheduler(config, optimizer, accelerator.num_processes)
    learner.train()
    model, optimizer, scheduler = accelerator.prepare(learner, optimizer, scheduler)
    losses: list[float] = []
    if resume is not None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(resume["parameters"][name])
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(resume["scaler"])
        losses = list(resume["losses"])
    last = config.max_train_steps if pause_at is None else min(pause_at, config.max_train_steps)
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = len(losses) * config.gradient_accumulation_steps
    samples = _samples(data, loss, "adapt", config.train_batch_size, world, rank, seed, first=seen)
    if prior is not None:
        kept = _samples(prior, loss, "prior", config.train_batch_size, world, rank, seed, first=seen)
        samples = (tuple(map(joined, zip(*both, strict=True))) for both in zip(samples, kept, strict=False))
    with _checkpointing(denoiser, config.gradient_checkpointing):
        for step in range(len(losses) + 1, last + 1):
            total = 0.0
            for _ in range(config.gradient_accumulation_steps):
                batch = [part.to(accelerator.device) for part in next(samples)]
                with accelerator.accumulate(model):
                    errors = model(*batch)
                    error = errors.mean()
                    if prior is not None:
                        own, other = errors.chunk(2)
                        error = own.mean() + config.prior_loss_weight * other.mean()
                    value = float(accelerator.reduce(error.detach(), reduction="mean"))
                    if not math.isfinite(value):
                        raise RaygardError(
                            f"the loss is {value} at step {step} of fine-tuning; lower adapt.learning_rate "
                            f"(now {config.learning_rate:g})"
                        )
                    accelerator.backward(error)
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                total += value
            losses.append(total / config.gradient_accumulation_steps)
            if on_step is not None:
                on_step(step, losses[-1])
    paused = None
    if last < config.max_train_steps:
        paused = {
            "losses": losses,
            # A copy: adapters are merged, and what they were is gone, before anybody writes this down.
            "parameters": {name: p.detach().clone() for name, p in trained.items()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
    learner.eval()
    return AdaptResult(
        losses=losses,
        seconds=time.monotonic() - started,
        trainable_params=sum(parameter.numel() for parameter in trainable),
        optimizer_bytes=_state_bytes(optimizer.state.values()),
        paused=paused,
    )


@contextmanager
def _checkpointing(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing while the denoiser trains; afterwards it is as before.

    diffusers takes torch's variant that is not reentrant: the other one gives a block whose input requires no gradient,
    as behind frozen tensors, none for its weights either.
    """
    switched = wanted and not denoiser.is_gradient_checkpointing
    if switched:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switched:
            denoiser.disable_gradient_checkpointing()


def _samples(
    data: LatentSet,
    loss: TrainingLoss,
    stream: str,
    batch_size: int,
    num_processes: int,
    process: int,
    seed: int,
    first: int,
) -> Iterator[tuple[Any, ...]]:
    """Endless (latents, conditioning, noise, timesteps) of this process, from the global batch number `first` on."""
    order = "data" if stream == "adapt" else stream
    for number, rows, positions in _batches(len(data), batch_size, num_processes, process, seed, order, first):
        eps, noise, timesteps = draw(seed, stream, number, positions, data.shape, loss.num_timesteps)
        yield data.latents(rows, eps), data.conditioning[rows], noise, timesteps


def _batches(
    num_rows: int, batch_size: int, num_processes: int, process: int, seed: int, stream: str, first: int
) -> Iterator[tuple[int, Tensor, list[int]]]:
    """Endless (number of the global batch, rows of this process, their positions in the global stream)."""
    epoch, order = -1, torch.empty(0)
    number = first
    while True:
        start = (number * num_processes + process) * batch_size
        positions = list(range(start, start + batch_size))
        rows = []
        for position in positions:
            if position // num_rows != epoch:
                epoch = position // num_rows
                order = torch.randperm(num_rows, generator=generator(seed, stream, epoch))
            rows.append(int(order[position % num_rows]))
        yield number, torch.tensor(rows), positions
        number += 1


def check_optimizer(config: AdaptConfig) -> None:
    """Raise RaygardError if the package of `config.optimizer` is missing, with what to install."""
    if config.optimizer == "adamw-8bit":
        require_packages("adapt.optimizer=adamw-8bit", "8bit", "bitsandbytes")


def _optimizer(config: AdaptConfig, trainable: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=config.learning_rate, momentum=config.sgd_momentum or 0.0)
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "adamw-8bit":
        check_optimizer(config)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trainable, **adam)
    # None leaves torch its choice among the others.
    return torch.optim.AdamW(trainable, **adam, fused=True if config.optimizer == "adamw-fused" else None)


def _lr_scheduler(config: AdaptConfig, optimizer: torch.optim.Optimizer, num_processes: int) -> Any:
    from diffusers.optimization import SchedulerType, get_scheduler

    known = sorted({kind.value for kind in SchedulerType} - {SchedulerType.PIECEWISE_CONSTANT.value})
    if config.lr_scheduler not in known:
        raise RaygardError(f"unknown adapt.lr_scheduler '{config.lr_scheduler}'{nearest(config.lr_scheduler, known)}")
    # accelerate advances a prepared scheduler once for each process at every optimizer step.
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps * num_processes,
        num_training_steps=config.max_train_steps * num_processes,
    )


def _state_bytes(states: Iterable[dict[str, Any]]) -> int:
    # By address: all states of the 8-bit optimizer share two tables.
    tensors = {value.data_ptr(): value for state in states for value in state.values() if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
