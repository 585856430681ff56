"""A tiny random Stable Diffusion folder and small imagefolders, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from raygard.config import ModelConfig, TrackingConfig
from tests.letters import TOKENS, letter_tokenizer

Maker = Callable[..., Path]

# The same examples in every run, however slow the machine: a test that fails now and then says nothing about a change.
settings.register_profile("raygard", derandomize=True, print_blob=True, deadline=None)
settings.load_profile("raygard")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_tiny_sd(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A complete StableDiffusionPipeline with random weights: 16 x 16 pictures, 4 x 8 x 8 latents, 8
    tokens."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    source = folder.parent / f"{folder.name}-tokenizer"
    source.mkdir()
    tokenizer = letter_tokenizer(source, model_max_length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(TOKENS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=16,
            bos_token_id=len(TOKENS) - 2, eos_token_id=len(TOKENS) - 1, pad_token_id=len(TOKENS) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)
    return folder


def make_imagefolder(folder: Path, classes: Mapping[str, int], side: int = 16, seed: int = 0) -> Path:
    """Random pictures with metadata.jsonl (file_name, text, class); every picture differs from every
    other."""
    rng = np.random.default_rng(seed)
    lines = []
    for cls, count in classes.items():
        (folder / cls).mkdir(parents=True)
        for number in range(count):
            name = f"{cls}/{number:03d}.png"
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(folder / name)
            lines.append({"file_name": name, "text": f"thing {number} by {cls}", "class": cls})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_sd: Path) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=str(tiny_sd))


@pytest.fixture
def imagefolder(tmp_path: Path) -> Maker:
    def make(classes: Mapping[str, int], name: str = "data", **options: int) -> Path:
        return make_imagefolder(tmp_path / name, classes, **options)

    return make


@pytest.fixture(scope="session")
def tiny_maker() -> Maker:
    return make_tiny_sd


@pytest.fixture(scope="session")
def imagefolder_maker() -> Maker:
    return make_imagefolder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow sqlite store without runs: its schema migrations take seconds, so they run once."""
    from raygard.tracking import Tracker

    folder = tmp_path_factory.mktemp("store")
    Tracker.open(TrackingConfig(experiment="other"), folder, "none")
    return folder / "mlflow.db"


pytest_plugins = ["tests.fault_table", "tests.ray_fixtures", "tests.search_fixtures", "tests.together"]
