"""The training loss of SD3 and Flux: flow matching (Liu et al. 2022, arXiv 2209.03003; Esser et al., 2403.03206).

    noisy = (1 - sigma) latents + sigma noise        the denoiser finds the velocity  noise - latents
    E || velocity - predicted(noisy, 1000 sigma) ||^2,   sigma logit-normal

Shape letters: B batch, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import Predictor, Teacher

# "rf/lognorm(0.00, 1.00)", the SD3 paper's choice (arXiv 2403.03206, sections 3.1 and 5.1) and diffusers' SD3 scripts'.
LOGIT_MEAN, LOGIT_STD = 0.0, 1.0


class FlowLoss:
    """Squared error of the velocity, all samples alike: rare noise levels are drawn rarely. A `TrainingLoss`.

    scheduler: diffusers' FlowMatchEulerDiscreteScheduler; the shift of its noise levels towards noise is kept where it
    does not depend on the resolution.
    """

    def __init__(self, scheduler: Any, predict: Predictor) -> None:
        self.predict = predict
        self.num_timesteps = int(scheduler.config.num_train_timesteps)
        chosen = logit_normal_indices(self.num_timesteps)
        self.sigmas, self.times = scheduler.sigmas[chosen].float(), scheduler.timesteps[chosen].float()

    def per_sample(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """As `TrainingLoss` says. timesteps: numbers of equally probable noise levels, from much noise to little."""
        sigma = self.sigmas.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        noisy = (1 - sigma) * latents + sigma * noise
        times, target = self.times.to(latents.device)[timesteps], noise - latents
        if teacher is not None:
            target = teacher.replace(target, self.predict, noisy, times, conditioning)
        predicted = self.predict(denoiser, noisy, times, conditioning)
        return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def logit_normal_indices(num_timesteps: int) -> Tensor:
    """For each of as many equally probable draws, the scheduler's timestep: int64 (num_timesteps,), ascending.

    What diffusers' `compute_density_for_timestep_sampling("logit_normal")` and its scripts' rounding draw at random, as
    quantiles: so a draw stays a function of (seed, stream, step, sample id) alone (`draw`). The quantiles are taken in
    the middle of num_timesteps equal shares, so that the outermost 1 / (2 num_timesteps) of both tails is not drawn.
    """
    share = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
    level = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.special.ndtri(share))
    return (level * num_timesteps).long()
