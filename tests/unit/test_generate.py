from __future__ import annotations

import numpy as np
import pytest
import torch

from raygard.config import GenerationConfig, ModelConfig
from raygard.diffusion.generate import generate
from raygard.diffusion.model import load_denoiser, load_pipeline
from raygard.errors import RaygardError

CAPTIONS = ["ab", "cd", "ab", "ef", "gh"]
SETTINGS = GenerationConfig(num_inference_steps=3, batch_size=5)


@pytest.fixture(scope="module")
def pipeline(tiny_model: ModelConfig) -> object:
    return load_pipeline(tiny_model)


def test_pictures_do_not_depend_on_the_batch_size(pipeline: object) -> None:
    whole = generate(pipeline, CAPTIONS, range(5), SETTINGS, seed=0)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
    for size in (1, 2):
        parts = generate(pipeline, CAPTIONS, range(5), SETTINGS.model_copy(update={"batch_size": size}), seed=0)
        assert np.abs(whole.astype(int) - parts).max() <= 1


def test_noise_follows_seed_and_key_alone(pipeline: object) -> None:
    first = generate(pipeline, ["ab", "ab"], [("a", 0), ("a", 1)], SETTINGS, seed=0)
    turned = generate(pipeline, ["ab", "ab"], [("a", 1), ("a", 0)], SETTINGS, seed=0)
    assert np.abs(first.astype(int) - turned[::-1]).max() <= 1
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, generate(pipeline, ["ab", "ab"], [("a", 0), ("a", 1)], SETTINGS, seed=1))


def test_one_pipeline_serves_many_denoisers(pipeline: object, tiny_model: ModelConfig) -> None:
    own = pipeline.unet
    before = generate(pipeline, CAPTIONS, range(5), SETTINGS, seed=0)
    other = load_denoiser(tiny_model)
    with torch.no_grad():
        other.conv_out.weight.mul_(3)
    pipeline.unet = other.train()
    changed = generate(pipeline, CAPTIONS, range(5), SETTINGS, seed=0)
    with torch.no_grad():
        other.conv_out.weight.fill_(torch.nan)
    with pytest.raises(RaygardError, match="NaN or infinite"):
        generate(pipeline, CAPTIONS, range(5), SETTINGS, seed=0)
    pipeline.unet = own
    assert not np.array_equal(before, changed)
    assert np.array_equal(before, generate(pipeline, CAPTIONS, range(5), SETTINGS, seed=0))


def test_every_caption_needs_a_key(pipeline: object) -> None:
    with pytest.raises(RaygardError, match="5 captions, but 2 keys"):
        generate(pipeline, CAPTIONS, range(2), SETTINGS, seed=0)
    with pytest.raises(RaygardError, match="no captions"):
        generate(pipeline, [], [], SETTINGS, seed=0)
