"""Pictures from a pipeline, each with noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raygard.config import GenerationConfig
from raygard.diffusion.families import family_of_pipeline
from raygard.errors import RaygardError
from raygard.seeding import generator


def generate(
    pipeline: Any,
    captions: Sequence[str],
    keys: Sequence[object],
    config: GenerationConfig,
    seed: int,
) -> NDArray[np.uint8]:
    """One picture for each caption: uint8 (n, H, W, 3), at the model's own size, with the pipeline's own
    sampler.

    keys: what names each picture, e.g. (class, prompt, index); picture i starts from `generator(seed,
    "generate", keys[i])`, so it is the same whatever the batch size and whatever the weights under
    comparison. To compare models, set the pipeline's denoiser to each in turn.
    Raises RaygardError if a picture contains NaN or infinity: the model is broken.
    """
    if len(captions) != len(keys):
        raise RaygardError(f"{len(captions)} captions, but {len(keys)} keys")
    family = family_of_pipeline(type(pipeline).__name__, "the pipeline")
    getattr(pipeline, family.denoiser).eval()
    pictures: list[NDArray[np.uint8]] = []
    for start in range(0, len(captions), config.batch_size):
        batch = slice(start, start + config.batch_size)
        output = pipeline(
            list(captions[batch]),
            generator=[generator(seed, "generate", key) for key in keys[batch]],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            output_type="pt",
            **family.sampler_settings,
        )
        images = output.images.detach().float().cpu()
        if not torch.isfinite(images).all():
            raise RaygardError(f"the model draws NaN or infinite pixels for '{captions[start]}'")
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        pictures.append(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    if not pictures:
        raise RaygardError("no captions to generate from")
    return np.concatenate(pictures)
