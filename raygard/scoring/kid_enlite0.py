"""Kernel distance (KID's estimator) on EfficientNet-Lite0 features. It is not KID, and does not compare with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raygard.scoring.distribution import kernel_distances
from raygard.scoring.fd_enlite0 import FdEnLite0


class KidEnLite0(FdEnLite0):
    """Squared maximum mean discrepancy of 1280 pooled features with KID's cubic kernel; unbiased, can be negative.

    Raises RaygardError if its packages are not installed or the weights are damaged.
    """

    name = "kid_enlite0"
    unit = "squared maximum mean discrepancy"
    per_picture = True

    def between(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> float:
        """Kernel distance of features (n, 1280) and (m, 1280)."""
        return float(kernel_distances(self.name, generated, references).mean(dtype=np.float64))

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """What each picture (n, 1280) adds: float32 (n,), whose mean is `between`.

        Raises RaygardError below two pictures on either side.
        """
        return kernel_distances(self.name, generated, references)
