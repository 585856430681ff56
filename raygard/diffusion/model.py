"""Loading the parts of a text-to-image model of any family, from a diffusers folder, a hub id or the zoo.

Weights are read as float32 from safetensors only; code from a model repository is never run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raygard.config import DomainConfig, EngineConfig, ModelConfig
from raygard.diffusion.families import Family, LossSettings, StableDiffusion, family_of_pipeline
from raygard.errors import RaygardError, nearest
from raygard.files import named_inside, sha256_file
from raygard.mask.adapters import PEFT_CONFIG
from raygard.mask.weights import shard_files

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler

    from raygard.diffusion.conditioning import Conditioning
    from raygard.diffusion.loss import TrainingLoss

T = TypeVar("T")

INDEX = "model_index.json"
# Where the parts of a pipeline may come from; "stable_diffusion" is diffusers' name for its own safety checker.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
# Parts of a pipeline that take pictures as prompts; diffusers would load them, from pickles as well.
UNUSED = {"image_encoder": None, "feature_extractor": None}
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

    Raises RaygardError if there is no such model, the hub cannot be reached, or it is of no family that raygard reads.
    """
    return _open(config)[0]


def model_family(config: ModelConfig) -> Family:
    """The family of a model, from its model_index.json. Raises RaygardError as `model_folder`."""
    return _open(config)[1]


def check_memory_format(engine: EngineConfig, config: ModelConfig) -> None:
    """Raise RaygardError if `engine.channels_last` is asked for a denoiser in which it has no effect."""
    family = model_family(config)
    if engine.channels_last and family.flow_matching:
        # Their transformers turn latents into tokens before anything else.
        raise RaygardError(f"engine.channels_last has no effect on {family.name}; remove it")


def _open(config: ModelConfig) -> tuple[Path, Family, dict[str, Any]]:
    """Folder, family and model_index.json, once for whoever needs several of them."""
    folder = _folder(config)
    index = _read_index(folder)
    family = family_of_pipeline(index.get("_class_name"), folder)
    _refuse_code(folder, index)
    return folder, family, index


def _folder(config: ModelConfig) -> Path:
    name = resolve_model(config.pretrained_model_name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(name):
            raise RaygardError(f"no model at {name}: expected a diffusers folder, a hub id or 'zoo:tiny-sd'")
        folder = _download(name, config.revision, config.variant)
    return folder


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise RaygardError(f"{folder} is not a diffusers pipeline folder: no readable {INDEX}") from None
    return index if isinstance(index, dict) else {}


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


@functools.lru_cache(maxsize=8)
def _download(name: str, revision: str | None, variant: str | None) -> Path:
    # Remembered, because every part asks for its folder, and asking the hub takes a second each time.
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(
            name,
            revision=revision,
            variant=variant,
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

    # transformers reads whatever an index names, and the base that an adapter names in the place of the weights.
    for index in (folder / part).glob("*.safetensors*.json"):
        shard_files(index)
    if (folder / part / PEFT_CONFIG).exists():
        raise RaygardError(f"{folder / part} holds an adapter ({PEFT_CONFIG}); merge it and save again")
    if _read_config(folder, part).get("quantization_config") is not None:
        raise RaygardError(f"{folder / part} holds quantized weights, which cannot be trained; take others")
    variant = config.variant
    stems = ("diffusion_pytorch_model", "model")
    plain = any((folder / part / f"{stem}{end}").exists() for stem in stems
                for end in (".safetensors", ".safetensors.index.json"))  # fmt: skip
    if variant is None and not plain:
        # `model.fp16.safetensors`, and of shards `model.fp16-00001-of-00002.safetensors` or, as older releases of
        # diffusers have it, `model-00001-of-00002.fp16.safetensors`.
        found = sorted((folder / part).glob("*.*.safetensors"))
        variant = found[0].name.split(".")[1].partition("-")[0] if found else None
    elif variant is not None and plain and not list((folder / part).glob(f"*.{variant}*")):
        raise RaygardError(f"{folder / part} holds no weights of variant '{variant}' (model.variant); leave it out")
    return {"variant": variant, "use_safetensors": True, "torch_dtype": torch.float32}


def load_denoiser(config: ModelConfig) -> Any:
    """The denoiser, float32, on the CPU, all tensors trainable. Raises RaygardError if it cannot be loaded."""
    family = model_family(config)
    return _load_part(config, "diffusers", family.denoiser, family.denoiser_class)


def load_vae(config: ModelConfig) -> Any:
    """The autoencoder (AutoencoderKL), float32, on the CPU, in evaluation mode.

    Raises RaygardError for one that scales latents by a mean and a deviation, as some derivatives of SDXL do.
    """
    vae = _load_part(config, "diffusers", "vae", "AutoencoderKL")
    if getattr(vae.config, "latents_mean", None) is not None:
        raise RaygardError(
            f"{model_folder(config) / 'vae'} scales latents by `latents_mean` and `latents_std`; raygard knows "
            "`scaling_factor` and `shift_factor` only, so this model cannot be trained on"
        )
    return vae


def _load_part(config: ModelConfig, library: str, part: str, name: str) -> Any:
    folder = model_folder(config)
    cls: Any = getattr(importlib.import_module(library), name)
    if part.startswith("tokenizer"):
        return _load(part, folder, lambda: cls.from_pretrained(str(folder), subfolder=part))
    arguments = _weights(config, folder, part)
    if library == "transformers":
        arguments["dtype"] = arguments.pop("torch_dtype")
    return _load(part, folder, lambda: cls.from_pretrained(str(folder), subfolder=part, **arguments))


def text_parts(config: ModelConfig) -> tuple[str, ...]:
    """Sub-folders of the model's tokenizers and text encoders, without optional ones that it lacks."""
    _, family, index = _open(config)
    return tuple(
        part
        for part in family.text_parts
        if part not in family.optional_parts or (index.get(part) or [None])[0] is not None
    )


def model_parts(config: ModelConfig) -> tuple[str, ...]:
    """Sub-folders of everything that decides the model's pictures, the denoiser's first."""
    return (model_family(config).denoiser, "vae", *text_parts(config), "scheduler")


@dataclass(frozen=True)
class TextEncoders:
    """The tokenizers and text encoders of a model, by sub-folder; an optional one that it lacks is None.

    denoiser_config: the denoiser's config.json, which says how wide text is to the model.
    """

    family: Family
    parts: Mapping[str, Any]
    denoiser_config: Mapping[str, Any]
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> TextEncoders:
        """These, moved to `device`."""
        for name, part in self.parts.items():
            if part is not None and name.startswith("text_encoder"):
                part.to(device)
        return replace(self, device=device)

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """What the encoders make of captions now: float32, on the CPU."""
        found = self.family.embed(self.parts, list(captions), self.device, self.denoiser_config)
        return found.each(lambda tensor: tensor.float().cpu())


def load_text_encoders(config: ModelConfig) -> TextEncoders:
    """All tokenizers and text encoders, float32, on the CPU, in evaluation mode."""
    family, present = model_family(config), text_parts(config)
    parts = {
        part: _load_part(config, "transformers", part, name) if part in present else None
        for part, name in family.text_parts.items()
    }
    return TextEncoders(family, parts, _read_config(model_folder(config), family.denoiser))


def load_text_encoder(config: ModelConfig) -> tuple[Any, Any]:
    """Tokenizer and text encoder (CLIPTextModel) of Stable Diffusion, float32, on the CPU, in evaluation mode.

    Raises RaygardError as `require_one_text_encoder`.
    """
    require_one_text_encoder(config, "a method that works on the model's words")
    parts = load_text_encoders(config).parts
    return parts["tokenizer"], parts["text_encoder"]


def require_one_text_encoder(config: ModelConfig, what: str) -> None:
    """Raise RaygardError unless the model is a Stable Diffusion, the family with one text encoder. what: needs that."""
    found = model_family(config)
    if not isinstance(found, StableDiffusion):
        raise RaygardError(
            f"{what} is for {StableDiffusion.name} only, and {config.pretrained_model_name_or_path} is of the family "
            f"{found.name}; choose another method or model"
        )


def load_noise_scheduler(config: ModelConfig) -> DDPMScheduler:
    """The forward process of training, with the model's settings and `model.prediction_type` if that is given.

    Of the class that the family adds noise by: diffusers' DDPMScheduler (Eq 1), or that of flow matching. Raises
    RaygardError for a prediction type where flow matching leaves no choice.
    """
    import diffusers

    folder, family, _ = _open(config)
    cls: Any = getattr(diffusers, family.noise_schedule)
    settings = _load("scheduler", folder, lambda: cls.load_config(str(folder), subfolder="scheduler"))
    defaults: Any = inspect.signature(cls).parameters
    known = {key: settings[key] for key in defaults if key in settings}
    if (chosen := _prediction_type(config, family)) is not None:
        known["prediction_type"] = chosen
    return _load("scheduler", folder, lambda: cls.from_config(known))


def _prediction_type(config: ModelConfig, family: Family) -> str | None:
    if config.prediction_type is not None and family.flow_matching:
        raise RaygardError(
            f"model.prediction_type has no effect on {family.name}, which is trained by flow matching; remove it"
        )
    return config.prediction_type


def load_loss(config: ModelConfig, snr_gamma: float | None = None) -> TrainingLoss:
    """The training loss of the model's family. snr_gamma: min-SNR weighting, None for none.

    Raises RaygardError for a setting that the family's loss does not have.
    """
    folder, family, _ = _open(config)
    scheduler = load_noise_scheduler(config)
    factor = lambda: vae_factor(_read_config(folder, "vae"))  # noqa: E731
    return family.loss(LossSettings(scheduler, factor, config.prediction_type, snr_gamma))


def load_pipeline(config: ModelConfig, denoiser: Any = None) -> Any:
    """The whole pipeline, float32, without progress bar, with its own sampler.

    denoiser: replaces the model's own, which is then not read.
    """
    import diffusers

    folder, family, _ = _open(config)
    parts = {
        **UNUSED,
        family.denoiser: load_denoiser(config) if denoiser is None else denoiser,
        "vae": load_vae(config),
        **load_text_encoders(config).parts,
        **family.pipeline_settings,
    }
    cls: Any = getattr(diffusers, family.pipeline)
    pipeline = _load("pipeline", folder, lambda: cls.from_pretrained(str(folder), **parts))
    if (chosen := _prediction_type(config, family)) is not None:
        sampler = pipeline.scheduler
        pipeline.scheduler = type(sampler).from_config(sampler.config, prediction_type=chosen)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_of(pipeline: Any) -> Any:
    """The denoiser of a diffusers pipeline of a known family."""
    return getattr(pipeline, family_of_pipeline(type(pipeline).__name__, "the pipeline").denoiser)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels of one latent's side. config: of an AutoencoderKL. Raises KeyError or TypeError if it does not say."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


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
    folder, family, _ = _open(model)
    try:
        side = family.sample_size(_read_config(folder, family.denoiser)) * vae_factor(_read_config(folder, "vae"))
    except (RaygardError, KeyError, ValueError, TypeError):
        raise RaygardError(f"{folder} does not say its resolution; set domain.resolution") from None
    return domain.model_copy(update={"resolution": side})


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    file = folder / part / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None
