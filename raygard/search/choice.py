"""choice.json: which candidate the publisher should release, and the plain statement that goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from raygard.errors import RaygardError
from raygard.outcome import PARTS, legal_upper_bound
from raygard.outcome_text import bracket
from raygard.schemas.choice import Choice, Pick
from raygard.search.proxy import is_finite

RULE = (
    "The p, with its temperature T and inner-loop length L, of largest mitigation among those whose legal impact's "
    "upper 95 % confidence bound stays within the budget."
)
SAVINGS = (
    " Of those within {tolerance:g} of the largest mitigation, the one that freezes the largest share of the "
    "parameters: its users save most."
)
STRANGERS = " So must that of the unseen classes alone."
RETAINED = (
    " A mask that carries values must also raise the release's own loss on general pictures by at most {budget:g} %."
)
MEASURED = tuple(field for part in PARTS for field in (part, f"{part}_ci"))

Candidate = Mapping[str, Any]


def choose(
    candidates: Sequence[Candidate],
    *,
    domain: str,
    legal_budget: float,
    legal_penalty: float,
    config_hash: str,
    seed: int,
    savings_tolerance: float = 0.0,
    base_loss_budget: float | None = None,
    notes: Sequence[str] = (),
    resolvable_legal_impact: float | None = None,
) -> dict[str, Any]:
    """The content of choice.json (raygard/schemas/choice.schema.json) from all candidates of a search, in any order.

    candidates: as in trial.json, measured on the publisher half. Only those with a result for every counted class
    (`incomplete` is empty) whose mitigation, legal impact and both intervals are finite are considered. Ties: smaller
    upper bound of legal impact, larger share of parameters, smaller p, then candidate_id; for `nearest`, where no
    candidate meets the budget, more mitigation comes first among them.
    savings_tolerance: how much mitigation is given up for a mask that saves users more, which is one that freezes more
    parameters (docs/performance.md); 0 gives up none.
    base_loss_budget: largest rise of the release's own loss, as a share; None where no candidate carries values.
    Where some keep it, the front is of these.
    legal_penalty, config_hash, seed: recorded, they do not act on the choice.
    notes, resolvable_legal_impact: of the publisher half, as in outcome.json; recorded, and in the statement.
    Raises RaygardError if no candidate can be considered, or if two share a candidate_id.
    """
    names = sorted(c["candidate_id"] for c in candidates)
    twice = next((name for name, following in pairwise(names) if name == following), None)
    if twice is not None:
        raise RaygardError(f"two candidates of domain '{domain}' are called '{twice}'; each mask needs its own name")
    scored = sorted((c for c in candidates if _is_scored(c)), key=_most_mitigation)
    if not scored:
        raise RaygardError(_nothing_scored(candidates, domain))
    keeping = [c for c in scored if _keeps_release(c, base_loss_budget)]
    within = [c for c in keeping if legal_upper_bound(c) <= legal_budget]
    near = [c for c in within if c["mitigation"] >= within[0]["mitigation"] - savings_tolerance]
    if savings_tolerance:
        near.sort(key=lambda c: -c["param_share"])
    chosen = next(iter(near), None)
    # What spoils the release is no alternative to what keeps it.
    pool = keeping or scored
    nearest = None if chosen is not None else min(pool, key=_least_impact)
    rule = RULE + (SAVINGS.format(tolerance=savings_tolerance) if savings_tolerance else "")
    rule += STRANGERS if any(c.get("unseen_impact") is not None for c in scored) else ""
    rule += "" if base_loss_budget is None else RETAINED.format(budget=100 * base_loss_budget)
    return _finished(
        {
            "schema_version": 1,
            "domain": domain,
            "config_hash": config_hash,
            "seed": seed,
            "rule": rule,
            "legal_budget": legal_budget,
            "base_loss_budget": base_loss_budget,
            "legal_penalty": legal_penalty,
            "meets_budget": chosen is not None,
            "chosen": _pick(chosen),
            "nearest": _pick(nearest),
            "front": [c["candidate_id"] for c in pool if not any(_dominates(other, c) for other in pool)],
            "considered": len(scored),
            "notes": list(notes),
            "resolvable_legal_impact": resolvable_legal_impact,
            "outcome": None,
            "outcome_over_seeds": None,
        }
    )


def with_outcome(
    choice: Mapping[str, Any],
    released: Mapping[str, Any],
    over_seeds: Mapping[str, Any] | None = None,
    path: str = "final/outcome.json",
) -> dict[str, Any]:
    """The choice with the user half's numbers and a statement that includes them.

    released: PARTS and their intervals, of the picked mask alone. over_seeds: the same
    as a mean over masks of several learning seeds, and `mask_seeds`. path: outcome.json they come from, relative to
    the search directory.
    """
    outcome = {**{field: released.get(field) for field in MEASURED}, "path": path}
    mean = None if over_seeds is None else {field: over_seeds.get(field) for field in (*MEASURED, "mask_seeds")}
    return _finished({**choice, "outcome": outcome, "outcome_over_seeds": mean})


def pick_of(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen candidate or, where none meets the budget, the nearest."""
    return choice["chosen"] or choice["nearest"]


def best_by_ratio(candidates: Iterable[Candidate]) -> dict[float, Candidate]:
    """The scored candidate of highest score for each p, p ascending; none that lacks a counted class."""
    best: dict[float, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: (c["p"], c["candidate_id"])):
        if candidate["incomplete"] or not is_finite(candidate["score"]):
            continue
        if candidate["p"] not in best or candidate["score"] > best[candidate["p"]]["score"]:
            best[candidate["p"]] = candidate
    return best


def _finished(choice: Mapping[str, Any]) -> dict[str, Any]:
    return Choice.model_validate({**choice, "statement": _statement(choice)}).model_dump(mode="json")


def _is_scored(candidate: Candidate) -> bool:
    if candidate["incomplete"]:
        return False
    values = [candidate["mitigation"], candidate["legal_impact"]]
    for field in ("mitigation_ci", "legal_impact_ci"):
        values.extend(candidate[field] or (None,))
    return all(is_finite(value) for value in values)


def _nothing_scored(candidates: Sequence[Candidate], domain: str) -> str:
    if not candidates:
        return f"domain '{domain}' has no candidate to choose from: every trial failed; see trials.csv"
    counts = [f"{sum(is_finite(c[field]) for c in candidates)} {field}" for field in ("mitigation", "legal_impact")]
    counts.append(f"{sum(bool(c['incomplete']) for c in candidates)} incomplete")
    return (
        f"none of the {len(candidates)} candidates of domain '{domain}' has mitigation and legal impact with intervals "
        f"({', '.join(counts)}): a role needs a class that full fine-tuning moves by three standard errors, and each "
        "candidate a result for every such class; raise adapt.max_train_steps or generation.num_images, and see the "
        "reasons in search.json"
    )


def _most_mitigation(candidate: Candidate) -> tuple[float, float, float, float, str]:
    equal = -candidate["param_share"], candidate["p"], candidate["candidate_id"]
    return -candidate["mitigation"], legal_upper_bound(candidate), *equal


def _least_impact(candidate: Candidate) -> tuple[float, float, float, str]:
    return legal_upper_bound(candidate), -candidate["mitigation"], candidate["p"], candidate["candidate_id"]


def _keeps_release(candidate: Candidate, base_loss_budget: float | None) -> bool:
    rise = candidate.get("base_loss_rise")
    return base_loss_budget is None or rise is None or bool(rise <= base_loss_budget)


def _dominates(first: Candidate, second: Candidate) -> bool:
    # By the upper bound, as the rule has it: a point estimate could drop the chosen candidate from the front.
    gain, cost = first["mitigation"] - second["mitigation"], legal_upper_bound(first) - legal_upper_bound(second)
    return gain >= 0 and cost <= 0 and (gain > 0 or cost < 0)


def _pick(candidate: Candidate | None) -> dict[str, Any] | None:
    return None if candidate is None else {field: candidate.get(field) for field in Pick.model_fields}


def measure(value: float | None, interval: Sequence[float] | None) -> str:
    """`0.123 [0.100, 0.150]`, or `-` for null."""
    return "-" if value is None else f"{value:.3f} {bracket(interval)}".rstrip()


def rise_words(rise: float | None) -> str:
    """`+1.9 %`, or `-` for null: of the release's own loss."""
    return "-" if rise is None else f"{100 * rise:+.1f} %"


def _statement(choice: Mapping[str, Any]) -> str:
    pick, budget, count = pick_of(choice), choice["legal_budget"], choice["considered"]
    own_budget, rise = choice["base_loss_budget"], pick["base_loss_rise"]
    point = f"p = {pick['p']:g} (T = {pick['T']:g}, L = {pick['L']})"
    scored = f"publisher half, {count} candidate{'s' * (count > 1)} scored"
    if choice["meets_budget"]:
        sentences = [
            f"Release with {point}: {_both(pick)}, whose upper bound is within the budget of {budget:g} ({scored})."
        ]
    else:
        also = (
            "" if own_budget is None else f" and the release's own loss from rising by more than {100 * own_budget:g} %"
        )
        sentences = [
            "No p meets the budget: no candidate keeps the upper 95 % bound of its legal impact within "
            f"{budget:g}{also} ({scored}). The nearest is {point}: {_both(pick)}, "
            f"upper bound {legal_upper_bound(pick):.4g}."
        ]
    if rise is not None:
        sentences.append(f"Its values change the release's own loss on general pictures by {rise_words(rise)}.")
    if pick["mitigation_ci"][0] <= 0:
        sentences.append("Its mitigation is not shown to be above zero.")
    sentences += _conditions(choice)
    if choice["outcome"] is not None:
        sentences.append(f"On the user half, on which nothing was chosen, this mask: {_both(choice['outcome'])}.")
        sentences += _user_half_verdict(choice["outcome"], budget)
    if choice["outcome_over_seeds"] is not None:
        sentences.append(f"{over_seeds_words(choice['outcome_over_seeds'])}.")
    return " ".join(sentences)


def _conditions(choice: Mapping[str, Any]) -> list[str]:
    """What the publisher half's intervals do not cover, as far as its notes say so, and what it can resolve."""
    held = [note for note in choice["notes"] if "conditional on" in note]
    sentences = [f"About these intervals: {' '.join(held)}"] if held else []
    resolvable, budget = choice["resolvable_legal_impact"], choice["legal_budget"]
    if resolvable is not None:
        finer = f", more than the budget of {budget:g}" if resolvable > budget else ""
        sentences.append(f"The smallest legal impact they resolve is {resolvable:.3f}{finer}.")
    return sentences


def over_seeds_words(mean: Mapping[str, Any]) -> str:
    """`Mean over masks of seeds 0, 1 at this point: mitigation ... at a legal impact of ...`."""
    return f"Mean over masks of seeds {', '.join(map(str, mean['mask_seeds']))} at this point: {_both(mean)}"


def _user_half_verdict(outcome: Mapping[str, Any], budget: float) -> list[str]:
    mitigation = outcome["mitigation_ci"]
    sentences = [] if mitigation and mitigation[0] > 0 else ["There it is not shown to block anything."]
    if outcome["legal_impact_ci"] is None:
        return [*sentences, "Its legal impact cannot be measured there."]
    upper = legal_upper_bound(outcome)
    words = "is within the budget" if upper <= budget else f"exceeds the budget of {budget:g}"
    return [*sentences, f"There the upper bound of legal impact, {upper:.4g}, {words}."]


def _both(numbers: Mapping[str, Any]) -> str:
    text = (
        f"mitigation {measure(numbers['mitigation'], numbers['mitigation_ci'])} at a legal impact of "
        f"{measure(numbers['legal_impact'], numbers['legal_impact_ci'])}"
    )
    if numbers.get("unseen_impact") is None:
        return text
    return f"{text} ({measure(numbers['unseen_impact'], numbers['unseen_impact_ci'])} of unseen classes alone)"
