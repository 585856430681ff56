"""A scorer that costs nothing, so that a benchmark measures the passing of items: the distance of mean colours."""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray

# Seconds to sleep over each item, to have a scorer that is slower than the generators.
DELAY = "RAYGARD_MEAN_COLOUR_DELAY"


class MeanColour:
    name = "mean_colour"
    direction = "distance"
    unit = "grey levels"
    source = "benchmarks/mean_colour.py"
    licence = "Apache-2.0"

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images.mean(axis=(1, 2), dtype=np.float32)

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(float(os.environ.get(DELAY, "0")))
        return np.linalg.norm(generated[:, None] - references[None], axis=2).mean(axis=1).astype(np.float32)


def add_scorer() -> None:
    """Make the scorer known in this process; Ray calls it in every worker that starts."""
    from raygard.scoring import SCORERS, register

    if MeanColour.name not in SCORERS:
        register(MeanColour.name, MeanColour)  # type: ignore[arg-type]
