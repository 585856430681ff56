"""The trials of a search as CSV and as text, and one table over domains as text and as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raygard.outcome import PARTS
from raygard.search.choice import measure, over_seeds_words, pick_of, rise_words

SETTINGS = ("p", "T", "L", "K", "rule", "illegal_weight", "legal_weight")
SHARES = ("freeze_ratio", "param_share", "base_loss_rise")
PROXY = ("score", "mitigation", "legal_impact")
SECONDS = ("learn", "values", "adapt", "generate", "score", "total")
POINT = {"p": "freeze_ratio", "T": "temperature", "L": "inner_steps", "K": "publisher_steps"}
DOMAIN_HEADER = ("domain", "p", "T", "L", "mitigation [95 %]", "legal impact [95 %]")

Content = Mapping[str, Any]


def point_settings(point: Content) -> dict[str, Any]:
    """p, T, L, ... of a trial's point, under the names candidates have them; p is None where it has all."""
    return {name: point[POINT.get(name, name)] for name in SETTINGS}


def _rows(search: Content) -> list[tuple[Content, Content]]:
    """Every candidate with its trial, by p, T and L; a trial that failed without one has a row of its own."""
    rows: list[tuple[Content, Content]] = []
    for trial in search["trials"]:
        rows += [(trial, candidate) for candidate in trial["candidates"] or [point_settings(trial["point"])]]
    return sorted(rows, key=_order)


def _order(row: tuple[Content, Content]) -> tuple[Any, ...]:
    trial, candidate = row
    p = math.inf if candidate["p"] is None else candidate["p"]
    return p, candidate["T"], candidate["L"], candidate.get("candidate_id", ""), trial["trial_id"]


def _proxies(candidate: Content) -> dict[float, Content]:
    """Proxy entries by fidelity, ascending."""
    entries = sorted(candidate.get("proxy", ()), key=lambda entry: entry["fidelity"])
    return {float(entry["fidelity"]): entry for entry in entries}


def trials_csv(search: Content) -> str:
    """trials.csv: one row a candidate, by p, T and L; a trial that failed without one has one row without numbers.

    search: the content of search.json. Seconds are those of the whole trial, so the candidates of one ranking repeat
    them. Null is an empty cell; numbers are written in full. `incomplete` names counted classes without a result.
    """
    rows = _rows(search)
    fidelities = sorted({fidelity for _, candidate in rows for fidelity in _proxies(candidate)})
    columns = ["domain", "trial_id", "candidate_id", "phase", "status", "incomplete", *SETTINGS, *SHARES]
    columns += [f"proxy_{fidelity}_{field}" for fidelity in fidelities for field in PROXY]
    columns += [f"{field}{end}" for field in PARTS for end in ("", "_low", "_high")]
    columns += ["score", *(f"seconds_{stage}" for stage in SECONDS), "mask_sha256"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial, candidate in rows:
        row = {**candidate, **{key: trial[key] for key in ("trial_id", "phase", "status")}, "domain": search["domain"]}
        row["incomplete"] = "; ".join(candidate.get("incomplete", ()))
        for fidelity, entry in _proxies(candidate).items():
            row |= {f"proxy_{fidelity}_{field}": entry[field] for field in PROXY}
        for field in PARTS:
            row[f"{field}_low"], row[f"{field}_high"] = candidate.get(f"{field}_ci") or (None, None)
        row |= {f"seconds_{stage}": trial["seconds"].get(stage) for stage in SECONDS}
        writer.writerow(row)
    return stream.getvalue()


def format_trials(search: Content, choice: Content) -> str:
    """The candidates of a search as plain text, by p, T and L, what is incomplete or failed and why, the statement.

    Settings that are the same for all candidates, other than p, T and L, are left out. `proxy` is the score expected
    at the highest fidelity the candidate reached, `own loss` the rise of the release's own by the mask's values,
    `unseen` the legal impact on classes that nothing was learned from. The last column marks what is chosen, nearest,
    on the front, incomplete, pruned or failed.
    """
    rows = _rows(search)
    varied = [name for name in SETTINGS[4:] if len({candidate[name] for _, candidate in rows}) > 1]
    settings = ["p", "T", "L", *varied]
    # Only masks with values can move the release's own loss.
    edited = any(candidate.get("base_loss_rise") is not None for _, candidate in rows)
    header = [name.replace("_", " ") for name in settings]
    unseen = any(candidate.get("unseen_impact") is not None for _, candidate in rows)
    header += ["params", *["own loss"] * edited, "proxy", "mitigation [95 %]", "legal impact [95 %]"]
    header += [*["unseen"] * unseen, "score", "seconds", ""]
    lines = [header]
    for trial, candidate in rows:
        proxies = list(_proxies(candidate).values())
        share = candidate.get("param_share")
        lines.append(
            [
                *(_setting(candidate[name]) for name in settings),
                "-" if share is None else f"{share:.1%}",
                *[rise_words(candidate.get("base_loss_rise"))] * edited,
                measure(proxies[-1]["score"] if proxies else None, None),
                *_measured(candidate),
                *[measure(candidate.get("unseen_impact"), None)] * unseen,
                measure(candidate.get("score"), None),
                f"{trial['seconds'].get('total', 0):.0f}",
                _mark(trial, candidate, choice),
            ]
        )
    text = _aligned(lines, left=(len(header) - 1,))
    text += [
        f"{candidate['candidate_id']} incomplete: no result for {', '.join(candidate['incomplete'])}"
        for _, candidate in rows
        if candidate.get("incomplete")
    ]
    text += [f"{t['trial_id']} failed: {t['reason']}" for t in search["trials"] if t["status"] == "failed"]
    return "\n".join([*text, choice["statement"]])


def _measured(numbers: Content) -> list[str]:
    return [measure(numbers.get(field), numbers.get(f"{field}_ci")) for field in ("mitigation", "legal_impact")]


def _setting(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:g}"


def _mark(trial: Content, candidate: Content, choice: Content) -> str:
    name = candidate.get("candidate_id")
    for role in ("chosen", "nearest"):
        if choice[role] is not None and choice[role]["candidate_id"] == name:
            return role
    if name in choice["front"]:
        return "front"
    if candidate.get("incomplete"):
        return "incomplete"
    return "" if trial["status"] == "scored" else str(trial["status"])


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Columns padded to one width, a rule below the first line; `left`: columns that are not flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{'<' if index in left else '>'}{width}" for index, width in enumerate(widths)]
    text = ["  ".join(map(format, line, forms)) for line in lines]
    return [text[0].rstrip(), "-" * len(text[0]), *(line.rstrip() for line in text[1:])]


def _domain_row(search: Content, choice: Content) -> list[str]:
    pick = pick_of(choice)
    p = _setting(pick["p"])
    numbers = ["not scored"] * 2 if choice["outcome"] is None else _measured(choice["outcome"])
    return [
        str(search["domain"]),
        p if choice["meets_budget"] else f"none (nearest: {p})",
        _setting(pick["T"]),
        _setting(pick["L"]),
        *numbers,
    ]


def _budgets(choice: Content) -> str:
    own = choice.get("base_loss_budget")
    also = "" if own is None else f", the release's own loss within {100 * own:g} %"
    return f"{choice['legal_budget']:g} ({choice['domain']}{also})"


def _domain_notes(rows: Sequence[tuple[Content, Content]]) -> list[str]:
    missed = [_budgets(choice) for _, choice in rows if not choice["meets_budget"]]
    notes = []
    if missed:
        notes.append(
            "none: no p keeps the upper 95 % bound of legal impact within the budget of "
            f"{', '.join(missed)}; the numbers are those of the nearest."
        )
    means = [(choice["domain"], choice["outcome_over_seeds"]) for _, choice in rows if choice["outcome_over_seeds"]]
    return notes + [f"{domain}: the row is the picked mask's own. {over_seeds_words(mean)}." for domain, mean in means]


def domains_table(rows: Sequence[tuple[Content, Content]]) -> str:
    """One line a domain as plain text: p, T, L of the choice and its outcome on the user half.

    rows: (content of search.json, content of choice.json), in the order to print. Where no p meets the budget, the
    line says so and shows the nearest. The mean over mask seeds, where there is one, is named below.
    """
    lines = [list(DOMAIN_HEADER), *(_domain_row(search, choice) for search, choice in rows)]
    return "\n".join([*_aligned(lines, left=(0,)), *_domain_notes(rows)])


def domains_markdown(rows: Sequence[tuple[Content, Content]]) -> str:
    """`domains_table` as a Markdown table."""
    lines = [list(DOMAIN_HEADER), *(_domain_row(search, choice) for search, choice in rows)]
    text = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    text.insert(1, "|---|" + "---:|" * (len(DOMAIN_HEADER) - 1))
    return "\n".join(text + [line for note in _domain_notes(rows) for line in ("", note)]) + "\n"
