"""Full fine-tuning: every tensor that is not frozen is trained, as diffusers' own script does it.

Built on accelerate, so that `accelerate launch` runs it on several processes. Pictures and noise are keyed by
their position in one global stream: W processes with batch B see what one process with batch W x B sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raygard.config import AdaptConfig
from raygard.diffusion.loss import DiffusionLoss, draw
from raygard.errors import RaygardError, nearest
from raygard.seeding import generator

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet
    from raygard.mask import FreezeMask


@dataclass(frozen=True)
class AdaptResult:
    """losses: one mean over the global batch for each optimizer step. optimizer_bytes: state of this process.

    paused: what goes on from here, if the adaptation was to pause before its end. Tensors, numbers, lists and
    dictionaries only, so that `torch.load(weights_only=True)` reads it.
    """

    losses: list[float]
    seconds: float
    trainable_params: int
    optimizer_bytes: int
    paused: dict[str, Any] | None = None


def full(
    unet: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    loss: DiffusionLoss,
    *,
    mask: FreezeMask | None,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    pause_at: int | None = None,
    resume: Mapping[str, Any] | None = None,
) -> AdaptResult:
    """Fine-tune `unet` in place with AdamW for `config.max_train_steps` optimizer steps.

    data: the pictures to train on. mask: applied (and verified) first; None leaves `requires_grad` as it is.
    config.train_batch_size counts pictures for each process and accumulation step. on_step(step, loss) is
    called after every optimizer step, counted from 1. Collective under `accelerate launch`.
    pause_at: stop after this step. resume: `paused` of a result with the same other arguments; the two parts equal
    one straight run bit for bit.
    Frozen tensors have no gradient and no optimizer state. Equal seeds give equal weights on the CPU.
    Raises RaygardError if nothing is trainable, there are no pictures, or the loss is no longer finite.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if len(data) == 0:
        raise RaygardError("no pictures to fine-tune on")
    # An adaptation that broke off while it accumulated has left gradients.
    unet.zero_grad()
    if mask is not None:
        mask.apply(unet)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if not trainable:
        raise RaygardError("nothing to train: every tensor of the model is frozen")
    started = time.monotonic()
    # accelerate keeps the precision of a process's first Accelerator and refuses another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
    )
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    scheduler = _lr_scheduler(config, optimizer, accelerator.num_processes)
    unet.train()
    model, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    losses: list[float] = []
    if resume is not None:
        unet.load_state_dict(resume["parameters"], strict=False)
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(resume["scaler"])
        losses = list(resume["losses"])
    last = config.max_train_steps if pause_at is None else min(pause_at, config.max_train_steps)
    world, rank = accelerator.num_processes, accelerator.process_index
    seen = len(losses) * config.gradient_accumulation_steps
    batches = _batches(len(data), config.train_batch_size, world, rank, seed, first=seen)
    for step in range(len(losses) + 1, last + 1):
        total = 0.0
        for _ in range(config.gradient_accumulation_steps):
            number, rows, positions = next(batches)
            with accelerator.accumulate(model):
                error = _batch_loss(model, data, loss, accelerator.device, seed, number, rows, positions)
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
            "parameters": {name: p.detach() for name, p in unet.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
    # Mixed precision has put a `forward` in front of the class's, and it would outlive this call.
    vars(unet).pop("forward", None)
    vars(unet).pop("_original_forward", None)
    unet.eval()
    return AdaptResult(
        losses=losses,
        seconds=time.monotonic() - started,
        trainable_params=sum(parameter.numel() for parameter in trainable),
        optimizer_bytes=_state_bytes(optimizer.state.values()),
        paused=paused,
    )


def _batch_loss(
    model: nn.Module,
    data: LatentSet,
    loss: DiffusionLoss,
    device: torch.device,
    seed: int,
    number: int,
    rows: Tensor,
    positions: list[int],
) -> Tensor:
    eps, noise, timesteps = draw(seed, "adapt", number, positions, data.shape, loss.num_timesteps)
    return loss.per_sample(
        model,
        data.latents(rows, eps).to(device),
        data.text[rows].to(device),
        noise.to(device),
        timesteps.to(device),
    ).mean()


def _batches(
    num_rows: int, batch_size: int, num_processes: int, process: int, seed: int, first: int = 0
) -> Iterator[tuple[int, Tensor, list[int]]]:
    """Endless (number of the global batch, rows of this process, their positions in the global stream) from `first`."""
    epoch, order = -1, torch.empty(0)
    number = first
    while True:
        start = (number * num_processes + process) * batch_size
        positions = list(range(start, start + batch_size))
        rows = []
        for position in positions:
            if position // num_rows != epoch:
                epoch = position // num_rows
                order = torch.randperm(num_rows, generator=generator(seed, "data", epoch))
            rows.append(int(order[position % num_rows]))
        yield number, torch.tensor(rows), positions
        number += 1


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
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
