"""SDXL: a UNet, two CLIP text encoders, a pooled text and the picture's size as added conditioning.

Shape letters: B batch, C latent channels, H, W latent sides, L tokens, D text features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.families.base import Config, Family, LossSettings
from raygard.diffusion.families.stable_diffusion import CLIP_TOKENS
from raygard.diffusion.loss import DiffusionLoss, TrainingLoss

# Height and width as drawn, top and left of the crop, height and width wanted.
NUM_TIME_IDS = 6


class SDXL(Family):
    name = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    text_parts: ClassVar[Mapping[str, str]] = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    # An invisible watermark would change the very pictures that are to be measured.
    pipeline_settings: ClassVar[Config] = {"add_watermarker": False}
    default_sampling = (50, 5.0)
    # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, where it is not diffusers' default.
    shapes: ClassVar[Mapping[str, Config]] = {
        "SDXL-shape": {
            "sample_size": 128,
            "in_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    }

    def embed(
        self, parts: Mapping[str, Any], captions: Sequence[str], device: torch.device | str, denoiser_config: Config
    ) -> Conditioning:
        from diffusers import StableDiffusionXLPipeline

        with torch.no_grad():
            pipeline: Any = StableDiffusionXLPipeline(vae=None, unet=None, scheduler=None, **parts)
            text, _, pooled, _ = pipeline.encode_prompt(
                list(captions), device=device, do_classifier_free_guidance=False
            )
        return Conditioning(text=text, pooled=pooled)

    def loss(self, settings: LossSettings) -> TrainingLoss:
        predict = partial(self.predict, vae_factor=settings.vae_factor())
        return DiffusionLoss(settings.scheduler, settings.prediction_type, settings.snr_gamma, predict)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, vae_factor: int
    ) -> Tensor:
        """As `Family.predict`. Pictures are called uncropped, as the pipeline asks for them, though they may be."""
        dtype = next(denoiser.parameters()).dtype
        height, width = (side * vae_factor for side in noisy.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=noisy.device)
        added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": sizes.expand(len(noisy), NUM_TIME_IDS)}
        text = conditioning["text"].to(dtype)
        return denoiser(noisy.to(dtype), timesteps, text, added_cond_kwargs=added, return_dict=False)[0]

    def blank_conditioning(self, config: Config) -> Conditioning:
        pooled = config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * config["addition_time_embed_dim"]
        text = torch.empty(1, CLIP_TOKENS, config["cross_attention_dim"])
        return Conditioning(text=text, pooled=torch.empty(1, pooled))
