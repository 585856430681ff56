"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, noise or velocity as the target.

Shape letters: B batch, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.families.base import Config, Family, LossSettings
from raygard.diffusion.loss import DiffusionLoss, TrainingLoss, predict_from_text

# Of CLIP's text encoders.
CLIP_TOKENS = 77
_UNET = {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "sample_size": 64}


class StableDiffusion(Family):
    name = "Stable Diffusion 1.x/2.x"
    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    text_parts: ClassVar[Mapping[str, str]] = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
    # The safety checker would blacken the very pictures that are to be measured.
    pipeline_settings: ClassVar[Config] = {"safety_checker": None, "requires_safety_checker": False}
    default_sampling = (50, 7.5)
    # What the releases' unet/config.json say, where it is not diffusers' default.
    shapes: ClassVar[Mapping[str, Config]] = {
        "SD1.5-shape": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "SD2.1-shape": {
            **_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    }

    def embed(
        self, parts: Mapping[str, Any], captions: Sequence[str], device: torch.device | str, denoiser_config: Config
    ) -> Conditioning:
        return Conditioning(text=encode_captions(parts["tokenizer"], parts["text_encoder"], captions))

    def loss(self, settings: LossSettings) -> TrainingLoss:
        return DiffusionLoss(settings.scheduler, settings.prediction_type, settings.snr_gamma)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, vae_factor: int
    ) -> Tensor:
        return predict_from_text(denoiser, noisy, timesteps, conditioning)

    def blank_conditioning(self, config: Config) -> Conditioning:
        return Conditioning(text=torch.empty(1, CLIP_TOKENS, config["cross_attention_dim"]))


@torch.no_grad()
def encode_captions(tokenizer: Any, encoder: Any, captions: Sequence[str]) -> Tensor:
    """Last hidden states as StableDiffusionPipeline computes them, padded to the model's length: (len, L, D)."""
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    uses_mask = getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if uses_mask else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
