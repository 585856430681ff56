"""The diffusion training loss (Eq 1) and its random draws.

Shape letters: B batch, C latent channels, H, W latent sides, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from raygard.errors import RaygardError
from raygard.seeding import generator

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from raygard.diffusion.cache import LatentSet

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DiffusionLoss:
    """Squared error of the denoiser, one number for each sample.

    prediction_type: overrides the scheduler's ("epsilon" or "v_prediction").
    snr_gamma: min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); None weights all timesteps alike.
    Raises RaygardError for a prediction type without a loss here.
    """

    def __init__(
        self, scheduler: DDPMScheduler, prediction_type: str | None = None, snr_gamma: float | None = None
    ) -> None:
        # diffusers' classes reach a type checker as placeholders without attributes.
        self.scheduler = cast(Any, scheduler)
        self.prediction_type = prediction_type or self.scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise RaygardError(
                f"prediction type '{self.prediction_type}' is not supported; model.prediction_type may be "
                f"{' or '.join(PREDICTION_TYPES)}"
            )
        self.snr_gamma = snr_gamma

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def per_sample(self, unet: nn.Module, latents: Tensor, text: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean over C, H, W of the squared error, times the SNR weight: float32 (B,).

        latents, noise: float32 (B, C, H, W). text: (B, L, D). timesteps: int64 (B,). All on the denoiser's
        device; the denoiser computes in the dtype of its parameters, the error is taken in float32.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        dtype = next(unet.parameters()).dtype
        predicted = unet(noisy.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
        error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        return error if self.snr_gamma is None else error * self._snr_weight(timesteps)

    def _snr_weight(self, timesteps: Tensor) -> Tensor:
        kept = self.scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
        snr = kept / (1 - kept)
        weight = snr.clamp(max=self.snr_gamma)
        # Beta schedules rescaled to zero terminal SNR need the v target, whose weight has snr + 1 below.
        return weight / snr if self.prediction_type == "epsilon" else weight / (snr + 1)


def draw(
    seed: int,
    stream: str,
    step: int,
    sample_ids: Sequence[int],
    shape: Sequence[int],
    num_timesteps: int = 1000,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers of one batch: latent noise (B, *shape), diffusion noise (B, *shape), timesteps int64
    (B,).

    Each row comes from a generator keyed by (seed, stream, step, sample id), so it depends on neither the
    batch nor the worker it is in. Repeated ids within a batch get repeated rows. On the CPU.
    """
    eps, noise, timesteps = [], [], []
    for sample in sample_ids:
        rng = generator(seed, stream, step, int(sample))
        eps.append(torch.randn(*shape, generator=rng))
        noise.append(torch.randn(*shape, generator=rng))
        timesteps.append(torch.randint(num_timesteps, (), generator=rng))
    return torch.stack(eps), torch.stack(noise), torch.stack(timesteps)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, data: LatentSet, loss: DiffusionLoss, seed: int, batch_size: int, num_draws: int
) -> float:
    """Mean loss over all rows of `data` and `num_draws` fixed draws for each, so models are compared on equal
    noise.

    Local. The denoiser is put into evaluation mode and back. Raises RaygardError if there are no rows.
    """
    if len(data) == 0:
        raise RaygardError("no pictures to compute a loss on")
    parameter = next(unet.parameters())
    training = unet.training
    unet.eval()
    total = torch.zeros((), dtype=torch.float64)
    for number in range(num_draws):
        for start in range(0, len(data), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(data)))
            eps, noise, timesteps = draw(seed, "held-out", number, rows.tolist(), data.shape, loss.num_timesteps)
            errors = loss.per_sample(
                unet,
                data.latents(rows, eps).to(parameter.device),
                data.text[rows].to(parameter.device),
                noise.to(parameter.device),
                timesteps.to(parameter.device),
            )
            total += errors.double().sum().cpu()
    unet.train(training)
    return float(total / (num_draws * len(data)))
