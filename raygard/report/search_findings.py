"""What the plots of a search's report show, said in one sentence each: their titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygard.outcome import CONTROL
from raygard.report.plots import TARGET_MITIGATION
from raygard.report.search_load import Candidate, SearchFiles
from raygard.report.search_masks import MaskPath
from raygard.search.proxy import is_finite

SETTINGS = (("p", "p"), ("T", "T"), ("L", "L"))
OPTIONAL_SETTINGS = (("rule", "rule"), ("illegal_weight", "illegal weight"), ("legal_weight", "legal weight"))


def listing(items: Sequence[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [f"{item:g}" if isinstance(item, float) else str(item) for item in items]
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def varied_settings(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """p, T and L, and the other settings the search varied: (field of a candidate, its words)."""
    more = [entry for entry in OPTIONAL_SETTINGS if len({c[entry[0]] for c in candidates}) > 1]
    return [*SETTINGS, *more]


def describe(candidate: Candidate, settings: Sequence[tuple[str, str]] = SETTINGS) -> str:
    """`p = 0.3, T = 0.2, L = 5`."""
    values = [(words, candidate[field]) for field, words in settings]
    return ", ".join(f"{words} = {value if isinstance(value, str) else f'{value:g}'}" for words, value in values)


def against_p(files: SearchFiles) -> str:
    """At which p the budget is kept, and where the learned mask blocks more than random ones of its size."""
    kept = sorted({c["p"] for c in files.scored if _upper(c) <= files.budget})
    text = f"The legal budget can be kept at {f'p = {listing(kept)}' if kept else 'no p'}"
    controls = {c["p"]: c["mitigation"] for c in files.controls if c["defence"] == CONTROL}
    compared = [c for c in files.best if c["p"] in controls]
    if not compared:
        return f"{text}; no random masks of the same parameter share were scored"
    above = [c["p"] for c in compared if c["mitigation"] > controls[c["p"]]]
    where = f"at p = {listing(above)}" if above else "at no p"
    where = "at every p compared" if len(above) == len(compared) > 1 else where
    return f"{text}; the learned mask blocks more than random masks of the same parameter share {where}"


def pareto(files: SearchFiles) -> str:
    """Who is on the front, who reaches the aim, and whether a control lies beyond."""
    aim = [c for c in files.scored if c["mitigation"] >= TARGET_MITIGATION and _upper(c) <= files.budget]
    corner = f"{len(aim) or 'none'} in the corner of the aim"
    if files.choice is None:
        return f"{_count(len(files.scored), 'candidate')} scored, {corner}; without a choice there is no front"
    text = f"{_count(len(files.front), 'candidate')} of {len(files.scored)} on the front, {corner}"
    if not files.controls:
        return text
    beyond = [c for c in files.controls if _beats_one(c, files.front)]
    return text + f"; {_count(len(beyond), 'control') if beyond else 'no control'} beyond the front"


def _beats_one(control: Mapping[str, Any], front: Sequence[Candidate]) -> bool:
    return any(control["mitigation"] >= c["mitigation"] and _upper(control) <= _upper(c) for c in front)


def _upper(entry: Mapping[str, Any]) -> float:
    interval = entry["legal_impact_ci"]
    return float("inf") if interval is None else float(interval[1])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def settings_that_matter(files: SearchFiles) -> str:
    """By how much the mean score differs over the values of each setting, largest first."""
    ranges = []
    for field, words in varied_settings(files.scored):
        groups: dict[Any, list[float]] = {}
        for candidate in files.scored:
            if is_finite(candidate["score"]):
                groups.setdefault(candidate[field], []).append(candidate["score"])
        means = [sum(scores) / len(scores) for scores in groups.values()]
        if len(means) > 1:
            ranges.append((max(means) - min(means), words))
    if not ranges:
        return "One point was scored, so no setting can be compared"
    (largest, first), *others = sorted(ranges, reverse=True)
    rest = ", ".join(f"{words} {value:.2f}" for value, words in others)
    return f"{first} moves the score most: its means differ by {largest:.2f}{f' ({rest})' if rest else ''}"


def cost(files: SearchFiles) -> str:
    """Where the time of the trials went and how many were stopped early."""
    sums = {s: sum(t["seconds"].get(s) or 0.0 for t in files.trials) for s in ("learn", "adapt", "generate", "score")}
    total, statuses = sum(sums.values()), [t["status"] for t in files.trials]
    if not total:
        return "No time was recorded"
    stage = max(sums, key=lambda name: sums[name])
    words = {"learn": "learning masks", "adapt": "adapting", "generate": "generating pictures", "score": "scoring"}
    stops = f"{statuses.count('pruned')} of {_count(len(statuses), 'trial')} pruned, {statuses.count('failed')} failed"
    return f"{sums[stage] / total:.0%} of {total:,.0f} s went into {words[stage]}; {stops}"


def added_blocks(path: MaskPath) -> str:
    """Where a larger p freezes more."""
    if not path.steps:
        return f"Only p = {path.p[0]:g} has a mask, so nothing shows how the mask grows"
    places: dict[str, list[float]] = {}
    for step in path.steps:
        if step.blocks:
            places.setdefault(step.blocks[0][0], []).append(step.larger)
    parts = [f"{block} (p = {listing(ps)})" for block, ps in places.items()]
    return f"A larger p adds most tensors in {listing(parts)}" if parts else "A larger p adds no tensors"


def overlap(path: MaskPath | None, seeds: Sequence[Mapping[str, Any]]) -> str:
    """How much of a mask a larger p keeps, and on how much two seeds agree."""
    parts = []
    if path is not None:
        kept = [float(path.nested[i, i + 1]) for i in range(len(path.p) - 1)]
        chance = path.ratios[1:].tolist()
        parts.append(f"The next larger p keeps {_range(kept)} of a mask (by chance {_range(chance)})")
    if seeds:
        agree = _range([entry["seed_agreement"] for entry in seeds])
        chance_words = _range([entry["seed_agreement_chance"] for entry in seeds])
        parts.append(f"two seeds agree on {agree} of the frozen tensors (by chance {chance_words})")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def proxy(record: Mapping[str, Any]) -> str:
    """Whether the proxy ranks trials as the final score does, and whether it pruned."""
    calibration = record.get("calibration") or {}
    known = {f: rho for f, rho in (calibration.get("correlation") or {}).items() if is_finite(rho)}
    if not known:
        return "The proxy could not be compared with the final score, so nothing was pruned"
    low, high = min(known.values()), max(known.values())
    span = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    if not calibration["pruning"]:
        return f"The proxy ranks trials too loosely (rank correlation {span}), so pruning was off"
    fidelities = listing([float(f) for f in calibration["fidelities"]])
    return f"The proxy ranks trials well enough (rank correlation {span}) to prune at fidelity {fidelities}"
