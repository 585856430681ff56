"""An outcome as plain text: its table, and what it says of the learned mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raygard.outcome import CONTROL, PARTS


def compare_sentence(outcome: Mapping[str, Any]) -> str:
    """One honest sentence: does the learned mask beat random masks of the same parameter share?"""
    entry = next((c for c in outcome["comparisons"] if c["against"] == CONTROL), None)
    if entry is None:
        return "The learned mask was not compared with random masks of the same parameter share."
    if entry["mitigation_difference"] is None:
        return "No illegal class counts, so the learned mask cannot be compared with random masks."
    parts = []
    for field, words in (("mitigation", "mitigation"), ("legal_impact", "legal impact")):
        value, interval = entry[f"{field}_difference"], entry[f"{field}_difference_ci"]
        if value is not None:
            parts.append(f"{words} {signed(value)} {bracket(interval, sign=True)}")
    low, high = entry["mitigation_difference_ci"]
    if low > 0:
        verdict = "The learned mask blocks more than random masks of the same parameter share"
    elif high < 0:
        verdict = "The learned mask blocks less than random masks of the same parameter share"
    else:
        verdict = "The learned mask cannot be told from random masks of the same parameter share"
    return f"{verdict} (difference: {', '.join(parts)})."


def signed(value: float) -> str:
    return f"{value:+.3f}"


def bracket(interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """`[0.123, 0.456]`, or an empty string for None."""
    if interval is None:
        return ""
    form = "+.3f" if sign else ".3f"
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def shown_parts(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of PARTS that are shown of `entries`: `unseen_impact` only where one of them has it."""
    measured = any(entry.get("unseen_impact") is not None for entry in entries)
    return [field for field in PARTS if measured or field != "unseen_impact"]


def format_table(outcome: Mapping[str, Any]) -> str:
    """The outcome as plain text: one line per defence, then how learned and random masks compare."""
    fields = shown_parts(outcome["summary"])
    header = ["defence", "tensors", "params", *(f"{field.replace('_', ' ')} [95 %]" for field in fields)]
    header += ["rel. illegal", "rel. legal"]
    lines = [header]
    for entry in outcome["summary"]:
        cells = [entry["defence"], f"{entry['freeze_ratio']:.1%}", f"{entry['param_share']:.1%}"]
        for field in fields:
            value = entry[field]
            cells.append("-" if value is None else f"{value:.3f} {bracket(entry[f'{field}_ci'])}")
        for field in ("relative_illegal", "relative_legal"):
            cells.append("-" if entry[field] is None else f"{entry[field]:+.1%}")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text.insert(1, "-" * len(text[0]))
    if outcome["resolvable_legal_impact"] is not None:
        text.append(
            f"Smallest resolvable legal impact: {outcome['resolvable_legal_impact']:.3f} "
            f"(budget {outcome['legal_budget']:g})."
        )
    text.append(compare_sentence(outcome))
    return "\n".join(text)
