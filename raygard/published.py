"""What an adaptation is trained with unless a configuration says otherwise, and which settings concern which.

The numbers are those of the commands documented with diffusers' training scripts, which are the form in which users
run the methods: `learning_rate` is the effective one where a command scales it by the batch.
"""

from __future__ import annotations

from typing import Any

# The attention projections that diffusers' own LoRA scripts train.
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")

PUBLISHED: dict[str, dict[str, Any]] = {
    # The attack of IMMA's experiments (arXiv 2311.18815): 50 epochs of 20 pictures, at diffusers' rank and rate
    "lora": {
        "learning_rate": 1e-4,
        "train_batch_size": 1,
        "max_train_steps": 1000,
        "rank": 4,
        "target_modules": LORA_TARGETS,
    },
    # Ruiz et al. 2023 (arXiv 2208.12242)
    "dreambooth": {
        "learning_rate": 5e-6,
        "train_batch_size": 1,
        "max_train_steps": 400,
        "learn_as": "sks",
    },
    # Gal et al. 2022 (arXiv 2208.01618): 5e-4 scaled by four accumulated pictures
    "textual-inversion": {
        "learning_rate": 2e-3,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_train_steps": 3000,
        "learn_as": "<learned>",
    },
    # Kumari et al. 2023 (arXiv 2212.04488): 1e-5 scaled by a batch of two, twice that with class pictures
    "custom-diffusion": {
        "learning_rate": 2e-5,
        "train_batch_size": 2,
        "max_train_steps": 250,
        "learn_as": "<new1>",
    },
}

# In effect with `class_prompt` only.
PRIOR_PRESERVATION: dict[str, dict[str, Any]] = {
    "dreambooth": {"num_class_images": 200, "prior_loss_weight": 1.0, "max_train_steps": 800},
    "custom-diffusion": {"num_class_images": 200, "prior_loss_weight": 1.0, "learning_rate": 4e-5},
}

# Settings that only some methods read.
READ_BY: dict[str, tuple[str, ...]] = {
    "rank": ("lora",),
    "target_modules": ("lora",),
    "class_prompt": ("dreambooth", "custom-diffusion"),
    "num_class_images": ("dreambooth", "custom-diffusion"),
    "prior_loss_weight": ("dreambooth", "custom-diffusion"),
    "initializer_token": ("textual-inversion", "custom-diffusion"),
}
