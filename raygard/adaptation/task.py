"""What every adaptation is given, and the one signature under which all of them are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from torch import nn

from raygard.adaptation.prior import class_pictures
from raygard.adaptation.prompts import Release, learned, require
from raygard.adaptation.training import AdaptResult, Run, check_optimizer, train
from raygard.config import AdaptConfig, ModelConfig
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import TrainingLoss
from raygard.diffusion.model import require_one_text_encoder

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet
    from raygard.mask import FreezeMask


@dataclass(frozen=True)
class Task:
    """A released model under its mask, the user's pictures, and how he trains. `released` is None if not at hand."""

    denoiser: nn.Module
    data: LatentSet
    config: AdaptConfig
    loss: TrainingLoss
    seed: int
    released: Release | None
    run: Run

    @property
    def release(self) -> Release:
        """The model besides its denoiser. Raises RaygardError if there is none."""
        return require(self.released, self.config.method)

    def learned(self) -> LatentSet:
        """The user's pictures under the captions they are learned under."""
        return learned(self.data, self.config, self.released)

    def prior(self, embed: Callable[[list[str]], Conditioning]) -> LatentSet | None:
        """Pictures of `config.class_prompt` for prior preservation; None without a prompt. See `class_pictures`."""
        return class_pictures(self.denoiser, self.data, self.config, self.release, embed)

    def train(self, data: LatentSet, *, text: nn.Module | None = None, prior: LatentSet | None = None) -> AdaptResult:
        """`train` with this task's model, settings and seed."""
        return train(self.denoiser, data, self.config, self.loss, seed=self.seed, text=text, prior=prior, **self.run)


@dataclass(frozen=True)
class Adaptation:
    """A method under the signature all adaptations share, with the mask in force before it begins. A decorator.

    one_text_encoder: what needs a model with a single text encoder, in words; None if the method works on any.
    """

    method: Callable[[Task], AdaptResult]
    one_text_encoder: str | None = None

    def check_family(self, model: ModelConfig) -> None:
        """Raise RaygardError if the method does not work on this family of models."""
        if self.one_text_encoder is not None:
            require_one_text_encoder(model, self.one_text_encoder)

    def __call__(
        self,
        denoiser: nn.Module,
        data: LatentSet,
        config: AdaptConfig,
        loss: TrainingLoss,
        *,
        mask: FreezeMask | None,
        seed: int,
        release: Release | None = None,
        **run: Unpack[Run],
    ) -> AdaptResult:
        """Adapt `denoiser`, in place, to the pictures `data`; it keeps the released model's modules and names.

        mask: applied (and verified) first; None leaves `requires_grad` as it is. Frozen tensors are never changed and
        have no gradient and no optimizer state, unless `config.ignore_mask` says that the user is an attacker.
        release: the rest of the model, where the method or the captions need it. run: see `Run`.
        Raises RaygardError for another model's mask, for a `release` that is missing or of a family the method does not
        work on, for an optimizer whose package is missing, and as `train` does.
        """
        if release is not None:
            self.check_family(release.model)
        check_optimizer(config)
        # An adaptation that broke off while it accumulated has left gradients.
        denoiser.zero_grad()
        if mask is not None:
            mask.apply(denoiser)
            if config.ignore_mask:
                denoiser.requires_grad_(True)
        return self.method(Task(denoiser, data, config, loss, seed, release, run))
