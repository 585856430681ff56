"""Full and attention-only fine-tuning of the denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import nn

from raygard.adaptation.prompts import Release, learned
from raygard.adaptation.training import AdaptResult, Run, begin, train
from raygard.config import AdaptConfig
from raygard.diffusion.loss import DiffusionLoss
from raygard.errors import RaygardError

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet
    from raygard.mask import FreezeMask


def full(
    unet: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    loss: DiffusionLoss,
    *,
    mask: FreezeMask | None,
    seed: int,
    release: Release | None = None,
    **run: Unpack[Run],
) -> AdaptResult:
    """Fine-tune every tensor of `unet` that is not frozen, in place.

    data: the pictures to train on. mask: applied (and verified) first; None leaves `requires_grad` as it is.
    Frozen tensors have no gradient and no optimizer state. The other arguments and errors are those of `train`.
    """
    begin(unet, config, mask)
    return train(unet, learned(data, config, release), config, loss, seed=seed, **run)


def attention(
    unet: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    loss: DiffusionLoss,
    *,
    mask: FreezeMask | None,
    seed: int,
    release: Release | None = None,
    **run: Unpack[Run],
) -> AdaptResult:
    """Fine-tune the self- and cross-attention layers only, in place (`to_q`, `to_k`, `to_v`, `to_out`).

    Arguments and errors are those of `full`; RaygardError also if the mask freezes all of them.
    """
    begin(unet, config, mask)
    keep_trainable(unet, attention_names(unet), "tensors of attention layers")
    return train(unet, learned(data, config, release), config, loss, seed=seed, **run)


def attention_names(unet: nn.Module, *, cross_only: bool = False, projections: tuple[str, ...] = ()) -> set[str]:
    """Parameters of the attention layers. projections: only these modules of a layer, e.g. ("to_k", "to_v")."""
    from diffusers.models.attention_processor import Attention

    return {
        f"{layer}.{name}"
        for layer, module in unet.named_modules()
        if isinstance(module, Attention) and (module.is_cross_attention or not cross_only)
        for name, _ in module.named_parameters()
        if not projections or name.split(".")[0] in projections
    }


def keep_trainable(unet: nn.Module, names: set[str], what: str, *, may_be_none: bool = False) -> None:
    """Let only `names` require a gradient, of those that do. what: the tensors of these names, in words.

    Raises RaygardError if none is left, because the model has no such tensors or all of them are frozen.
    """
    count = 0
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)
        count += parameter.requires_grad
    if not names:
        raise RaygardError(f"nothing to train: the model has no {what}")
    if not count and not may_be_none:
        raise RaygardError(f"nothing to train: the mask freezes all {len(names)} {what}")
