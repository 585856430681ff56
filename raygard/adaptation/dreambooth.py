"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): a rare word for the subject, and its class kept in mind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import nn

from raygard.adaptation.prior import class_pictures
from raygard.adaptation.prompts import Release, learned, require
from raygard.adaptation.training import AdaptResult, Run, begin, train
from raygard.config import AdaptConfig
from raygard.diffusion.loss import DiffusionLoss

if TYPE_CHECKING:
    from raygard.diffusion.cache import LatentSet
    from raygard.mask import FreezeMask


def dreambooth(
    unet: nn.Module,
    data: LatentSet,
    config: AdaptConfig,
    loss: DiffusionLoss,
    *,
    mask: FreezeMask | None,
    seed: int,
    release: Release | None = None,
    **run: Unpack[Run],
) -> AdaptResult:
    """Fine-tune every tensor of `unet` that is not frozen on the class's pictures under a rare word, in place.

    With `config.class_prompt`, pictures that the release draws for it are learned along (prior preservation).
    Arguments and errors are those of `full`; RaygardError also without `release`.
    """
    begin(unet, config, mask)
    release = require(release, "dreambooth")
    prior = class_pictures(unet, data, config, release, release.embed)
    return train(unet, learned(data, config, release), config, loss, seed=seed, prior=prior, **run)
