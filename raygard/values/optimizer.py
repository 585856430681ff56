"""What moves the values: AdamW over the frozen tensors alone, linear warm-up and cosine decay, on any engine."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from raygard.values_config import ValuesConfig


def make_optimizer(denoiser: nn.Module, frozen: Collection[str], settings: ValuesConfig) -> torch.optim.AdamW:
    """Let only the tensors `frozen` of `denoiser` require a gradient, and return the optimizer of them."""
    names = set(frozen)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name in names)
    return torch.optim.AdamW(
        [parameter for parameter in denoiser.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings: ValuesConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' "cosine" with warm-up, to be advanced after every step."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
