"""Full and attention-only fine-tuning of the denoiser."""

from __future__ import annotations

from torch import nn

from raygard.adaptation.task import Adaptation, Task
from raygard.adaptation.training import AdaptResult
from raygard.diffusion.layers import attention_tensors
from raygard.errors import RaygardError


@Adaptation
def full(task: Task) -> AdaptResult:
    """Fine-tune every tensor of the denoiser that is not frozen."""
    return task.train(task.learned())


@Adaptation
def attention(task: Task) -> AdaptResult:
    """Fine-tune the self- and cross-attention layers only (`to_q`, `to_k`, `to_v`, `to_out`).

    Raises RaygardError also if the model has none, or the mask freezes all of them.
    """
    keep_trainable(task.denoiser, set(attention_tensors(task.denoiser, "attention")), "tensors of attention layers")
    return task.train(task.learned())


def keep_trainable(denoiser: nn.Module, names: set[str], what: str, *, may_be_none: bool = False) -> None:
    """Let only `names` require a gradient, of those that do. what: the tensors of these names, in words.

    Raises RaygardError if none is left, because all of them are frozen.
    """
    count = 0
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)
        count += parameter.requires_grad
    if not count and not may_be_none:
        raise RaygardError(f"nothing to train: the mask freezes all {len(names)} {what}")
