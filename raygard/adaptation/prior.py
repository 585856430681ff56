"""Prior preservation (Ruiz et al. 2023, section 4.2): pictures of the class, drawn from the release itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raygard.adaptation.prompts import Release, with_captions
from raygard.config import AdaptConfig, GenerationConfig, ModelConfig
from raygard.diffusion.cache import LatentSet, encode_pixels
from raygard.diffusion.conditioning import Conditioning, ConditioningRows
from raygard.diffusion.generate import generate
from raygard.diffusion.model import load_pipeline, model_family, model_fingerprint, model_parts
from raygard.errors import RaygardError
from raygard.files import scratch
from raygard.mask.weights import fingerprint, tensor_sha256
from raygard.store import content_key


def class_pictures(
    denoiser: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    release: Release,
    embed: Callable[[list[str]], Conditioning],
) -> LatentSet | None:
    """What the release draws for `config.class_prompt`, as training material; None without a prompt.

    denoiser: with the release's values. data: of the same size. embed: as of `with_captions`. The same pictures for
    every adaptation seed; kept in `release.cache_dir`. Under `accelerate launch` every process draws its own.
    Raises RaygardError if the model draws another size than that of `data`.
    """
    if config.class_prompt is None:
        return None
    count, drawing = config.num_class_images or 0, _drawing(release.model)
    file = None
    if release.cache_dir is not None:
        name, *others = model_parts(release.model)
        parts = {part: model_fingerprint(release.model, part) for part in others}
        weights = fingerprint({name: tensor_sha256(value) for name, value in denoiser.state_dict().items()})
        sampler = {"prediction_type": release.model.prediction_type, **drawing.model_dump(mode="json")}
        drawn = {name: weights, **parts, **sampler, "prompt": config.class_prompt, "count": count}
        file = release.cache_dir / f"class-pictures-{content_key(drawn)}.safetensors"
    arrays = _read(file) if file is not None and file.is_file() else None
    if arrays is None:
        arrays = _draw(denoiser, config.class_prompt, count, release, drawing)
        if file is not None:
            with scratch(file) as part:
                save_file(arrays, str(part))
    if arrays["mean"].shape[1:] != data.shape:
        raise RaygardError(
            f"the model draws latents of {tuple(arrays['mean'].shape[1:])}, the pictures have {data.shape}; leave "
            "domain.resolution at the model's own for prior preservation"
        )
    mean, std, unnamed = arrays["mean"], arrays["std"], [""] * count
    prior = LatentSet(mean, std, ConditioningRows(Conditioning(), torch.empty(0)), unnamed, unnamed, [])
    return with_captions(prior, [config.class_prompt] * count, embed)


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(str(file))
    except (SafetensorError, OSError):
        return None


def _drawing(model: ModelConfig) -> GenerationConfig:
    # diffusers' DreamBooth scripts leave the sampler as the pipeline of their family has it.
    steps, guidance = model_family(model).default_sampling
    return GenerationConfig(num_inference_steps=steps, guidance_scale=guidance)


def _draw(
    denoiser: nn.Module, prompt: str, count: int, release: Release, drawing: GenerationConfig
) -> dict[str, Tensor]:
    from accelerate import PartialState

    # The denoiser may still lie where it was loaded, and hundreds of pictures take hours on a CPU.
    device = PartialState(cpu=not torch.cuda.is_available()).device
    pipeline = load_pipeline(release.model, denoiser).to(device)
    means, stds = [], []
    for start in range(0, count, drawing.batch_size):
        keys = [("class", index) for index in range(start, min(start + drawing.batch_size, count))]
        pixels = generate(pipeline, [prompt] * len(keys), keys, drawing, seed=0)
        mean, std = encode_pixels(pipeline.vae, torch.from_numpy(pixels), device)
        means.append(mean)
        stds.append(std)
        if release.on_drawn is not None:
            release.on_drawn()
    return {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
