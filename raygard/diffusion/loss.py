"""Training losses and their random draws.

Shape letters: B batch, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from raygard.diffusion.conditioning import Conditioning
from raygard.errors import RaygardError
from raygard.seeding import generator

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from raygard.diffusion.cache import LatentSet

PREDICTION_TYPES = ("epsilon", "v_prediction")
# A denoiser, noisy latents (B, C, H, W), timesteps (B,) and conditioning -> what it predicts, (B, C, H, W).
Predictor = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A denoiser whose answers are what the samples `rows`, bool (B,), are to answer. It gets no gradient."""

    denoiser: nn.Module
    rows: Tensor

    @torch.no_grad()
    def replace(
        self, target: Tensor, predict: Predictor, noisy: Tensor, times: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """`target` (B, C, H, W) with its answers in these rows, in float32."""
        rows = self.rows.nonzero().flatten()
        answers = predict(self.denoiser, noisy[rows], times[rows], conditioning.rows(rows))
        return target.float().index_copy(0, rows, answers.float())


class TrainingLoss(Protocol):
    """Squared error of a denoiser, one number for each sample, as a function of noise and timestep.

    num_timesteps: `draw` draws a sample's timestep among so many, all alike; what noise level each stands for is the
    loss's own affair, so that equal ranges of timesteps are equally probable in training.
    """

    @property
    def num_timesteps(self) -> int: ...

    def per_sample(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Mean over C, H, W of the squared error, weighted as the loss weights its timesteps: float32 (B,).

        latents, noise: float32 (B, C, H, W). conditioning: of B captions. timesteps: int64 (B,). All on the denoiser's
        device; the denoiser computes in the dtype of its parameters, the error is taken in float32. teacher: another
        denoiser, whose answers are right for some of the samples instead of what was added to them.
        """
        ...


def predict_from_text(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Of a denoiser that takes the features of the tokens and nothing else. A `Predictor`."""
    dtype = next(denoiser.parameters()).dtype
    return denoiser(noisy.to(dtype), timesteps, conditioning["text"].to(dtype), return_dict=False)[0]


class DiffusionLoss:
    """Eq 1: the denoiser finds the noise, or the velocity, that was added by a `DDPMScheduler`. A `TrainingLoss`.

    prediction_type: overrides the scheduler's ("epsilon" or "v_prediction").
    snr_gamma: min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); None weights all timesteps alike.
    Raises RaygardError for a prediction type without a loss here.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        predict: Predictor = predict_from_text,
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
        self.predict = predict

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def per_sample(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        teacher: Teacher | None = None,
    ) -> Tensor:
        """As `TrainingLoss` says, times the SNR weight. timesteps: of the scheduler."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        if teacher is not None:
            target = teacher.replace(target, self.predict, noisy, timesteps, conditioning)
        predicted = self.predict(denoiser, noisy, timesteps, conditioning)
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
    denoiser: nn.Module, data: LatentSet, loss: TrainingLoss, seed: int, batch_size: int, num_draws: int
) -> float:
    """Mean loss over all rows of `data` and `num_draws` fixed draws for each, so models are compared on equal
    noise.

    Local. The denoiser is put into evaluation mode and back. Raises RaygardError if there are no rows.
    """
    if len(data) == 0:
        raise RaygardError("no pictures to compute a loss on")
    parameter = next(denoiser.parameters())
    training = denoiser.training
    denoiser.eval()
    total = torch.zeros((), dtype=torch.float64)
    for number in range(num_draws):
        for start in range(0, len(data), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(data)))
            eps, noise, timesteps = draw(seed, "held-out", number, rows.tolist(), data.shape, loss.num_timesteps)
            errors = loss.per_sample(
                denoiser,
                data.latents(rows, eps).to(parameter.device),
                data.conditioning[rows].to(parameter.device),
                noise.to(parameter.device),
                timesteps.to(parameter.device),
            )
            total += errors.double().sum().cpu()
    denoiser.train(training)
    return float(total / (num_draws * len(data)))
