"""The early proxy of a trial: blocked adaptation by held-out loss, and whether it may be trusted to prune.

A fidelity is the share of the full adaptation after which the proxy was taken. A fidelity prunes only if, on the
calibration trials, which are all scored to the end, its ranking of the candidates agrees with the final one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raygard.errors import RaygardError

MIN_PAIRS_TO_CORRELATE = 3
MIN_PAIRS_TO_PRUNE = 4


def is_finite(value: float | None) -> bool:
    """Neither null nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def blocked_by_loss(
    guarded: Mapping[str, float], full: Mapping[str, float], base: Mapping[str, float], roles: Mapping[str, str]
) -> tuple[float | None, float | None]:
    """Mitigation and legal impact (design.md, section 5) with held-out losses in the place of distances.

    guarded, full: class -> loss after adaptation with and without the mask; base: class -> loss before any.
    roles: class -> "illegal" or "legal". A class that full fine-tuning does not improve is left out; a role that has
    no other class is None. Raises RaygardError for a loss that is not finite.
    """
    for losses, words in ((guarded, "adapted with the mask"), (full, "adapted without a mask"), (base, "as released")):
        for name in roles:
            if not math.isfinite(losses[name]):
                raise RaygardError(
                    f"held-out loss of class '{name}' is {losses[name]} in the model {words}; "
                    "lower adapt.learning_rate or check the model"
                )
    quotients: dict[str, float | None] = {"illegal": None, "legal": None}
    for role in quotients:
        names = [name for name, of in roles.items() if of == role and base[name] - full[name] > 0]
        if names:
            gained = math.fsum(guarded[name] - full[name] for name in names)
            quotients[role] = gained / math.fsum(base[name] - full[name] for name in names)
    return quotients["illegal"], quotients["legal"]


def score(mitigation: float | None, legal_impact: float | None, budget: float, penalty: float) -> float | None:
    """Mitigation less `penalty` times what the legal impact exceeds the budget by; the same for proxy and final.

    None without a finite mitigation, or with a legal impact that is NaN or infinite; a null legal impact (no legal
    class to measure it on) counts as zero.
    """
    if mitigation is None or not math.isfinite(mitigation):
        return None
    impact = 0.0 if legal_impact is None else legal_impact
    return mitigation - penalty * max(0.0, impact - budget) if math.isfinite(impact) else None


def rank_correlation(xs: Sequence[float | None], ys: Sequence[float | None]) -> float | None:
    """Spearman's rho, ties sharing their mean rank; None for fewer than three pairs or if one side is constant.

    xs, ys: equally long; a pair with a member that is null, NaN or infinite is left out.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if is_finite(x) and is_finite(y)]
    if len(pairs) < MIN_PAIRS_TO_CORRELATE or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr

    # Rounded, so that a correlation of exactly 0.5 or 1 is not just below it.
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 12)


def _pairs(candidates: Sequence[Mapping[str, Any]]) -> dict[float, list[tuple[float, float]]]:
    """(proxy score, final score) of every scored candidate, by fidelity, lowest first."""
    found: dict[float, list[tuple[float, float]]] = {}
    for candidate in candidates:
        for entry in candidate["proxy"]:
            pairs = found.setdefault(float(entry["fidelity"]), [])
            if is_finite(entry["score"]) and is_finite(candidate["score"]):
                pairs.append((entry["score"], candidate["score"]))
    return dict(sorted(found.items()))


def _rho(pairs: Sequence[tuple[float, float]]) -> float | None:
    return rank_correlation([proxy for proxy, _ in pairs], [final for _, final in pairs])


def correlations(candidates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Spearman's rho of the proxy score at each fidelity with the final score: {"0.25": rho or None}.

    candidates: as in trial.json; only those with a finite final score count. Lowest fidelity first.
    """
    return {str(fidelity): _rho(pairs) for fidelity, pairs in _pairs(candidates).items()}


def measured(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well the proxy ranks: {"n": candidates with a finite final score, "correlation": {fidelity: rho}}."""
    return {"n": sum(is_finite(c["score"]) for c in candidates), "correlation": correlations(candidates)}


def pruning_allowed(
    candidates: Sequence[Mapping[str, Any]], *, threshold: float = 0.5, min_pairs: int = MIN_PAIRS_TO_PRUNE
) -> list[float]:
    """The fidelities that may prune, ascending: rho of at least `threshold` on at least `min_pairs` candidates."""
    allowed = []
    for fidelity, pairs in _pairs(candidates).items():
        rho = _rho(pairs)
        if len(pairs) >= min_pairs and rho is not None and rho >= threshold:
            allowed.append(fidelity)
    return allowed


def calibrate(
    candidates: Sequence[Mapping[str, Any]], *, threshold: float = 0.5, min_pairs: int = MIN_PAIRS_TO_PRUNE
) -> dict[str, Any]:
    """`proxy.calibration` of search.json: n and correlation as in `measured`, which fidelities prune, and if any."""
    fidelities = pruning_allowed(candidates, threshold=threshold, min_pairs=min_pairs)
    return {**measured(candidates), "pruning": bool(fidelities), "fidelities": fidelities}
