"""The user's side of the command line: fine-tune, draw, score, without a cluster."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raygard.config import DomainConfig, ModelConfig, RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError, nearest
from raygard.files import readable_disk_errors, whole_folder, write_text
from raygard.imagefolder import has_column, read_entries, resolve_data
from raygard.pictures import SUFFIXES, read_picture, read_pixels
from raygard.progress import Progress

if TYPE_CHECKING:
    from raygard.mask import FreezeMask

# Of diffusers' textual inversion script.
EMBEDDINGS_FILE = "learned_embeds.safetensors"


def adapt_model(
    config: RunConfig,
    data: str | Path,
    classes: tuple[str, ...],
    mask_path: Path | None,
    out: Path,
    seed: int,
    quiet: bool = False,
    require_signature: Path | None = None,
) -> dict[str, Any] | None:
    """Fine-tune the model on an imagefolder, respecting a mask, and save what came of it to `out`.

    That is a diffusers pipeline; of LoRA the adapter alone, as `load_lora_weights` reads it; of textual inversion the
    new token alone, as `load_textual_inversion` does. classes: empty takes every class of the folder. Under
    `accelerate launch` every process calls this; the main process saves and gets the facts, the others get None.
    require_signature: public key whose owner must have signed the mask.
    Raises RaygardError for unreadable data, another model's mask, or an `out` that is not empty, SignatureError for a
    mask that the key's owner did not sign.
    """
    from raygard.adaptation import Release, check_optimizer, get_adaptation
    from raygard.diffusion.cache import build_cache, load_cache
    from raygard.diffusion.model import load_denoiser, load_loss, model_folder, with_resolution
    from raygard.domain import load_domain

    _refuse_filled(out)
    method = get_adaptation(config.adapt.method)
    check_optimizer(config.adapt)
    if config.adapt.ignore_mask and mask_path is None:
        raise RaygardError("adapt.ignore_mask has no effect without --mask; remove it")
    mask = load_mask(mask_path, require_signature)
    domain_config = _all_general(config.domain, str(data), classes)
    domain = load_domain(domain_config)
    model_folder(config.model)
    method.check_family(config.model)
    domain_config = with_resolution(domain_config, config.model)

    from accelerate import PartialState

    parts = [(cls, "general") for cls in domain.general]
    state = PartialState()
    with readable_disk_errors(out), tempfile.TemporaryDirectory(prefix="raygard-") as cache:
        out.parent.mkdir(parents=True, exist_ok=True)
        denoiser = load_denoiser(config.model)
        if mask is not None:
            mask.check_model({name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()})
        rows = load_cache(build_cache(config.model, domain_config, domain.view("user"), parts, cache))
        release = Release(config.model)
        loss = load_loss(config.model, config.adapt.snr_gamma)
        with Progress(quiet or not state.is_main_process).bar("fine-tune", config.adapt.max_train_steps) as bar:
            result = method(
                denoiser,
                rows,
                config.adapt,
                loss,
                mask=mask,
                seed=seed,
                release=release,
                on_step=lambda _, x: bar.advance(1, f"{x:.4f}"),
            )
        if not state.is_main_process:
            return None
        facts = {
            "method": config.adapt.method,
            "mask_sha256": mask.sha256 if mask else None,
            "ignore_mask": config.adapt.ignore_mask,
            "outside_mask": list(result.outside_mask),
            "learn_as": config.adapt.learn_as,
            "instance_prompt": config.adapt.instance_prompt,
            "trainable_params": result.trainable_params,
            "optimizer_bytes": result.optimizer_bytes,
            "seconds": result.seconds,
            "final_loss": result.losses[-1],
            "seed": seed,
        }
        with whole_folder(out) as folder:
            _save_adapted(folder, config, denoiser, result, release)
            write_text(folder / "raygard_adapt.json", json.dumps(facts, indent=2) + "\n")
    return facts


def load_mask(path: Path | None, require_signature: Path | None) -> FreezeMask | None:
    """The mask at `path`, if one is given. Raises as `FreezeMask.load`, and for a key without a mask."""
    from raygard.mask import FreezeMask

    if path is not None:
        return FreezeMask.load(path, require_signature=require_signature)
    if require_signature is not None:
        raise RaygardError("--require-signature has no effect without --mask; give the mask, or leave it out")
    return None


def _save_adapted(folder: Path, config: RunConfig, denoiser: Any, result: Any, release: Any) -> None:
    from safetensors.torch import save_file

    from raygard.diffusion.model import load_pipeline
    from raygard.mask.adapters import LORA_FILE

    if result.adapter:
        save_file(result.adapter, str(folder / LORA_FILE), metadata={"format": "pt"})
        return
    if not result.embeddings_only:
        pipeline: Any = load_pipeline(config.model, denoiser=denoiser)
        if result.embeddings:
            pipeline.tokenizer, pipeline.text_encoder = release.text_encoder
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    if result.embeddings:
        save_file(result.embeddings, str(folder / EMBEDDINGS_FILE))


def _refuse_filled(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RaygardError(f"{out} is not empty; choose another --out")


def _all_general(config: DomainConfig, data: str, classes: tuple[str, ...]) -> DomainConfig:
    """A user has no halves: all pictures of the chosen classes are training material."""
    folder, column = resolve_data(data), config.class_column
    if column is not None and not has_column(folder, column):
        column = None
    found = sorted({entry.cls for entry in read_entries(folder, config.caption_column, column)})
    for cls in classes:
        if cls not in found:
            raise RaygardError(f"{data}: no pictures of class '{cls}'{nearest(cls, found)}")
    roles = {"illegal": (), "legal": (), "unseen": (), "general": tuple(dict.fromkeys(classes)) or tuple(found)}
    return config.model_copy(update={"data": data, "class_column": column, **roles})


def generate_pictures(
    model: str,
    prompts: list[str],
    out: Path,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    lora: Path | None = None,
    embeddings: Path | None = None,
    mask: Path | None = None,
    require_signature: Path | None = None,
) -> list[Path]:
    """Draw one picture for each prompt into `out` (PNG) with a `metadata.jsonl`; return the paths.

    lora, embeddings: files, or folders of `raygard adapt`, to load into the model. mask: one whose carried values
    belong to the release. require_signature: public key whose owner must have signed the mask.
    Raises RaygardError for a model or adapter that cannot be loaded, values out of range, or a filled `out`,
    SignatureError for a mask that the key's owner did not sign.
    """
    from PIL import Image

    from raygard.diffusion.generate import generate
    from raygard.diffusion.model import denoiser_of, load_pipeline, model_folder, require_one_text_encoder

    _refuse_filled(out)
    released = load_mask(mask, require_signature)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise RaygardError("nothing to draw: give at least one caption, and no empty ones")
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    config = load_config(None, [f"generation.{key}={value}" for key, value in settings.items()]).generation
    source = ModelConfig(pretrained_model_name_or_path=model)
    model_folder(source)
    pipeline = load_pipeline(source)
    if released is not None:
        released.apply(denoiser_of(pipeline))
    if lora is not None:
        _load_lora(pipeline, lora)
    if embeddings is not None:
        require_one_text_encoder(source, "an embedding of a new token")
        _load_embeddings(pipeline, embeddings)
    images = generate(pipeline, prompts, [f"{i}/{prompt}" for i, prompt in enumerate(prompts)], config, seed)
    paths = []
    with readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            paths.append(out / f"{index:05d}.png")
            Image.fromarray(image).save(paths[-1])
        rows = [json.dumps({"file_name": p.name, "text": t}) for p, t in zip(paths, prompts, strict=True)]
        write_text(out / "metadata.jsonl", "\n".join(rows) + "\n")
    return paths


def _load_lora(pipeline: Any, path: Path) -> None:
    from raygard.mask.adapters import adapter_file
    from raygard.mask.weights import read_safetensors

    file = adapter_file(path)
    read_safetensors(file)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise RaygardError(f"cannot load {file}: {str(error).splitlines()[0]}") from None
    # diffusers only logs it when a file has nothing for this model.
    if not pipeline.get_list_adapters():
        raise RaygardError(f"{file} holds no LoRA factors for this model")


def _load_embeddings(pipeline: Any, path: Path) -> None:
    from raygard.adaptation import teach
    from raygard.mask.weights import read_safetensors

    file = path / EMBEDDINGS_FILE if path.is_dir() else path
    try:
        teach(pipeline.tokenizer, pipeline.text_encoder, read_safetensors(file))
    except RaygardError as error:
        raise RaygardError(f"cannot load {file}: {error}") from None


def score_folders(generated: Path, reference: Path, scorer: str) -> dict[str, Any]:
    """Mean distance of the pictures in one folder to the pictures in another.

    Raises RaygardError for an unknown scorer, a folder without pictures, or a picture that cannot be read.
    """
    from raygard.scoring import get_scorer

    judge = get_scorer(scorer)
    pictures = [_pictures(folder) for folder in (generated, reference)]
    distances = judge.distances(judge.embed(pictures[0]), judge.embed(pictures[1]))
    return {
        "scorer": scorer,
        "direction": judge.direction,
        "mean": float(np.mean(distances)),
        "sd": float(np.std(distances)),
        "num_generated": len(pictures[0]),
        "num_reference": len(pictures[1]),
    }


def _pictures(folder: Path) -> np.ndarray:
    if not folder.is_dir():
        raise RaygardError(f"no folder at {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise RaygardError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    size = min(read_picture(files[0]).size)
    return np.stack([read_pixels(path, size) for path in files])
