"""Stable Diffusion 3 and 3.5: a transformer, flow matching, two CLIP text encoders and T5, which may be missing.

Shape letters: B batch, C latent channels, H, W latent sides, L tokens, D text features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.families.base import Config
from raygard.diffusion.families.flow import FlowFamily
from raygard.diffusion.families.stable_diffusion import CLIP_TOKENS

# Of StableDiffusion3Pipeline, for training and for drawing alike.
T5_TOKENS = 256


class StableDiffusion3(FlowFamily):
    name = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    text_parts: ClassVar[Mapping[str, str]] = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    optional_parts = frozenset({"tokenizer_3", "text_encoder_3"})
    sampler_settings: ClassVar[Config] = {"max_sequence_length": T5_TOKENS}
    default_sampling = (28, 7.0)
    num_text_tokens = CLIP_TOKENS + T5_TOKENS
    # transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
    shapes: ClassVar[Mapping[str, Config]] = {
        "SD3-medium-shape": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 192,
        }
    }

    def embed(
        self, parts: Mapping[str, Any], captions: Sequence[str], device: torch.device | str, denoiser_config: Config
    ) -> Conditioning:
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        transformer: Any = None
        if parts["text_encoder_3"] is None:
            # The pipeline asks it for the width of the zeros that it takes in the place of T5's features.
            with torch.device("meta"):
                transformer = SD3Transformer2DModel.from_config(dict(denoiser_config))
        with torch.no_grad():
            pipeline: Any = StableDiffusion3Pipeline(transformer=transformer, vae=None, scheduler=None, **parts)
            text, _, pooled, _ = pipeline.encode_prompt(
                list(captions), None, None, device=device, do_classifier_free_guidance=False,
                max_sequence_length=T5_TOKENS,
            )  # fmt: skip
        return Conditioning(text=text, pooled=pooled)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, vae_factor: int
    ) -> Tensor:
        dtype = next(denoiser.parameters()).dtype
        text, pooled = conditioning["text"].to(dtype), conditioning["pooled"].to(dtype)
        return denoiser(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timesteps,
            return_dict=False,
        )[0]
