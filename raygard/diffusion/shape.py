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
from raygard.diffusion.model import model_folder
from raygard.errors import RaygardError, nearest

TEXT_TOKENS = 77
_SD = {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "sample_size": 64}
# What the releases' unet/config.json say, where it is not diffusers' default.
KNOWN: dict[str, dict[str, Any]] = {
    "SD1.5-shape": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SD2.1-shape": {
        **_SD,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
# Of diffusers' autoencoders of Stable Diffusion: pixels for each latent.
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
    """unet/config.json of a model, or of a known shape (`SD2.1-shape`). Raises RaygardError if there is none."""
    name = model.pretrained_model_name_or_path
    if is_shape(name):
        return KNOWN[name]
    if name.endswith("-shape") and not Path(name).exists():
        raise RaygardError(f"no known shape '{name}'{nearest(name, KNOWN)}, and no folder of this name")
    file = model_folder(model) / "unet" / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None
    return dict(content)


def is_shape(name: str) -> bool:
    """Whether a model's name means a size only, to be estimated with and not to be loaded; a folder is a model."""
    return name in KNOWN and not Path(name).exists()


def measure_denoiser(config: Mapping[str, Any], latent_side: int, *, checkpointing: bool = False) -> DenoiserShape:
    """Run a UNet2DConditionModel on fake tensors and count what its training would keep; nothing is allocated.

    latent_side: height and width of the latents. Attention is counted as torch's fused kernels keep it.
    Raises RaygardError if the configuration does not make a denoiser that runs on latents, a time step and a text.
    """
    try:
        return measure(lambda: _unet(config, checkpointing), lambda unet: _run(unet, latent_side))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise RaygardError(f"cannot run this denoiser to count its activations: {reason}") from None


@contextmanager
def fake_denoiser(config: Mapping[str, Any]) -> Iterator[Any]:
    """A UNet2DConditionModel of tensors that are not allocated, and a block in which all new ones are like that."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield _unet(config, False)


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


def _unet(config: Mapping[str, Any], checkpointing: bool) -> Any:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_config(dict(config))
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _run(unet: Any, latent_side: int) -> object:
    latents = torch.empty(1, unet.config.in_channels, latent_side, latent_side)
    return unet(latents, torch.tensor([0]), torch.empty(1, TEXT_TOKENS, unet.config.cross_attention_dim))


def latent_side(config: Mapping[str, Any], model: ModelConfig, resolution: int | None) -> int:
    """Height and width of the latents at `resolution` pixels; None takes the model's own (`sample_size`).

    Raises RaygardError if the model does not say how many pixels a latent stands for.
    """
    if resolution is None:
        return int(config["sample_size"])
    if is_shape(model.pretrained_model_name_or_path):
        return resolution // LATENT_FACTOR
    file = model_folder(model) / "vae" / "config.json"
    try:
        return resolution // 2 ** (len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None


def text_encoder_bytes(model: ModelConfig) -> int:
    """Bytes of the text encoder's weights as they are stored; 0 for a known shape, which has none."""
    if is_shape(model.pretrained_model_name_or_path):
        return 0
    return sum(file.stat().st_size for file in (model_folder(model) / "text_encoder").glob("model*.safetensors"))
