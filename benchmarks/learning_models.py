"""Models and pictures that mask_learning.py measures on: SD 2.1 at its own size on a GPU, a small twin on a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import UNET
from benchmarks.workers import TEXT_TOKENS
from raygard.bilevel.batches import BatchSource
from raygard.config import ModelConfig
from raygard.diffusion.cache import LatentSet, encode_pixels
from raygard.diffusion.conditioning import Conditioning, ConditioningRows
from raygard.diffusion.loss import TrainingLoss
from raygard.diffusion.model import load_loss
from raygard.diffusion.shape import KNOWN, family_of_shape, make_denoiser

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS = 8


@dataclass(frozen=True)
class Sizes:
    """What is run. text: of CLIP's text model; its vocabulary is CLIP's."""

    unet: dict[str, Any]
    vae_channels: tuple[int, ...]
    text: dict[str, int]
    batch: int

    @property
    def pixels(self) -> int:
        return int(self.unet["sample_size"]) * 8


TWIN = Sizes(
    {**UNET, "in_channels": 4},
    (32, 64, 160, 160),
    {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6},
    4,
)
SD21 = Sizes(
    {**KNOWN["SD2.1-shape"], "sample_size": 64},
    (128, 256, 512, 512),
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    16,
)
SIZES = SD21 if ON_GPU else TWIN


@dataclass(frozen=True)
class Material:
    """Pictures (n, H, W, 3) and tokens (n, L), what the encoders make of them, and the model's own noise schedule."""

    pixels: Tensor
    tokens: Tensor
    cached: LatentSet
    loss: TrainingLoss


def make_vae(sizes: Sizes) -> Any:
    from diffusers import AutoencoderKL

    channels = sizes.vae_channels
    blocks = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels,
        latent_channels=4,
        layers_per_block=2,
        sample_size=sizes.pixels,
    ).requires_grad_(False)


def make_text_encoder(sizes: Sizes) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**sizes.text, max_position_embeddings=TEXT_TOKENS)).requires_grad_(False)


@torch.no_grad()
def make_material(folder: Path) -> Material:
    """Random pictures and captions, encoded once in float32; what the caches of a run hold."""
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (ROWS, SIZES.pixels, SIZES.pixels, 3), generator=rng, dtype=torch.uint8)
    tokens = torch.randint(49_000, (ROWS, TEXT_TOKENS), generator=rng)
    torch.manual_seed(2)
    mean, std = encode_pixels(make_vae(SIZES).to(DEVICE), pixels, DEVICE)
    text = make_text_encoder(SIZES).to(DEVICE)(tokens.to(DEVICE))[0].cpu()
    conditioning = ConditioningRows(Conditioning(text=text), torch.arange(ROWS))
    classes = ["a"] * (ROWS // 2) + ["b"] * (ROWS // 2)
    cached = LatentSet(mean, std, conditioning, classes, list(classes), [])
    return Material(pixels, tokens, cached, load_loss(ModelConfig(pretrained_model_name_or_path=str(folder))))


def make_unet() -> nn.Module:
    torch.manual_seed(0)
    unet: nn.Module = make_denoiser(family_of_shape("SD2.1-shape"), SIZES.unet)
    return unet


def relearned(unet: nn.Module) -> dict[str, Tensor]:
    """theta_ft: a fine-tuning's distance from theta_pre, in random directions."""
    rng = torch.Generator().manual_seed(3)
    return {name: p.detach() + 1e-3 * torch.randn(p.shape, generator=rng) for name, p in unet.named_parameters()}


def make_batches(material: Material) -> list[BatchSource]:
    roles = [torch.arange(ROWS // 2)], [torch.arange(ROWS // 2, ROWS)]
    return [BatchSource(material.cached, *roles, SIZES.batch, 0, stream) for stream in ("lower", "upper")]


def make_schedule(folder: Path) -> Path:
    """A pipeline folder with nothing but SD's noise schedule."""
    from diffusers import DDPMScheduler

    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8")
    return folder
