"""The denoiser whose frozen values are trained, with the release beside it to answer for general pictures.

Training a model further on pictures it has memorised keeps its loss on these and on no others; what it *answers* can be
kept everywhere. After learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282).
"""

from __future__ import annotations

from torch import Tensor, nn

from raygard.bilevel.alternation import DenoiserLoss
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import Teacher, TrainingLoss


class TaughtLoss(DenoiserLoss):
    """As `DenoiserLoss`, and the error of chosen samples is their distance from the release's answers.

    release: the same denoiser untouched, on the same device.
    """

    def __init__(self, denoiser: nn.Module, loss: TrainingLoss, release: nn.Module) -> None:
        super().__init__(denoiser, loss)
        # In a tuple it is no submodule: an engine must neither shard it nor keep it in checkpoints.
        self._release = (release.requires_grad_(False).eval(),)

    @property
    def release(self) -> nn.Module:
        return self._release[0]

    def forward(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Tensor,
        timesteps: Tensor,
        taught: Tensor | None = None,
    ) -> Tensor:
        """Error of each sample, (B,). taught: bool (B,), those that have to answer as the release does."""
        teacher = None if taught is None else Teacher(self.release, taught)
        return self.errors(self.denoiser, latents, conditioning, noise, timesteps, teacher)
