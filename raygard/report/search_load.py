"""What a search directory holds, read for the report: candidates, the best of each p, masks, the final outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raygard.errors import RaygardError
from raygard.report.load import RunFiles
from raygard.search.choice import best_by_ratio, pick_of
from raygard.search.proxy import is_finite

SEARCH, CHOICE, FINAL, FINAL_REPORT = "search.json", "choice.json", "final/outcome.json", "final/report.html"

Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class SearchFiles(RunFiles):
    """Lazy, read-only view of a search directory; only search.json must be there."""

    @cached_property
    def search(self) -> dict[str, Any]:
        return self._record(SEARCH, ("domain", "scorer", "legal_budget", "trials")) or {}

    @cached_property
    def choice(self) -> dict[str, Any] | None:
        return self._record(CHOICE, ("chosen", "nearest", "meets_budget", "front", "statement"))

    def _record(self, name: str, fields: tuple[str, ...]) -> dict[str, Any] | None:
        found = self._json(name)
        missing = [field for field in fields if not isinstance(found, dict) or field not in found]
        if missing and (self.path / name).exists():
            raise RaygardError(f"{self.path / name} is damaged: it has no '{missing[0]}'; run the search again")
        return found

    @cached_property
    def final(self) -> dict[str, Any] | None:
        """The outcome of the picked mask on the user half."""
        return self._json(FINAL)

    @property
    def budget(self) -> float:
        """Largest legal impact the domain tolerates."""
        return float(self.search["legal_budget"])

    @property
    def ratio_axis(self) -> str:
        """What p counts, as the label of an axis."""
        by_params = self.config.get("mask", {}).get("budget") == "params"
        return f"freeze ratio p (share of {'parameters' if by_params else 'tensors'})"

    @property
    def trials(self) -> list[dict[str, Any]]:
        return self.search["trials"]

    @property
    def controls(self) -> list[dict[str, Any]]:
        return [c for c in self.search.get("controls") or [] if is_finite(c["mitigation"])]

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """Every candidate mask, by p, T and L, with the status of its trial or "incomplete" if it lost a class."""
        found = [
            {**c, "status": "incomplete" if c["incomplete"] else trial["status"]}
            for trial in self.trials
            for c in trial["candidates"]
        ]
        return sorted(found, key=lambda c: (c["p"], c["T"], c["L"], c["candidate_id"]))

    @cached_property
    def scored(self) -> list[dict[str, Any]]:
        """Candidates whose mitigation was measured on every counted class; only these can be compared."""
        return [c for c in self.candidates if is_finite(c["mitigation"]) and not c["incomplete"]]

    @cached_property
    def best(self) -> list[Candidate]:
        """One candidate for each p: the one the controls are matched to, else the one of highest score."""
        matched = {control["candidate_id"] for control in self.controls}
        found = best_by_ratio(self.scored) | {c["p"]: c for c in self.scored if c["candidate_id"] in matched}
        return [found[p] for p in sorted(found)]

    @property
    def pick(self) -> Candidate | None:
        """The chosen candidate or, where none meets the budget, the nearest."""
        return None if self.choice is None else pick_of(self.choice)

    @property
    def pick_id(self) -> str | None:
        return None if self.pick is None else self.pick["candidate_id"]

    @property
    def front(self) -> list[dict[str, Any]]:
        """Candidates that no other beats in mitigation and in the upper bound of legal impact; least impact first."""
        names = set(self.choice["front"]) if self.choice else set()
        return sorted((c for c in self.scored if c["candidate_id"] in names), key=lambda c: c["mitigation"])

    def masks(self, candidates: Iterable[Candidate]) -> dict[float, list[dict[str, Any]]]:
        """The tensors of each candidate's manifest by p; a mask that is not there is left out."""
        manifests = {c["p"]: self._json(f"{c['mask']}/mask.json") for c in candidates}
        return {p: manifest["tensors"] for p, manifest in manifests.items() if manifest}


def last_proxy(candidate: Candidate) -> Mapping[str, Any] | None:
    """The proxy at the highest fidelity the candidate reached."""
    return max(candidate["proxy"], key=lambda entry: entry["fidelity"], default=None)
