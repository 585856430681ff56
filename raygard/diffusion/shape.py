"""How large a denoiser is and what its backward pass keeps, found from its configuration without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raygard.config import ModelConfig
from raygard.diffusion.families import FAMILIES, Family, StableDiffusion
from raygard.diffusion.model import model_family, model_folder, vae_factor
from raygard.errors import RaygardError, nearest

# Sizes by name: what the releases' configurations say, which is written down with the families.
KNOWN: dict[str, dict[str, Any]] = {
    name: dict(config) for family in FAMILIES.values() for name, config in family.shapes.items()
}
# Of the releases' autoencoders: pixels for each latent.
LATENT_FACTOR = 8


@dataclass(frozen=True)
class DenoiserShape:
    """sizes: numbers of elements of the denoiser's N parameter tensors, in its order.

    saved_elements: numbers that autograd keeps for one picture's backward pass.
    """

    sizes: tuple[int, ...]
    saved_elements: int

    @property
    def num_params(self) -> int:
        return sum(self.sizes)

    @property
    def num_tensors(self) -> int:
        return len(self.sizes)


def denoiser_config(model: ModelConfig) -> dict[str, Any]:
    """The denoiser's config.json, or that of a known shape (`SD2.1-shape`). Raises RaygardError if there is none."""
    name = model.pretrained_model_name_or_path
    if is_shape(name):
        return KNOWN[name]
    if name.endswith("-shape") and not Path(name).exists():
        raise RaygardError(f"no known shape '{name}'{nearest(name, KNOWN)}, and no folder of this name")
    file = model_folder(model) / model_family(model).denoiser / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None
    return dict(content)


def family_of(model: ModelConfig) -> Family:
    """The family of a model or of a known shape. Raises RaygardError as `model_family`."""
    name = model.pretrained_model_name_or_path
    return family_of_shape(name) if is_shape(name) else model_family(model)


def family_of_shape(name: str) -> Family:
    """The family of a name in `KNOWN`."""
    return next(family for family in FAMILIES.values() if name in family.shapes)


def is_shape(name: str) -> bool:
    """Whether a model's name means a size only, to be estimated with and not to be loaded; a folder is a model."""
    return name in KNOWN and not Path(name).exists()


def measure_denoiser(
    config: Mapping[str, Any], latent_side: int, *, checkpointing: bool = False, family: Family | None = None
) -> DenoiserShape:
    """Run a denoiser on fake tensors and count what its training would keep; nothing is allocated.

    config: its config.json. latent_side: height and width of the latents. family: None for Stable Diffusion. Attention
    is counted as torch's fused kernels keep it.
    Raises RaygardError if the configuration does not make a denoiser that runs on what its family gives it.
    """
    kind = family or StableDiffusion()
    try:
        return measure(
            lambda: make_denoiser(kind, config, checkpointing), lambda module: run_denoiser(kind, module, latent_side)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise RaygardError(f"cannot run this denoiser to count its activations: {reason}") from None


@contextmanager
def fake_denoiser(config: Mapping[str, Any], family: Family | None = None) -> Iterator[Any]:
    """A denoiser of tensors that are not allocated, and a block in which all new ones are like that.

    family: None for Stable Diffusion.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield make_denoiser(family or StableDiffusion(), config)


def measure(make: Callable[[], Any], run: Callable[[Any], object]) -> DenoiserShape:
    """Make a module and run it forward, both on fake tensors, and count what its backward pass would keep.

    run: takes the module; what it makes of tensors is fake as well.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        module = make()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(module)
        parameters = list(module.parameters())
    own = {id(parameter.untyped_storage()) for parameter in parameters}
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    return DenoiserShape(tuple(parameter.numel() for parameter in parameters), kept // torch.float32.itemsize)


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of `work`, which runs a module of the meta device.

    A multiplication and an addition are two. Matrix products and convolutions are counted (torch's FlopCounterMode); on
    that device attention is made of products that the counter knows.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        work()
    return int(counter.get_total_flops())


def forward_flops(family: Family, denoiser: Any, latent_side: int) -> int:
    """`count_flops` of one picture's forward pass."""
    with torch.no_grad():
        return count_flops(lambda: run_denoiser(family, denoiser, latent_side))


def meta_denoiser(family: Family, config: Mapping[str, Any]) -> Any:
    """A denoiser without memory or values, for its sizes and for `count_flops`."""
    with torch.device("meta"):
        return make_denoiser(family, config)


def make_denoiser(family: Family, config: Mapping[str, Any], checkpointing: bool = False) -> Any:
    """A denoiser of random weights, in training mode, on torch's default device."""
    import diffusers

    denoiser: Any = getattr(diffusers, family.denoiser_class).from_config(dict(config))
    denoiser.train()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def run_denoiser(family: Family, denoiser: Any, latent_side: int) -> torch.Tensor:
    """The denoiser on one picture of any values, on torch's default device."""
    latents = torch.empty(1, family.latent_channels(denoiser.config), latent_side, latent_side)
    blank = family.blank_conditioning(denoiser.config)
    return family.predict(denoiser, latents, torch.tensor([0]), blank, LATENT_FACTOR)


def latent_side(config: Mapping[str, Any], model: ModelConfig, resolution: int | None) -> int:
    """Height and width of the latents at `resolution` pixels; None takes the model's own (`sample_size`).

    Raises RaygardError if the model does not say how many pixels a latent stands for.
    """
    if resolution is None:
        return family_of(model).sample_size(config)
    if is_shape(model.pretrained_model_name_or_path):
        return resolution // LATENT_FACTOR
    file = model_folder(model) / "vae" / "config.json"
    try:
        return resolution // vae_factor(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None


def text_encoder_bytes(model: ModelConfig) -> int:
    """Bytes of the text encoder's weights as they are stored; 0 for a known shape, which has none, and for a model with
    several, of which no edit loads any."""
    if is_shape(model.pretrained_model_name_or_path) or not isinstance(model_family(model), StableDiffusion):
        return 0
    return sum(file.stat().st_size for file in (model_folder(model) / "text_encoder").glob("model*.safetensors"))
