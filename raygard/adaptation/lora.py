"""LoRA through peft (Hu et al. 2021, arXiv 2106.09685): low-rank matrices beside the weights that are not frozen."""

from __future__ import annotations

import re
from typing import Any, cast

import torch

from raygard.adaptation.task import Adaptation, Task
from raygard.adaptation.training import AdaptResult
from raygard.diffusion.families import denoiser_folder
from raygard.mask.adapters import lora_targets
from raygard.seeding import derive_seed


@Adaptation
def lora(task: Task) -> AdaptResult:
    """Train an adapter of `config.rank` for `config.target_modules` and merge it into the denoiser at the end.

    Modules whose weight is frozen get no adapter, so that merging changes no frozen tensor.
    `AdaptResult.adapter` is what the pipeline's `save_lora_weights` writes. Its scale is one (alpha equals
    the rank), which every reader takes where a file does not say.
    Raises RaygardError also for target modules the model does not have, or if the mask leaves none.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    denoiser, config = task.denoiser, task.config
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    targets = lora_targets(denoiser, config.target_modules, {name for name, free in flags.items() if not free})
    rows = task.learned()
    denoiser.requires_grad_(False)
    model = cast(Any, denoiser)
    with torch.random.fork_rng():
        # peft draws the first values from the global stream.
        torch.manual_seed(derive_seed(task.seed, "lora"))
        model.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.rank,
                init_lora_weights="gaussian",
                target_modules="|".join(map(re.escape, targets)),
            )
        )
    try:
        result = task.train(rows)
        # peft's names, lora_A and lora_B: diffusers renames attention layers only, and cannot read the mixture.
        factors = get_peft_model_state_dict(denoiser)
        prefix = denoiser_folder(denoiser)
        result.adapter.update({f"{prefix}.{name}": factor.detach().cpu().clone() for name, factor in factors.items()})
        model.fuse_lora()
    finally:
        model.unload_lora()
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(flags[name])
    return result
