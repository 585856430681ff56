"""What a model family is to the rest of raygard. One file for each family, one line in the registry.

Shape letters: B batch, C latent channels, H, W latent sides, L tokens, D text features, P pooled features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning

if TYPE_CHECKING:
    from raygard.diffusion.loss import TrainingLoss

Config = Mapping[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class LossSettings:
    """What a training loss is made of.

    scheduler: of the class `Family.noise_schedule`, as the model says. vae_factor: finds the pixels of one latent's
    side, and raises RaygardError where the model does not say. prediction_type, snr_gamma: the user's; None for the
    model's own and for no weighting.
    """

    scheduler: Any
    vae_factor: Callable[[], int]
    prediction_type: str | None = None
    snr_gamma: float | None = None


class Family(ABC):
    """A kind of text-to-image model, as diffusers builds it.

    name: in words and messages. pipeline: diffusers' class, `_class_name` in model_index.json. denoiser: sub-folder,
    and the pipeline's attribute. denoiser_class: diffusers' class of it. text_parts: sub-folder -> transformers' class
    of every tokenizer and text encoder. optional_parts: of them, those that a folder may lack. noise_schedule:
    diffusers' scheduler class that training adds noise by. flow_matching: whether the denoiser finds velocities between
    picture and noise, and not Eq 1's targets. pipeline_settings: further arguments of the pipeline when it is loaded.
    sampler_settings: the same of a call of it. default_sampling: inference steps and guidance scale of a call of it
    that names none. latent_multiple: the latents' sides must be a multiple of it. shapes: known denoisers by name, as
    their releases' `config.json` describes them.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    denoiser: ClassVar[str]
    denoiser_class: ClassVar[str]
    text_parts: ClassVar[Mapping[str, str]]
    optional_parts: ClassVar[frozenset[str]] = frozenset()
    noise_schedule: ClassVar[str] = "DDPMScheduler"
    flow_matching: ClassVar[bool] = False
    pipeline_settings: ClassVar[Config] = NOTHING
    sampler_settings: ClassVar[Config] = NOTHING
    default_sampling: ClassVar[tuple[int, float]]
    latent_multiple: ClassVar[int] = 1
    shapes: ClassVar[Mapping[str, Config]] = NOTHING

    @abstractmethod
    def embed(
        self, parts: Mapping[str, Any], captions: Sequence[str], device: torch.device | str, denoiser_config: Config
    ) -> Conditioning:
        """What the pipeline makes of captions, padded as it pads them.

        parts: sub-folder -> tokenizer or text encoder, None for a missing one. device: where the encoders are.
        denoiser_config: the denoiser's config.json.
        """

    @abstractmethod
    def loss(self, settings: LossSettings) -> TrainingLoss:
        """The training loss. Raises RaygardError for a setting that has no effect, or none known, in this family."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, vae_factor: int
    ) -> Tensor:
        """What the denoiser makes of noisy latents (B, C, H, W) at timesteps (B,): (B, C, H, W).

        It computes in the dtype of its parameters.
        """

    @abstractmethod
    def blank_conditioning(self, config: Config) -> Conditioning:
        """Conditioning of one caption of the shapes that a denoiser of this `config.json` takes, of any values."""

    def latent_channels(self, config: Config) -> int:
        """C, from the denoiser's `config.json`."""
        return int(config["in_channels"])

    def sample_size(self, config: Config) -> int:
        """Latents of one side at the model's own resolution. Raises KeyError if `config.json` does not say it."""
        return int(config["sample_size"])
