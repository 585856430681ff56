"""LoRA through peft (Hu et al. 2021, arXiv 2106.09685): low-rank matrices beside the weights that are not frozen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import nn

from raygard.adaptation.prompts import Release, learned
from raygard.adaptation.training import AdaptResult, Run, begin, train
from raygard.config import AdaptConfig
from raygard.diffusion.loss import DiffusionLoss
from raygard.mask.adapters import lora_targets
from raygard.seeding import derive_seed

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet
    from raygard.mask import FreezeMask


def lora(
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
    """Train an adapter of `config.rank` for `config.target_modules` and merge it into `unet` at the end.

    Modules whose weight is frozen get no adapter, so that merging changes no frozen tensor.
    `AdaptResult.adapter` is what `StableDiffusionPipeline.save_lora_weights` writes. Its scale is one (alpha equals
    the rank), which every reader takes where a file does not say. Arguments and errors are those of `full`;
    RaygardError also for target modules the model does not have, or if the mask leaves none.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    begin(unet, config, mask)
    flags = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    targets = lora_targets(unet, config.target_modules, {name for name, free in flags.items() if not free})
    rows = learned(data, config, release)
    unet.requires_grad_(False)
    model = cast(Any, unet)
    with torch.random.fork_rng():
        # peft draws the first values from the global stream.
        torch.manual_seed(derive_seed(seed, "lora"))
        model.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.rank,
                init_lora_weights="gaussian",
                target_modules="|".join(map(re.escape, targets)),
            )
        )
    try:
        result = train(unet, rows, config, loss, seed=seed, **run)
        # peft's names, lora_A and lora_B: diffusers renames attention layers only, and cannot read the mixture.
        factors = get_peft_model_state_dict(unet)
        result.adapter.update({f"unet.{name}": factor.detach().cpu().clone() for name, factor in factors.items()})
        model.fuse_lora()
    finally:
        model.unload_lora()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(flags[name])
    return result
