"""Frechet distance on EfficientNet-Lite0 features. It is not FID, and its numbers do not compare with FID's."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raygard.scoring.common import in_batches, require
from raygard.scoring.distribution import frechet_distance, no_single_distances
from raygard.scoring.enlite0 import LICENCE, NUM_POOLED, SOURCE, enlite0_pooled, load_enlite0

BATCH_SIZE = 32


class FdEnLite0:
    """Frechet distance of 1280 pooled features, at least 0; one number for all pictures together.

    Raises RaygardError if its packages are not installed or the weights are damaged.
    """

    name = "fd_enlite0"
    direction: Literal["distance", "similarity"] = "distance"
    unit = "Frechet distance"
    source = SOURCE
    licence = LICENCE
    per_picture = False

    def __init__(self, device: str = "cpu") -> None:
        require(self.name, "metrics", "torchmetrics")
        self._pooled = partial(enlite0_pooled, load_enlite0(self.name).to(device), device=device)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features float32 (n, 1280) of pictures uint8 (n, H, W, 3)."""
        return in_batches(images, BATCH_SIZE, NUM_POOLED, self._pooled)

    def between(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> float:
        """Frechet distance of features (n, 1280) and (m, 1280).

        Warns with `TooFewPictures` below 1281 pictures: the covariances then have no full rank.
        """
        return frechet_distance(self.name, generated, references, NUM_POOLED + 1)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raises RaygardError: there is no distance for each picture."""
        raise no_single_distances(self.name)
