"""The early proxy of a trial: blocked adaptation by held-out loss, and whether it may be trusted to prune.

Held-out losses and the scorer's distances live on different scales: a mask may block a tenth of the loss and all of
the style. The budget is stated on the scorer's scale, so mitigation and legal impact are first mapped there, each by a
line fitted on the trials that were scored to the end, and only then put into the score's formula. A fidelity prunes
only if that prediction, made for each scored trial without its own result, ranks as the score does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raygard.errors import RaygardError

MIN_PAIRS_TO_CORRELATE = 3
MIN_PAIRS_TO_FIT = 2

Parts = tuple[float | None, float | None]
"""Mitigation and legal impact of one candidate."""


def is_finite(value: float | None) -> bool:
    """Neither null nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def blocked_by_loss(
    guarded: Mapping[str, float], full: Mapping[str, float], base: Mapping[str, float], roles: Mapping[str, str]
) -> Parts:
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
    """Mitigation less `penalty` times what the legal impact exceeds the budget by.

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


@dataclass
class Evidence:
    """What the proxies of a search's trials said, and what came of them.

    A trial has one or several candidates, always in the same order; its value is that of the best. proxies: trial ->
    fidelity -> parts of each candidate by held-out loss, in the order in which trials reported. finals: trial ->
    parts of each candidate by the scorer.
    """

    budget: float
    penalty: float
    proxies: dict[str, dict[float, list[Parts]]] = field(default_factory=dict)
    finals: dict[str, list[Parts]] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def add_record(self, record: Mapping[str, Any], fidelities: Mapping[float, float] | None = None) -> None:
        """Take in a trial.json. fidelities: what to call each fidelity; default as it is."""
        candidates = record["candidates"]
        length = min((len(entry["proxy"]) for entry in candidates), default=0)
        for index in range(length):
            fidelity = candidates[0]["proxy"][index]["fidelity"]
            key = fidelity if fidelities is None else fidelities[fidelity]
            parts = [_parts(entry["proxy"][index]) for entry in candidates]
            self.proxies.setdefault(record["trial_id"], {})[key] = parts
        if record["status"] == "scored":
            self.finals[record["trial_id"]] = [_final_parts(entry) for entry in candidates]

    def scored_at(self, fidelity: float) -> list[str]:
        """Trials with a final score and a proxy at this fidelity."""
        return [t for t in self.finals if fidelity in self.proxies.get(t, {}) and self.score(t) is not None]

    def score(self, trial: str) -> float | None:
        """Final score of a trial: that of its best candidate."""
        return _best(score(*parts, self.budget, self.penalty) for parts in self.finals.get(trial, ()))

    def predictions(self, trial: str, fidelity: float) -> list[float | None]:
        """Final score each candidate of a trial is expected to get, from the other trials' results.

        None where too few trials are scored, or the proxy has no value.
        """
        known = [
            pair
            for other in self.scored_at(fidelity)
            if other != trial
            for pair in zip(self.proxies[other][fidelity], self.finals[other], strict=True)
        ]
        lines = [_line([(proxy[part], final[part]) for proxy, final in known]) for part in (0, 1)]
        found: list[float | None] = []
        for parts in self.proxies[trial][fidelity]:
            mitigation, legal_impact = (_on_line(line, value) for line, value in zip(lines, parts, strict=True))
            unknown = legal_impact is None and any(final[1] is not None for _, final in known)
            found.append(None if unknown else score(mitigation, legal_impact, self.budget, self.penalty))
        return found

    def prediction(self, trial: str, fidelity: float) -> float | None:
        """Expected final score of a trial's best candidate."""
        return _best(self.predictions(trial, fidelity))

    def correlation(self, fidelity: float) -> float | None:
        """Spearman's rho of prediction and final score over the trials scored so far, each left out of its own fit."""
        trials = self.scored_at(fidelity)
        return rank_correlation([self.prediction(t, fidelity) for t in trials], [self.score(t) for t in trials])

    def part_correlations(self, fidelity: float) -> dict[str, float | None]:
        """Spearman's rho of each part's proxy with its final value, over all candidates."""
        pairs = [
            pair
            for trial in self.scored_at(fidelity)
            for pair in zip(self.proxies[trial][fidelity], self.finals[trial], strict=True)
        ]
        return {
            name: rank_correlation([proxy[part] for proxy, _ in pairs], [final[part] for _, final in pairs])
            for part, name in enumerate(("mitigation", "legal_impact"))
        }

    def is_trusted(self, fidelity: float, *, threshold: float, min_trials: int) -> bool:
        """Whether a fidelity may prune: enough trials scored to the end, and a rho of at least `threshold`."""
        rho = self.correlation(fidelity)
        return len(self.scored_at(fidelity)) >= min_trials and rho is not None and rho >= threshold


def with_predictions(records: Sequence[Mapping[str, Any]], evidence: Evidence) -> list[dict[str, Any]]:
    """Trial records whose candidates' proxies also have "score", the calibrated prediction."""
    found = []
    for record in records:
        known = evidence.proxies.get(record["trial_id"], {})
        predicted = {fidelity: evidence.predictions(record["trial_id"], fidelity) for fidelity in known}
        candidates = [
            {
                **candidate,
                "proxy": [
                    {**entry, "score": predicted[entry["fidelity"]][index] if entry["fidelity"] in predicted else None}
                    for entry in candidate["proxy"]
                ],
            }
            for index, candidate in enumerate(record["candidates"])
        ]
        found.append({**record, "candidates": candidates})
    return found


def summary(evidence: Evidence, fidelities: Sequence[float]) -> dict[str, Any]:
    """What search.json says of the proxy: {"n", "correlation": {fidelity: {"score", "mitigation", "legal_impact"}}}."""
    finals = [score(*parts, evidence.budget, evidence.penalty) for found in evidence.finals.values() for parts in found]
    return {
        "n": sum(is_finite(value) for value in finals),
        "correlation": {
            str(fidelity): {"score": evidence.correlation(fidelity), **evidence.part_correlations(fidelity)}
            for fidelity in fidelities
        },
    }


def _parts(entry: Mapping[str, Any]) -> Parts:
    return entry["mitigation"], entry["legal_impact"]


def _final_parts(candidate: Mapping[str, Any]) -> Parts:
    return (None, None) if candidate["incomplete"] else _parts(candidate)


def _best(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _line(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[float, float] | None:
    """Least-squares intercept and slope; a falling line is replaced by the mean, since more blocked is not less."""
    known = np.array([pair for pair in pairs if all(is_finite(value) for value in pair)], dtype=np.float64)
    if len(known) < MIN_PAIRS_TO_FIT:
        return None
    x, y = known[:, 0], known[:, 1]
    spread = float(((x - x.mean()) ** 2).sum())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum()) / spread) if spread > 0 else 0.0
    return float(y.mean() - slope * x.mean()), slope


def _on_line(line: tuple[float, float] | None, value: float | None) -> float | None:
    return None if line is None or value is None else line[0] + line[1] * value
