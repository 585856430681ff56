"""Loading the parts of a Stable Diffusion model, from a diffusers folder, a hub id or the zoo.

Weights are read as float32 from safetensors only; code from a model repository is never run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raygard.config import DomainConfig, ModelConfig
from raygard.errors import RaygardError, nearest
from raygard.files import named_inside, sha256_file

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

T = TypeVar("T")

PIPELINE = "StableDiffusionPipeline"
INDEX = "model_index.json"
# Where the parts of a pipeline may come from; "stable_diffusion" is diffusers' name for its own safety checker.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HASHED = ("*.json", "*.safetensors", "*.txt", "*.model")


def resolve_model(name: str) -> str:
    """Path of `zoo:tiny-sd`, or `name` itself with `~` expanded. Raises RaygardError for an unknown zoo
    name."""
    if not name.startswith("zoo:"):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    zoo = Path(__file__).parents[1] / "zoo"
    folder = zoo / name.removeprefix("zoo:").replace("-", "_")
    if folder.parent != zoo or not (folder / INDEX).is_file():
        known = sorted(f"zoo:{path.parent.name.replace('_', '-')}" for path in zoo.glob(f"*/{INDEX}"))
        raise RaygardError(f"no bundled model '{name}'{nearest(name, known)}")
    return str(folder)


def model_folder(config: ModelConfig) -> Path:
    """Folder with the model's files; a hub id is downloaded to the Hugging Face cache first.

    Raises RaygardError if there is no such model, the hub cannot be reached, or it is no
    StableDiffusionPipeline.
    """
    name = resolve_model(config.pretrained_model_name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(name):
            raise RaygardError(f"no model at {name}: expected a diffusers folder, a hub id or 'zoo:tiny-sd'")
        folder = _download(name, config)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise RaygardError(f"{folder} is not a diffusers pipeline folder: no readable {INDEX}") from None
    found = index.get("_class_name") if isinstance(index, dict) else None
    if found != PIPELINE:
        raise RaygardError(f"{folder} holds a {found}; raygard reads {PIPELINE}")
    _refuse_code(folder, index)
    return folder


def _refuse_code(folder: Path, index: dict[str, Any]) -> None:
    """Raise RaygardError if a part of the pipeline comes with code of its own.

    diffusers imports whatever module the index names for a part, and releases of it run a file of that name in the
    part's folder without being asked to.
    """
    for part, source in index.items():
        if part.startswith("_") or not isinstance(source, list):
            continue
        library = source[0] if source else None
        if library not in LIBRARIES:
            raise RaygardError(
                f"{folder / INDEX}: '{part}' is of {library!r}; raygard reads parts of diffusers and transformers only"
            )
        code = next(named_inside(folder, part, f"{folder / INDEX}: part").glob("*.py"), None)
        if code is not None:
            raise RaygardError(f"{code}: code of a model is never run; take it out if you trust the rest")


def _download(name: str, config: ModelConfig) -> Path:
    from diffusers import StableDiffusionPipeline

    try:
        folder = StableDiffusionPipeline.download(
            name,
            revision=config.revision,
            variant=config.variant,
            use_safetensors=True,
            safety_checker=None,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RaygardError(
            f"cannot fetch model '{name}' from the hub (and there is no such folder): {_first_line(error)}"
        ) from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__


def _load(what: str, folder: Path, load: Callable[[], T]) -> T:
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise RaygardError(f"cannot load the {what} of {folder}: {_first_line(error)}") from None


def _weights(config: ModelConfig, folder: Path, part: str) -> dict[str, Any]:
    import torch

    variant = config.variant
    stems = ("diffusion_pytorch_model", "model")
    plain = any(list((folder / part).glob(f"{stem}{end}")) for stem in stems
                for end in (".safetensors", ".safetensors.index.json", "-*.safetensors"))  # fmt: skip
    if variant is None and not plain:
        found = sorted((folder / part).glob("*.*.safetensors"))
        variant = found[0].name.split(".")[1] if found else None
    elif variant is not None and plain and not list((folder / part).glob(f"*.{variant}*")):
        raise RaygardError(f"{folder / part} holds no weights of variant '{variant}' (model.variant); leave it out")
    return {"variant": variant, "use_safetensors": True, "torch_dtype": torch.float32}


def load_unet(config: ModelConfig) -> UNet2DConditionModel:
    """The denoiser, float32, on the CPU, all tensors trainable. Raises RaygardError if it cannot be
    loaded."""
    from diffusers import UNet2DConditionModel

    folder = model_folder(config)
    arguments = _weights(config, folder, "unet")
    return _load(
        "unet",
        folder,
        lambda: UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet", **arguments),
    )


def load_vae(config: ModelConfig) -> Any:
    """The autoencoder (AutoencoderKL), float32, on the CPU, in evaluation mode."""
    from diffusers import AutoencoderKL

    folder = model_folder(config)
    arguments = _weights(config, folder, "vae")
    return _load("vae", folder, lambda: AutoencoderKL.from_pretrained(str(folder), subfolder="vae", **arguments))


def load_text_encoder(config: ModelConfig) -> tuple[Any, Any]:
    """Tokenizer and text encoder (CLIPTextModel), float32, on the CPU, in evaluation mode."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = model_folder(config)
    arguments = _weights(config, folder, "text_encoder")
    arguments["dtype"] = arguments.pop("torch_dtype")
    tokenizer = _load("tokenizer", folder, lambda: CLIPTokenizer.from_pretrained(str(folder), subfolder="tokenizer"))
    encoder = _load(
        "text encoder",
        folder,
        lambda: CLIPTextModel.from_pretrained(str(folder), subfolder="text_encoder", **arguments),
    )
    return tokenizer, encoder.eval()


def load_noise_scheduler(config: ModelConfig) -> DDPMScheduler:
    """The forward process of training (Eq 1), with the model's betas and `model.prediction_type` if that is
    given."""
    from diffusers import DDPMScheduler

    folder = model_folder(config)
    settings = _load("scheduler", folder, lambda: DDPMScheduler.load_config(str(folder), subfolder="scheduler"))
    defaults: Any = inspect.signature(DDPMScheduler).parameters
    known = {key: settings[key] for key in defaults if key in settings}
    if config.prediction_type is not None:
        known["prediction_type"] = config.prediction_type
    return _load("scheduler", folder, lambda: DDPMScheduler.from_config(known))


def load_pipeline(config: ModelConfig, unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """The whole pipeline, float32, without progress bar and safety checker, with its own sampler.

    unet: replaces the model's own, which is then not read. The safety checker is left out because it would
    blacken the very pictures that are to be measured.
    """
    from diffusers import StableDiffusionPipeline

    folder = model_folder(config)
    vae = load_vae(config)
    tokenizer, text_encoder = load_text_encoder(config)
    parts = {
        "unet": unet or load_unet(config),
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    }
    pipeline = _load(
        "pipeline",
        folder,
        lambda: StableDiffusionPipeline.from_pretrained(
            str(folder), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        ),
    )
    if config.prediction_type is not None:
        sampler = pipeline.scheduler
        pipeline.scheduler = type(sampler).from_config(sampler.config, prediction_type=config.prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def model_fingerprint(config: ModelConfig, part: str) -> str:
    """SHA-256 (hex) over the weight and configuration files of a sub-folder ("vae", "text_encoder", "unet",
    ...)."""
    folder = model_folder(config) / part
    files = sorted({file for pattern in HASHED for file in folder.glob(pattern)})
    if not files:
        raise RaygardError(f"{folder.parent} has no part '{part}'")
    lines = "".join(f"{file.name} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def with_resolution(domain: DomainConfig, model: ModelConfig) -> DomainConfig:
    """`domain` with the model's own resolution (sample_size times the autoencoder's factor) where it has none."""
    if domain.resolution is not None:
        return domain
    folder = model_folder(model)
    try:
        unet, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "vae")
        )
        side = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise RaygardError(f"{folder} does not say its resolution; set domain.resolution") from None
    return domain.model_copy(update={"resolution": side})
