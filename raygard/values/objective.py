"""What the frozen values are trained for: legal pictures well, illegal ones badly, general ones as the release does.

Shape letters: B batch, R roles, N noise bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raygard.config import ValuesConfig

ROLES = ("legal", "general", "illegal")
LEGAL, GENERAL, ILLEGAL = range(len(ROLES))
NUM_BINS = 20


def noise_bins(timesteps: Tensor, num_timesteps: int, num_bins: int) -> Tensor:
    """Which of `num_bins` equal ranges of noise levels each timestep is in, int64 (B,)."""
    return (timesteps * num_bins // num_timesteps).clamp(max=num_bins - 1)


@dataclass(frozen=True)
class Objective:
    """The loss of docs/values.md.

    curves: the release's mean error by role and noise bin, float32 (R, N). num_timesteps: of the noise schedule.
    max_illegal_error: relative error of an illegal sample above which nothing more is asked.
    """

    curves: Tensor
    num_timesteps: int
    legal_weight: float
    general_weight: float
    illegal_weight: float
    max_illegal_error: float

    @classmethod
    def of(cls, curves: Tensor, num_timesteps: int, settings: ValuesConfig) -> Objective:
        """With the weights and the cap of the configuration."""
        weights = settings.legal_weight, settings.general_weight, settings.illegal_weight
        return cls(curves, num_timesteps, *weights, settings.max_illegal_error)

    def relative(self, errors: Tensor, roles: Tensor, timesteps: Tensor) -> Tensor:
        """Errors (B,) over the release's: half over its mean of that role, half over that at the noise level.

        errors: of general samples, how far they are from the release's answers (`TaughtLoss`). roles, timesteps: int64
        (B,).
        """
        curves = self.curves.to(errors.device)
        bins = noise_bins(timesteps, self.num_timesteps, curves.shape[1])
        mean, at_noise = curves.mean(dim=1)[roles], curves[roles, bins]
        return 0.5 * errors / mean + 0.5 * errors / at_noise

    def __call__(self, errors: Tensor, roles: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the mean relative error of each role, (R,), of a batch.

        It holds legal and general samples, and illegal ones unless they weigh nothing; their mean is then NaN.
        """
        relative = self.relative(errors, roles, timesteps)
        legal, general = relative[roles == LEGAL].mean(), relative[roles == GENERAL].mean()
        illegal = relative[roles == ILLEGAL]
        loss = self.legal_weight * legal + self.general_weight * general
        if self.illegal_weight > 0:
            loss = loss - self.illegal_weight * illegal.clamp(max=self.max_illegal_error).mean()
        return loss, torch.stack([legal, general, illegal.mean()]).detach()
