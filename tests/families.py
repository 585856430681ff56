"""A small pipeline of random weights of every family, made on the spot: latents 4 x 8 x 8 of pictures of 16 pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.conftest import make_tiny_sd
from tests.letters import ALPHABET, TOKENS, letter_tokenizer

CLIP_WIDTH, T5_WIDTH = 16, 32


def clip(**settings: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(TOKENS), hidden_size=CLIP_WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=CLIP_WIDTH,
        bos_token_id=len(TOKENS) - 2, eos_token_id=len(TOKENS) - 1, pad_token_id=len(TOKENS) - 1, **settings,
    )  # fmt: skip


def clip_tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return letter_tokenizer(Path(folder), model_max_length=8)


def t5() -> tuple[Any, Any]:
    """Tokenizer of single letters, and encoder."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in ALPHABET)]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False,
        is_encoder_decoder=False,
    )  # fmt: skip
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0), T5EncoderModel(config).eval()


def autoencoder(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16, **settings,
    )  # fmt: skip


def make_tiny_sdxl(folder: Path) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * CLIP_WIDTH, attention_head_dim=4, norm_num_groups=4, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025), unet=unet, tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(),
        text_encoder=CLIPTextModel(clip()), text_encoder_2=CLIPTextModelWithProjection(clip(hidden_act="gelu")),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
            steps_offset=1,
        ), add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tiny_sd3(folder: Path, with_t5: bool = True) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * CLIP_WIDTH, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609), transformer=transformer,
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=tokenizer_3,
        text_encoder=CLIPTextModelWithProjection(clip()),
        text_encoder_2=CLIPTextModelWithProjection(clip(hidden_act="gelu")), text_encoder_3=text_encoder_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tiny_flux(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer_2, text_encoder_2 = t5()
    FluxPipeline(
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer,
        tokenizer=clip_tokenizer(), tokenizer_2=tokenizer_2, text_encoder=CLIPTextModel(clip()),
        text_encoder_2=text_encoder_2, scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


# By the pipeline's class, as in model_index.json.
TINY: dict[str, Callable[[Path], Path]] = {
    "StableDiffusionPipeline": make_tiny_sd,
    "StableDiffusionXLPipeline": make_tiny_sdxl,
    "StableDiffusion3Pipeline": make_tiny_sd3,
    "FluxPipeline": make_tiny_flux,
}
