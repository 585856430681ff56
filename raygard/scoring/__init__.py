"""Scorers: evaluation models that say how far pictures are from a class. One file and one `register` line
each."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Literal, Protocol

from raygard.errors import RaygardError, nearest
from raygard.scoring.style_enlite0 import StyleEnLite0

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCORERS: dict[str, Callable[..., Scorer]] = {}


class Scorer(Protocol):
    """An evaluation model, named for what it is.

    direction: "distance" (lower is closer to the target) or "similarity". unit, source, licence: for the
    report.
    """

    name: str
    direction: Literal["distance", "similarity"]
    unit: str
    source: str
    licence: str

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings (n, d) of pictures uint8 (n, H, W, 3)."""
        ...

    def distances(self, generated: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean distance of each generated embedding (n, d) to the references (m, d): (n,)."""
        ...


def register(name: str, factory: Callable[..., Scorer]) -> None:
    """Add a scorer; `factory()` loads it on the CPU, `factory(device="cuda")` on a GPU if it can.

    Raises RaygardError if the name is taken.
    """
    if name in SCORERS:
        raise RaygardError(f"scorer '{name}' is registered twice")
    SCORERS[name] = factory


def get_scorer(name: str, device: str = "cpu") -> Scorer:
    """Load the scorer called `name` (`evaluation.scorer`).

    device: "cpu" or "cuda". Raises RaygardError with the nearest known name, if the packages it needs are missing,
    or if it runs on the CPU only.
    """
    if name not in SCORERS:
        raise RaygardError(f"unknown scorer '{name}' (evaluation.scorer){nearest(name, SCORERS)}")
    factory = SCORERS[name]
    if device == "cpu":
        return factory()
    if "device" not in signature(factory).parameters:
        raise RaygardError(f"scorer '{name}' runs on the CPU only; set evaluation.scorer_gpus to 0")
    return factory(device=device)


register(StyleEnLite0.name, StyleEnLite0)
