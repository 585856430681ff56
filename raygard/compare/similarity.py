"""IMMA's similarity gap ratio (Zheng and Yeh, arXiv 2311.18815; methods.md, section 7.2)."""

from __future__ import annotations

import math

from raygard.errors import RaygardError

# How a scorer's numbers become a similarity M: by its unit.
SIMILARITIES = ("cosine similarity",)
COMPLEMENTS = ("cosine distance", "LPIPS")


def similarity(value: float, unit: str) -> float | None:
    """M of IMMA from a scorer's mean: itself for a cosine similarity, 1 - value for cosine distance and LPIPS.

    None for other units, in which the ratio has no meaning.
    """
    if unit in SIMILARITIES:
        return value
    return 1 - value if unit in COMPLEMENTS else None


def sgr(undefended: float, defended: float) -> float:
    """SGR = (M(x_A, x_r) - M(x_I, x_r)) / M(x_A, x_r): the share of similarity that the defence takes away.

    undefended, defended: mean similarity to the references of what the adapted model draws without and with the
    defence. Positive: the defended one is less alike. Raises RaygardError unless M(x_A, x_r) is above 0; never clipped.
    """
    if not (math.isfinite(undefended) and undefended > 0):
        raise RaygardError(f"SGR is undefined: the undefended pictures have similarity {undefended:g}, not above 0")
    return (undefended - defended) / undefended
