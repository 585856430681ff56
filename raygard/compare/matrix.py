"""The matrix: every cell with its result, reason or absence; rows for matrix.csv, and one summary for each defence."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raygard.compare.equal_impact import equal_impact
from raygard.compare.plan import Cell, Variant, classes, learned_alone
from raygard.compare.similarity import sgr, similarity
from raygard.config import RunConfig
from raygard.errors import RaygardError
from raygard.outcome import BASE, NONE, ROLES, outcome_and_samples

DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
COLUMNS = (
    "adaptation", "method", "defence", "role", "class", "draw", "mask_seed", "seed", "scorer", "status", "reason", "n",
    "distance", "d_base", "d_none", "blocked", "relative", "sgr", "undetected", "mean_detected", "freeze_ratio",
    "param_share", "trainable_params", "trainable_share", "seconds_adapt", "seconds_generate", "seconds_score",
    "peak_memory_bytes", "outside_mask", "store",
)  # fmt: skip
# What scorers of faces alone say: share of pictures without one, and the mean distance of the others.
FACES = ("undetected", "mean_detected")
# What two runs of the same matrix need not have in common.
COSTS = ("seconds_adapt", "seconds_generate", "seconds_score", "peak_memory_bytes")

Result = Mapping[str, Any]
Samples = Mapping[tuple[str, str], NDArray[np.float64]]


@dataclass(frozen=True)
class Scale:
    """A scorer's name, direction ("distance" or "similarity") and unit."""

    name: str
    direction: str
    unit: str


@dataclass
class Matrix:
    """All that is known of a comparison so far.

    scales: of evaluation.scorer and the further scorers. num_params: parameters of the denoiser. cells: every user of
    every adaptation, in order. lost: why a defence could not be made. base_loss: held-out loss of the release of each
    defence on general classes. results: of `run_jobs`, results and failures, by scorer and cell; base: those of the
    untouched release, by scorer and class.
    """

    config: RunConfig
    variants: Sequence[Variant]
    scales: Sequence[Scale]
    num_params: int
    cells: Sequence[Cell] = ()
    lost: dict[str, str] = field(default_factory=dict)
    base_loss: dict[str, float] = field(default_factory=dict)
    results: dict[tuple[str, Cell], Result] = field(default_factory=dict)
    base: dict[tuple[str, str], Result] = field(default_factory=dict)

    def add(self, scorer: str, adaptation: str, result: Result) -> None:
        """Take a result or failure of `run_jobs`."""
        if result["defence"] == BASE:
            self.base[scorer, result["class"]] = result
            return
        names = ("defence", "role", "class", "draw", "mask_seed", "seed")
        self.results[scorer, Cell(adaptation, *(result[name] for name in names))] = result

    def rows(self) -> list[dict[str, Any]]:
        """One row (COLUMNS) for each scorer and cell; what is not known or has no meaning is None."""
        return [row for scale in self.scales for variant in self.variants for row in self._rows(scale, variant)]

    def summaries(self) -> list[dict[str, Any]]:
        """One table for each scorer and adaptation: {"scorer", "adaptation", "method", "direction", "unit", "release",
        "defences", "comparisons", "equal_impact", "classes", "notes", "around", "reasons"}, and one entry of "defences"
        for each defence; "release" has the untouched release's own plain distances and faces, "comparisons" is
        outcome.json's, "equal_impact" has an entry for each learned mask.

        With `compare.legal_scorer`, first the tables whose illegal columns are of the first scorer and whose legal ones
        are of that one; "scorer", "direction" and "unit" then name both."""
        pairs = [(scale, scale) for scale in self.scales]
        legal = next((scale for scale in self.scales if scale.name == self.config.compare.legal_scorer), self.scales[0])
        if legal is not self.scales[0]:
            pairs.insert(0, (self.scales[0], legal))
        # The bootstrap is the costly part, and scorers of one role each share theirs with tables of their own.
        outcomes = {
            variant.name: {scale: self._outcome(scale, variant) for scale in self.scales} for variant in self.variants
        }
        return [
            self._summary(dict(zip(ROLES, pair, strict=True)), variant, outcomes[variant.name])
            for pair in pairs
            for variant in self.variants
        ]

    def _cells(self, variant: Variant) -> list[Cell]:
        return [cell for cell in self.cells if cell.adaptation == variant.name]

    def _state(self, scorer: str, cell: Cell) -> tuple[str, str, Result]:
        """(status, reason, result) of a cell."""
        if cell.defence in self.lost:
            return FAILED, self.lost[cell.defence], {}
        found = self.results.get((scorer, cell))
        if found is None:
            return UNFINISHED, "", {}
        if found.get("failed"):
            return FAILED, f"{found['stage']}: {found['reason']}", {}
        return DONE, "", found

    def _measured(self, scale: Scale, variant: Variant) -> list[Result]:
        """Results of classes whose yardsticks are there, base results first."""
        done = {
            cell: found
            for cell in self._cells(variant)
            for status, _, found in [self._state(scale.name, cell)]
            if status == DONE
        }
        known = {cell.cls for cell in done if cell.defence == NONE}
        base = {cls: found for cls in known if (found := self._base(scale, cls)) is not None}
        own = [{**found, "adaptation": variant.name} for cell, found in done.items() if cell.cls in base]
        return [*(base[cls] for cls, _ in classes(self.config) if cls in base), *own]

    def _base(self, scale: Scale, cls: str) -> Result | None:
        """The untouched release's own result; None if it failed or is not there yet."""
        found = self.base.get((scale.name, cls))
        return None if found is None or found.get("failed") else found

    def _outcome(self, scale: Scale, variant: Variant) -> tuple[dict[str, Any], Samples]:
        """outcome.json's content of one adaptation under one scorer, and its bootstrap samples.

        Both are empty without any class that can be measured.
        """
        measured = self._measured(scale, variant)
        if not measured:
            return {"summary": [], "comparisons": [], "classes": [], "notes": []}, {}
        evaluation = self.config.evaluation.model_copy(update={"scorer": scale.name})
        config = self.config.model_copy(update={"evaluation": evaluation})
        return outcome_and_samples(measured, config, self.base_loss, direction=scale.direction)

    def _rows(self, scale: Scale, variant: Variant) -> list[dict[str, Any]]:
        yardsticks = self._yardsticks(scale, variant)
        rows = []
        for cell in self._cells(variant):
            status, reason, found = self._state(scale.name, cell)
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row |= {
                "adaptation": variant.name,
                "method": variant.config.method,
                "defence": cell.defence,
                "role": cell.role,
                "class": cell.cls,
                "draw": cell.draw,
                "mask_seed": cell.mask_seed,
                "seed": cell.seed,
                "scorer": scale.name,
                "status": status,
                "reason": reason,
            }
            if status == DONE:
                row |= self._numbers(found, variant)
                row |= _against(found["distance"], yardsticks.get(cell.cls), scale)
            rows.append(row)
        return rows

    def _yardsticks(self, scale: Scale, variant: Variant) -> dict[str, tuple[float, float]]:
        """(d(base), d(none)) of every class that has both."""
        measured = self._measured(scale, variant)
        base = {found["class"]: found["distance"] for found in measured if found["defence"] == BASE}
        none = {
            cls: [found["distance"] for found in measured if (found["defence"], found["class"]) == (NONE, cls)]
            for cls in base
        }
        return {cls: (base[cls], float(np.mean(none[cls]))) for cls in base}

    def _numbers(self, found: Result, variant: Variant) -> dict[str, Any]:
        same = ("n", "distance", "freeze_ratio", "param_share", "trainable_params", "store")
        numbers = {name: found[name] for name in same}
        numbers |= {name: found.get(name) for name in (*FACES, "peak_memory_bytes")}
        numbers |= {f"seconds_{kind}": found["seconds"].get(kind) for kind in ("adapt", "generate", "score")}
        around = [*(variant.around if found["mask_sha256"] else ()), *found["outside_mask"]]
        return numbers | {
            "trainable_share": found["trainable_params"] / self.num_params,
            "outside_mask": "; ".join(around),
        }

    def _summary(
        self, scales: Mapping[str, Scale], variant: Variant, known: Mapping[Scale, tuple[dict[str, Any], Samples]]
    ) -> dict[str, Any]:
        """scales: the scorer of each role's classes. known: of `_outcome`."""
        names = dict(classes(self.config))
        outcomes = {scale: known[scale] for scale in scales.values()}
        yardsticks = {scale: self._yardsticks(scale, variant) for scale in outcomes}
        lines = {scale: self._rows(scale, variant) for scale in outcomes}
        untouched = {cls: found for cls in names if (found := self._base(scales[names[cls]], cls)) is not None}
        release = _plain({cls: found["distance"] for cls, found in untouched.items()}, names)
        for role in ROLES:
            release |= _faces([found for cls, found in untouched.items() if names[cls] == role], role)
        rows = [row for scale in outcomes for row in lines[scale] if scales[row["role"]] == scale]
        gaps = [entry for role in ROLES for entry in outcomes[scales[role]][0]["classes"] if entry["role"] == role]
        entries = {role: {e["defence"]: e for e in outcomes[scales[role]][0]["summary"]} for role in ROLES}
        compared = {role: {e["against"]: e for e in outcomes[scales[role]][0]["comparisons"]} for role in ROLES}
        defences = []
        for name in dict.fromkeys(row["defence"] for row in rows):
            own = [row for row in rows if row["defence"] == name]
            plain = {cls: _mean([row["distance"] for row in own if row["class"] == cls]) for cls in names}
            measures = _of_roles({role: entries[role].get(name, {}) for role in ROLES}, MEASURES)
            means = _means(own, {entry["class"] for entry in gaps if entry["counted"]})
            # The same under every scorer.
            loss = self.base_loss.get(name)
            defences.append({"defence": name, **measures, "base_loss": loss, **_plain(plain, names), **means})
        samples = {key: drawn for role in ROLES for key, drawn in outcomes[scales[role]][1].items() if key[1] == role}
        points = {
            entry["defence"]: (entry["legal_impact"], entry["mitigation"])
            for entry in defences
            if entry["legal_impact"] is not None and entry["mitigation"] is not None
        }
        incomplete = [entry["defence"] for entry in defences if entry[FAILED] or entry[UNFINISHED]]
        return {
            "scorer": _joined(scale.name for scale in scales.values()),
            "direction": _joined(scale.direction for scale in scales.values()),
            "unit": _joined(scale.unit for scale in scales.values()),
            "adaptation": variant.name,
            "method": variant.config.method,
            "release": release,
            "defences": defences,
            "comparisons": [
                {"against": name, **_of_roles({role: compared[role].get(name, {}) for role in ROLES}, DIFFERENCES)}
                for name in dict.fromkeys(name for role in ROLES for name in compared[role])
            ],
            "equal_impact": {
                name: equal_impact(name, points, samples, incomplete)
                for name in (entry["defence"] for entry in defences)
                if learned_alone(name)
            },
            "classes": gaps,
            "notes": _notes({scale.name: outcomes[scale][0]["notes"] for scale in outcomes})
            + _without([cls for cls in names if cls not in yardsticks[scales[names[cls]]]]),
            "around": sorted({row["outside_mask"] for row in rows if row["outside_mask"]}),
            "reasons": _reasons(rows),
        }


def _against(distance: float, yardsticks: tuple[float, float] | None, scale: Scale) -> dict[str, Any]:
    """What a cell's distance says beside those of the release and of users without a defence."""
    if yardsticks is None:
        return {}
    base, full = yardsticks
    sign = 1.0 if scale.direction == "distance" else -1.0
    found: dict[str, Any] = {
        "d_base": base,
        "d_none": full,
        "blocked": (distance - full) / (base - full) if base != full else None,
        "relative": sign * (distance / full - 1) if full else None,
    }
    undefended, defended = similarity(full, scale.unit), similarity(distance, scale.unit)
    if undefended is not None and defended is not None:
        try:
            found["sgr"] = sgr(undefended, defended)
        except RaygardError as error:
            found["reason"] = str(error)
    return found


# What an outcome says of a defence, and of the learned mask against it, by the role it is about.
MEASURES = {
    "illegal": ("mitigation", "mitigation_ci", "relative_illegal", "worst_illegal"),
    "legal": (
        *("legal_impact", "legal_impact_ci", "unseen_impact", "unseen_impact_ci"),
        *("relative_legal", "worst_legal"),
    ),
}
DIFFERENCES = {
    "illegal": ("mitigation_difference", "mitigation_difference_ci"),
    "legal": ("legal_impact_difference", "legal_impact_difference_ci"),
}


def _of_roles(entries: Mapping[str, Mapping[str, Any]], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The names of each role from that role's entry; None where it has none."""
    return {name: entries[role].get(name) for role in ROLES for name in names[role]}


def _joined(words: Iterable[str]) -> str:
    """Illegal first; once where both are the same."""
    return " / ".join(dict.fromkeys(words))


def _notes(by_scorer: Mapping[str, Sequence[str]]) -> list[str]:
    alone = len(by_scorer) == 1
    return [note if alone else f"{scorer}: {note}" for scorer, notes in by_scorer.items() for note in notes]


def _without(missing: Sequence[str]) -> list[str]:
    if not missing:
        return []
    what = "Without a result of the release itself or of users without a defence, nothing can be said of"
    return [f"{what} {', '.join(missing)}."]


def _plain(distances: Mapping[str, float | None], roles: Mapping[str, str]) -> dict[str, float | None]:
    """{"distance_illegal", "distance_legal"}: plain means over all classes of a role, None unless all have a number.

    Unlike the sums these leave no class out, as in the paper's tables.
    """
    found: dict[str, float | None] = {}
    for role in ROLES:
        values = [distances.get(cls) for cls, own in roles.items() if own == role]
        found[f"distance_{role}"] = None if None in values else _mean(values)
    return found


def _means(rows: Sequence[Mapping[str, Any]], counted: set[str]) -> dict[str, Any]:
    """Means over a defence's cells: of costs over all that are done, of SGR over the counted classes of each role."""
    states = [row["status"] for row in rows]
    found: dict[str, Any] = {status: states.count(status) for status in (DONE, FAILED, UNFINISHED)}
    for name in ("freeze_ratio", "param_share", "trainable_share", "seconds_adapt"):
        found[name] = _mean([row[name] for row in rows])
    for role in ROLES:
        by_class = {
            cls: _mean([row["sgr"] for row in rows if (row["role"], row["class"]) == (role, cls)]) for cls in counted
        }
        found[f"sgr_{role}"] = _mean(list(by_class.values()))
        found |= _faces([row for row in rows if row["role"] == role], role)
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"] is not None]
    return found | {"peak_memory_bytes": max(peaks, default=None)}


def _faces(results: Sequence[Mapping[str, Any]], role: str) -> dict[str, float | None]:
    """What a scorer of faces says beside its distances, of one role; None for other scorers."""
    return {f"{name}_{role}": _mean([found.get(name) for found in results]) for name in FACES}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each reason once, with the defence and the number of cells."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["reason"]:
            key = row["defence"], row["reason"]
            counts[key] = counts.get(key, 0) + 1
    return [f"{defence} ({count} cell{'s' * (count > 1)}): {reason}" for (defence, reason), count in counts.items()]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """matrix.csv: one line for each row; None is an empty field, numbers are written so that they read back equal."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
