"""What `tiny_sd` is made of: its data, its tokenizer and its three networks, before any training."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raygard.pictures import read_picture
from raygard.zoo import PRETRAINING_STYLES

JOINT = " in the style of "
# The styles of the domain when the tokenizer was made; styles added later fall into known pieces.
TOKENIZER_STYLES = (
    "Noto",
    "Fluent Flat",
    "EmojiOne",
    "Fluent 3D",
    "OpenMoji",
    "Twemoji",
    "FxEmoji",
    "Fluent High Contrast",
)
LATENT_SCALE = 0.18215
TOKENS = 24
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Row:
    concept: str
    style: str
    file_name: str

    @property
    def text(self) -> str:
        return f"{self.concept}{JOINT}{self.style}"


def read_rows(data: Path) -> list[Row]:
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    return [Row(r["concept"], r["class"], r["file_name"]) for r in rows if r["class"] in PRETRAINING_STYLES]


def read_pixels(data: Path, rows: list[Row]) -> Tensor:
    pictures = [np.asarray(read_picture(data / row.file_name)) for row in rows]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def split(rows: list[Row], share: float = 0.05) -> tuple[list[int], list[int]]:
    """Hold out at most one style of a concept, so that every concept is trained on."""
    order = random.Random(20).sample(range(len(rows)), len(rows))
    held: dict[str, int] = {}
    for index in order:
        if len(held) < round(share * len(rows)):
            held.setdefault(rows[index].concept, index)
    held_out = sorted(held.values())
    return sorted(set(range(len(rows))) - set(held_out)), held_out


def build_tokenizer(data: Path, rows: list[Row], folder: Path) -> CLIPTokenizer:
    if not (folder / "tokenizer_config.json").exists():
        texts = (data / "concept_names.txt").read_text().splitlines() + [row.text for row in rows]
        texts += [f"an emoji{JOINT}{style}" for style in TOKENIZER_STYLES] * 3
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=2048,
                end_of_word_suffix="</w>",
                show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            ),
        )
        learned = json.loads(bpe.to_str())["model"]
        vocab: dict[str, int] = dict(learned["vocab"])
        for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocab.setdefault(f"{letter}</w>", len(vocab))
        for special in ("<|startoftext|>", "<|endoftext|>"):
            vocab[special] = len(vocab)
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
        folder.mkdir(parents=True, exist_ok=True)
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=LATENT_SCALE,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def schedule(**extra: Any) -> dict[str, Any]:
    return dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **extra)


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
