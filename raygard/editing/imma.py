"""IMMA: weights from which an illegal class is hard to learn (Zheng and Yeh, arXiv 2311.18815).

With phi the parameters of an inner adaptation and theta_U the immunised tensors, the published code alternates
    phi     <- phi - a dL(x_A; theta, phi)/dphi            inner: the attacker learns the illegal pictures
    theta_U <- theta_U + b dL(x_I; theta, phi)/dtheta_U    outer: the publisher raises his loss
to first order: nothing is unrolled, phi is carried from round to round (methods.md, section 7.1). Both steps are AdamW
with clipped gradients, as in the scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygard.diffusion.cache import LatentSet
from raygard.diffusion.layers import attention_tensors
from raygard.diffusion.loss import DiffusionLoss, draw
from raygard.editing.inner import INNER, Adapted, KeepsText, TextModel
from raygard.errors import RaygardError, nearest
from raygard.seeding import generator


@dataclass(frozen=True)
class IMMASettings:
    """inner: name in `raygard.editing.inner.INNER`. layers: immunised tensors, see `attention_tensors`; "attention" is
    the published code's, "cross-kv" has a fifth of its parameters in Stable Diffusion 1.x.

    rounds: alternations; the LoRA script takes 1,000 steps in turn, so 500. inner_steps, outer_steps: of one
    round; inner_steps 0 is plain ascent on the illegal loss (the code's `--max`).
    inner_lr, outer_lr: None takes the inner adaptation's published ones, which suit Stable Diffusion at 512 px.
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
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    retain_weight: float = 0.0

    def __post_init__(self) -> None:
        for field, lowest in (("rounds", 1), ("inner_steps", 0), ("outer_steps", 1), ("train_batch_size", 1)):
            if getattr(self, field) < lowest:
                raise RaygardError(f"IMMA's {field} must be at least {lowest}, got {getattr(self, field)}")
        for field in ("inner_lr", "outer_lr"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise RaygardError(f"IMMA's {field} must be above 0, got {getattr(self, field)}")
        for field in ("weight_decay", "max_grad_norm", "retain_weight"):
            if not getattr(self, field) >= 0:
                raise RaygardError(f"IMMA's {field} must be at least 0, got {getattr(self, field)}")


def imma_values(
    unet: nn.Module,
    illegal: LatentSet,
    loss: DiffusionLoss,
    *,
    seed: int,
    settings: IMMASettings | None = None,
    retain: LatentSet | None = None,
    text: TextModel | None = None,
) -> dict[str, Tensor]:
    """Immunised tensors by name, float32, CPU; `unet` is not changed.

    illegal: pictures the inner adaptation learns and whose loss is raised (x_A and x_I, the same in the published
    scripts). retain: pictures for `settings.retain_weight`. text: for the inner adaptation "textual-inversion" only.
    Equal seeds give equal values on the CPU. Local, on the device of `unet`.
    Raises RaygardError for missing pictures, a retain weight without pictures or the reverse, an unknown inner
    adaptation or layers, or a loss that is no longer finite.
    """
    settings = settings or IMMASettings()
    if len(illegal) == 0:
        raise RaygardError("IMMA needs illegal pictures to learn from")
    if settings.retain_weight > 0 and (retain is None or len(retain) == 0):
        raise RaygardError("retain_weight is above 0 but there are no pictures to retain; give some or set it to 0")
    if settings.retain_weight == 0 and retain is not None:
        raise RaygardError("pictures to retain have no effect with retain_weight 0; leave them out or raise it")
    if settings.inner not in INNER:
        raise RaygardError(f"unknown inner adaptation '{settings.inner}'{nearest(settings.inner, INNER)}")
    parameters = dict(unet.named_parameters())
    theta = {
        name: nn.Parameter(parameters[name].detach().float().clone())
        for name in attention_tensors(unet, settings.layers)
    }
    inner = INNER[settings.inner](unet, theta, seed, text)
    adapted, release = Adapted(unet, inner.weights), Adapted(unet, lambda: theta)
    inner_lr, outer_lr = (
        published if chosen is None else chosen
        for chosen, published in zip((settings.inner_lr, settings.outer_lr), inner.published_lr, strict=True)
    )
    steps = {
        "inner": _Stepper(inner.parameters(), inner_lr, settings),
        "outer": _Stepper(list(theta.values()), outer_lr, settings),
    }
    size = settings.train_batch_size
    pictures = _Pictures(illegal, loss, seed, "imma", size)
    kept_pictures = None if retain is None else _Pictures(retain, loss, seed, "imma retain", size)
    round_ = ["inner"] * settings.inner_steps + ["outer"] * settings.outer_steps
    for number in range(settings.rounds * len(round_)):
        kind = round_[number % len(round_)]
        error = pictures.error(adapted, inner.text, number)
        if not math.isfinite(float(error.detach())):
            raise RaygardError(
                f"the illegal loss is {float(error.detach())} at IMMA step {number + 1}; lower the learning rates "
                f"(inner {inner_lr:g}, outer {outer_lr:g})"
            )
        objective = error
        if kind == "outer":
            objective = -error
            if kept_pictures is not None:
                objective = objective + settings.retain_weight * kept_pictures.error(release, KeepsText().text, number)
        steps[kind].descend(objective)
    return {name: value.detach().cpu().clone() for name, value in theta.items()}


class _Stepper:
    """AdamW over some tensors, gradients taken for them alone, so that phi and theta never mix."""

    def __init__(self, tensors: list[Tensor], lr: float, settings: IMMASettings) -> None:
        self.tensors, self.max_norm = tensors, settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(tensors, lr=lr, weight_decay=settings.weight_decay)

    def descend(self, objective: Tensor) -> None:
        gradients = torch.autograd.grad(objective, self.tensors, allow_unused=True)
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
        if self.max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.tensors, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Pictures:
    """Draws batches of pictures and gives the loss of a denoiser on them."""

    def __init__(self, data: LatentSet, loss: DiffusionLoss, seed: int, stream: str, batch_size: int) -> None:
        self.data, self.loss, self.seed, self.stream, self.batch_size = data, loss, seed, stream, batch_size

    def error(self, model: nn.Module, text: Callable[[LatentSet, Tensor], Tensor], step: int) -> Tensor:
        """Mean loss of batch number `step`, differentiable."""
        rng = generator(self.seed, self.stream, "rows", step)
        rows = torch.randint(len(self.data), (self.batch_size,), generator=rng)
        eps, noise, timesteps = draw(
            self.seed, self.stream, step, range(self.batch_size), self.data.shape, self.loss.num_timesteps
        )
        device = next(model.parameters()).device
        return self.loss.per_sample(
            model,
            self.data.latents(rows, eps).to(device),
            text(self.data, rows).to(device),
            noise.to(device),
            timesteps.to(device),
        ).mean()
