"""What families trained by flow matching share: a transformer on patches of latents, with text in one sequence."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.families.base import Config, Family, LossSettings
from raygard.diffusion.flow_matching import FlowLoss
from raygard.diffusion.loss import TrainingLoss
from raygard.errors import RaygardError


class FlowFamily(Family):
    """num_text_tokens: L of the text that the transformer is given."""

    denoiser = "transformer"
    noise_schedule = "FlowMatchEulerDiscreteScheduler"
    flow_matching = True
    # Two by two latents are one token.
    latent_multiple = 2
    num_text_tokens: ClassVar[int]

    def loss(self, settings: LossSettings) -> TrainingLoss:
        if settings.snr_gamma is not None:
            raise RaygardError(f"snr_gamma has no effect on {self.name}, which is trained by flow matching; remove it")
        return FlowLoss(settings.scheduler, partial(self.predict, vae_factor=settings.vae_factor()))

    def blank_conditioning(self, config: Config) -> Conditioning:
        text = torch.empty(1, self.num_text_tokens, config["joint_attention_dim"])
        return Conditioning(text=text, pooled=torch.empty(1, config["pooled_projection_dim"]))
