"""The learned mask against the best baseline at equal legal impact.

Masks block legal users as well, so a larger mitigation alone says nothing. Each baseline is a point (legal impact,
mitigation), the undefended release is (0, 0), a release that nobody can train is (1, 1) by definition, and what the
baselines reach at a legal impact in between is read off the upper edge of their convex hull: the straight line between
two of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raygard.compare.plan import holds_learned
from raygard.errors import RaygardError
from raygard.outcome import LEARNED, NONE

# Needs no measurement: who trains nothing has the release.
CLOSED = "everything frozen"
Points = Mapping[str, tuple[float, float]]
UNMEASURED: Points = {CLOSED: (1.0, 1.0)}


def reached(points: Points, legal_impact: float) -> tuple[float, tuple[str, ...]] | None:
    """The largest mitigation that points reach at `legal_impact`, and the one or two points it lies between.

    points: (legal impact, mitigation) by name. Beyond the largest legal impact it stays what it is there: who harms
    legal users less is not worse. None below the smallest legal impact, which no point reaches.
    Raises RaygardError for a number that is not finite, which has no place on an edge.
    """
    if not all(math.isfinite(value) for value in (legal_impact, *(v for point in points.values() for v in point))):
        raise RaygardError("a mitigation or legal impact is not finite; compare only defences that have both")
    edge: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1], name)):
        while edge and _beneath(points, edge, name):
            edge.pop()
        if not edge or points[name][1] > points[edge[-1]][1]:
            edge.append(name)
    if not edge or legal_impact < points[edge[0]][0]:
        return None
    for left, right in pairwise(edge):
        (x, y), (end, top) = points[left], points[right]
        if legal_impact < end:
            share = (legal_impact - x) / (end - x)
            return y + share * (top - y), ((left,) if share == 0 else (left, right))
    return points[edge[-1]][1], (edge[-1],)


def _beneath(points: Points, edge: list[str], name: str) -> bool:
    """Whether the last point of the edge lies on or under the line from the one before it to `name`."""
    (end, top), (x, y) = points[name], points[edge[-1]]
    if end == x:
        return top > y
    if len(edge) < 2:
        return False
    start, low = points[edge[-2]]
    return (y - low) * (end - start) <= (top - low) * (x - start)


def equal_impact(
    learned: str,
    points: Points,
    samples: Mapping[tuple[str, str], NDArray[np.float64]],
    incomplete: Collection[str] = (),
) -> dict[str, Any] | None:
    """How much more a learned mask mitigates than the baselines at its own legal impact; None without its numbers.

    learned: name of the defence. points: (legal impact, mitigation) of every defence that has both; an edit followed
    by the learned mask is no baseline, nor is a learned mask of another freeze ratio. samples: of
    `outcome_and_samples`. incomplete: defences with cells that failed or are not measured yet.
    Returns {"legal_impact", "mitigation", "reached", "between", "difference", "difference_ci", "incomplete"}: what the
    baselines reach there and between which of them, None where no baseline harms legal users as little; the interval
    is the paired 95 % percentile interval over the bootstrap samples in which every defence has a number (those that
    drew only missing seeds have none) and the baselines reach it; which of the defences in the answer are incomplete.
    """
    if learned not in points:
        return None
    names = [name for name in points if not holds_learned(name)]
    at, own = points[learned]
    found = reached({**UNMEASURED, **{name: points[name] for name in names}}, at)
    entry: dict[str, Any] = {
        "legal_impact": at, "mitigation": own, "reached": None, "between": [], "difference": None,
        "difference_ci": None, "incomplete": [learned] if learned in incomplete else [],
    }  # fmt: skip
    if found is None:
        return entry
    # The noise of the seeds of `none` against itself is no way to defend.
    free = {**UNMEASURED, **({NONE: (0.0, 0.0)} if NONE in names else {})}
    drawn = [name for name in names if name != NONE]
    legal, mitigation = (np.stack([samples[n, role] for n in (learned, *drawn)], 1) for role in ("legal", "illegal"))
    differences = []
    # Without one baseline the edge is another one, so that a sample counts whole or not at all.
    for index in np.flatnonzero((np.isfinite(legal) & np.isfinite(mitigation)).all(1)):
        (learned_at, *ats), (learned_own, *owns) = legal[index].tolist(), mitigation[index].tolist()
        there = reached(free | dict(zip(drawn, zip(ats, owns, strict=True), strict=True)), learned_at)
        if there is not None:
            differences.append(learned_own - there[0])
    if differences:
        entry["difference_ci"] = [float(value) for value in np.percentile(differences, (2.5, 97.5))]
    entry["incomplete"] = [name for name in (learned, *found[1]) if name in incomplete]
    return {**entry, "reached": found[0], "between": list(found[1]), "difference": own - found[0]}


def answers(entries: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The plain answers for one table: a sentence for each learned mask. entries: of `equal_impact` by defence."""
    return [_answer("learned mask" if name == LEARNED else f"learned mask {name}", e) for name, e in entries.items()]


def _answer(who: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return f"The {who} cannot be compared at equal legal impact: mitigation or legal impact is not known."
    place = f"a legal impact of {entry['legal_impact']:.3f}"
    open_ = f" Not all cells of {', '.join(entry['incomplete'])} are measured." if entry["incomplete"] else ""
    if entry["reached"] is None:
        return (
            f"The {who} has a mitigation of {entry['mitigation']:.3f} at {place}; no baseline harms legal users "
            f"as little.{open_}"
        )
    low, high = entry["difference_ci"] or (None, None)
    verdict = "no difference beyond the interval" if low is not None else "no interval is known"
    if low is not None and low > 0:
        verdict = f"the {who} is better"
    elif high is not None and high < 0:
        verdict = "the baselines are better"
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return (
        f"At {place} the {who} has a mitigation of {entry['mitigation']:.3f} and the baselines reach "
        f"{entry['reached']:.3f} ({' to '.join(entry['between'])}): {entry['difference']:+.3f}{interval}, {verdict}."
        f"{open_}"
    )
