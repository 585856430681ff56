"""Flux.1: a transformer on packed latents, flow matching, CLIP's pooled text and T5, guidance as an input.

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

# Of FluxPipeline, for training and for drawing alike.
T5_TOKENS = 512
# FluxPipeline's default_sample_size; the transformer's config.json has no size.
SAMPLE_SIZE = 128
# What the guidance input says while training: the default of FluxPipeline and of diffusers' DreamBooth scripts.
GUIDANCE = 3.5
NUM_TRAIN_TIMESTEPS = 1000


class Flux(FlowFamily):
    name = "Flux.1"
    pipeline = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_parts: ClassVar[Mapping[str, str]] = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    sampler_settings: ClassVar[Config] = {"max_sequence_length": T5_TOKENS}
    default_sampling = (28, GUIDANCE)
    num_text_tokens = T5_TOKENS
    # transformer/config.json of black-forest-labs/FLUX.1-dev.
    shapes: ClassVar[Mapping[str, Config]] = {
        "Flux.1-dev-shape": {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        }
    }

    def embed(
        self,
        parts: Mapping[str, Any],
        captions: Sequence[str],
        device: torch.device | str,
        denoiser_config: Config,
    ) -> Conditioning:
        from diffusers import FluxPipeline

        with torch.no_grad():
            pipeline: Any = FluxPipeline(transformer=None, vae=None, scheduler=None, **parts)
            text, pooled, _ = pipeline.encode_prompt(list(captions), None, device=device, max_sequence_length=T5_TOKENS)
        return Conditioning(text=text, pooled=pooled)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, vae_factor: int
    ) -> Tensor:
        """As `Family.predict`. H and W are even."""
        from diffusers import FluxPipeline

        pipeline: Any = FluxPipeline
        dtype, device = next(denoiser.parameters()).dtype, noisy.device
        batch, channels, height, width = noisy.shape
        text, pooled = conditioning["text"].to(dtype), conditioning["pooled"].to(dtype)
        guidance = torch.full((batch,), GUIDANCE, dtype=dtype, device=device) if _is_guided(denoiser) else None
        predicted = denoiser(
            hidden_states=pipeline._pack_latents(noisy.to(dtype), batch, channels, height, width),
            timestep=timesteps / NUM_TRAIN_TIMESTEPS,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, dtype=dtype, device=device),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, height, width, vae_scale_factor=1)

    def latent_channels(self, config: Config) -> int:
        return int(config["in_channels"]) // 4

    def sample_size(self, config: Config) -> int:
        return SAMPLE_SIZE


def _is_guided(denoiser: Any) -> bool:
    return bool(denoiser.config.guidance_embeds)
