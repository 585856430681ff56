"""What the plots of a search's report show, said in one sentence each: their titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygard.outcome import CONTROL, legal_upper_bound
from raygard.report.plots import TARGET_MITIGATION
from raygard.report.search_load import Candidate, SearchFiles
from raygard.report.search_masks import MaskPath
from raygard.search.proxy import is_finite
from raygard.search.tables import SECONDS

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
    """At which p the budget is kept, and where the learned mask is shown to differ from random ones of its size."""
    kept = sorted({c["p"] for c in files.scored if legal_upper_bound(c) <= files.budget})
    text = f"The legal budget can be kept at {f'p = {listing(kept)}' if kept else 'no p'}"
    return f"{text}; {_against_random(files)}"


def _against_random(files: SearchFiles) -> str:
    # Nothing is claimed where intervals overlap. They are not of the difference, so that errs on the side of silence.
    controls = {c["candidate_id"]: c for c in files.controls if c["defence"] == CONTROL}
    pairs = [(c, controls[c["candidate_id"]]) for c in files.best if c["candidate_id"] in controls]
    if not pairs:
        return "no random masks of the same parameter share were scored"
    more = [learned["p"] for learned, random in pairs if _lies_above(learned, random)]
    less = [learned["p"] for learned, random in pairs if _lies_above(random, learned)]
    claims = [f"{words} at p = {listing(ps)}" for words, ps in (("more", more), ("less", less)) if ps]
    open_ps = [learned["p"] for learned, _ in pairs if learned["p"] not in (*more, *less)]
    draws = listing(sorted({random["draws"] for _, random in pairs}))
    masks = f"random masks of the same parameter share ({draws} draw{'' if draws == '1' else 's'} at each p)"
    if not claims:
        return f"the learned mask is not shown to block more or less than {masks} at any p compared"
    rest = f", and no difference is shown at p = {listing(open_ps)}" if open_ps else ""
    return f"against {masks}, the learned mask blocks {listing(claims)}{rest}"


def _lies_above(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the whole interval of mitigation lies above the other one."""
    one, other = first["mitigation_ci"], second["mitigation_ci"]
    return one is not None and other is not None and one[0] > other[1]


def pareto(files: SearchFiles) -> str:
    """Who is on the front, who reaches the aim, and whether a control lies beyond."""
    aim = [c for c in files.scored if c["mitigation"] >= TARGET_MITIGATION and legal_upper_bound(c) <= files.budget]
    corner = f"{len(aim) or 'none'} in the corner of the aim"
    if files.choice is None:
        return f"{_count(len(files.scored), 'candidate')} scored, {corner}; without a choice there is no front"
    text = f"{_count(len(files.front), 'candidate')} of {len(files.scored)} on the front, {corner}"
    if not files.controls:
        return text
    beyond = [c for c in files.controls if _beats_one(c, files.front)]
    return text + f"; {_count(len(beyond), 'control') if beyond else 'no control'} beyond the front"


def _beats_one(control: Mapping[str, Any], front: Sequence[Candidate]) -> bool:
    return any(
        control["mitigation"] >= c["mitigation"] and legal_upper_bound(control) <= legal_upper_bound(c) for c in front
    )


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
    sums = {s: sum(t["seconds"].get(s) or 0.0 for t in files.trials) for s in SECONDS[:-1]}
    total, statuses = sum(sums.values()), [t["status"] for t in files.trials]
    if not total:
        return "No time was recorded"
    stage = max(sums, key=lambda name: sums[name])
    words = {
        "learn": "learning masks",
        "values": "training values",
        "adapt": "adapting",
        "generate": "generating pictures",
        "score": "scoring",
    }
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


def pruning(files: SearchFiles) -> str:
    """What the scheduler did with the proxy: how often it was free to stop a trial, and which it stopped."""
    if files.search.get("scheduler") == "fifo":
        return "Nothing is pruned by choice (scheduler fifo)"
    record = files.search["proxy"]
    decisions, threshold = record["decisions"], f"{record['threshold']:g}"
    if not decisions:
        return "No trial reached a rung at which it could be stopped"
    free = [d for d in decisions if d["pruning"]]
    early = sum(not d["pruning"] and d["scored"] < record["calibration_trials"] for d in decisions)
    weak = len(decisions) - len(free) - early
    reasons = []
    if early:
        reasons.append(f"at {early} fewer than {record['calibration_trials']} trials were scored")
    if weak:
        reasons.append(f"at {weak} the rank correlation by then was unknown or below {threshold}")
    stopped = sorted({d["trial_id"] for d in decisions if d["stopped"]})
    text = f"A trial could be stopped at {len(free)} of the {_count(len(decisions), 'rung')} that trials reached"
    text += f" ({', '.join(reasons)})" if reasons else ""
    if not free:
        return f"{text}, so nothing was pruned"
    return f"{text}; {f'stopped: {listing(stopped)}' if stopped else 'no trial was stopped'}"


def proxy(files: SearchFiles) -> str:
    """Whether the calibrated proxy ranks candidates as the final score does."""
    record = files.search["proxy"]
    span, known = correlation_span(record, "score")
    if not known:
        return "The proxy could not be compared with the final score"
    text = f"Over {_count(record['n'], 'candidate')} the proxy's rank correlation with the score is {span}"
    threshold, below = f"the threshold of {record['threshold']:g}", [rho < record["threshold"] for rho in known]
    if all(below):
        return f"{text}, below {threshold}"
    return f"{text}, at some fidelities below {threshold}" if any(below) else f"{text}, not below {threshold}"


def proxy_parts(record: Mapping[str, Any]) -> str:
    """How well the proxy ranks mitigation and legal impact, each for itself."""
    parts = (("mitigation", "mitigation"), ("legal_impact", "legal impact"))
    return ", ".join(f"{words} {correlation_span(record, part)[0]}" for part, words in parts)


def correlation_span(record: Mapping[str, Any], part: str) -> tuple[str, list[float]]:
    """Smallest and largest rank correlation of a part over the fidelities, in words, and all that are known."""
    known = [entry[part] for entry in record["correlation"].values() if is_finite(entry[part])]
    if not known:
        return "unknown", []
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return (low if low == high else f"{low} to {high}"), known
