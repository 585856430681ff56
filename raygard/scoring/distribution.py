"""How far the pictures drawn are, as a distribution, from the references: Frechet distance and kernel distance."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raygard.errors import RaygardError


class TooFewPictures(UserWarning):
    """A Frechet distance from too few pictures: it is biased upwards, the more the fewer there are."""


class _AsTheyAre(nn.Module):
    """torchmetrics wants a network; the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(
    scorer: str, generated: NDArray[np.float32], references: NDArray[np.float32], enough: int
) -> float:
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500, Eq 6).

    enough: warns with `TooFewPictures` if either side has fewer pictures. Raises RaygardError below two pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _at_least_two(scorer, generated, references)
    fewest = min(len(generated), len(references))
    if fewest < enough:
        warnings.warn(
            f"{scorer} of {len(generated)} against {len(references)} pictures is biased upwards (it wants {enough} on "
            "each side); compare only equal numbers, or use kid_enlite0, which is unbiased",
            TooFewPictures,
            stacklevel=2,
        )
    metric = FrechetInceptionDistance(feature=_AsTheyAre(generated.shape[1]))
    for features, real in ((references, True), (generated, False)):
        metric.update(torch.from_numpy(features.astype(np.float64)), real=real)
    return float(metric.compute())


def kernel_distances(
    scorer: str, generated: NDArray[np.float32], references: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What each generated picture adds to the kernel distance: float32 (n,), whose mean is the unbiased estimate.

    Squared maximum mean discrepancy of features (n, d) and (m, d) with the cubic kernel of KID (Binkowski et al. 2018,
    arXiv 1801.01401, Eq 4): it has no bias for any number of pictures, so averages over parts of the pictures do not
    either, and it can be negative. Raises RaygardError below two pictures on either side.
    """
    from torchmetrics.image.kid import poly_kernel

    _at_least_two(scorer, generated, references)
    fake, real = (torch.from_numpy(features.astype(np.float64)) for features in (generated, references))
    among, between, within = poly_kernel(fake, fake), poly_kernel(fake, real), poly_kernel(real, real)
    n, m = len(fake), len(real)
    own = (among.sum(1) - among.diagonal()) / (n - 1)
    theirs = (within.sum() - within.diagonal().sum()) / (m * (m - 1))
    return (own - 2 * between.mean(1) + theirs).numpy().astype(np.float32)


def no_single_distances(scorer: str) -> RaygardError:
    """The error of a scorer that has one number for all pictures together."""
    return RaygardError(
        f"scorer {scorer} compares whole sets of pictures and gives no distance for each picture; take `between`, or "
        "kid_enlite0 as evaluation.scorer"
    )


def _at_least_two(scorer: str, generated: NDArray[np.float32], references: NDArray[np.float32]) -> None:
    if min(len(generated), len(references)) < 2:
        raise RaygardError(
            f"scorer {scorer} needs two pictures on each side, found {len(generated)} generated and "
            f"{len(references)} reference pictures"
        )
