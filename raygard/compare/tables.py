"""Tables: the summaries of a matrix as plain cells, and Markdown, LaTeX, HTML and text of any table of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from raygard.compare.equal_impact import answers
from raygard.compare.matrix import DONE, FAILED, UNFINISHED
from raygard.outcome_text import bracket

Summary = Mapping[str, Any]
Lines = list[list[str]]


class Block(NamedTuple):
    """A table as text: heading, header and lines, and what must be read with it."""

    heading: str
    lines: Lines
    remarks: list[str]


# Of LaTeX: what must be written otherwise in running text.
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
HEADER = (
    "defence", "tensors", "params", "mitigation [95 %]", "legal impact [95 %]", "illegal", "legal", "rel. illegal",
    "rel. legal", "SGR illegal", "SGR legal", "base loss", "s", "peak MiB", "trained", "cells",
)  # fmt: skip
# Of scorers that look for faces: columns of a table and the numbers in them.
FACES = {
    "no face, illegal": "undetected_illegal", "no face, legal": "undetected_legal",
    "with a face, illegal": "mean_detected_illegal", "with a face, legal": "mean_detected_legal",
}  # fmt: skip
UNSEEN = "unseen impact [95 %]"
RELEASE = "(the release itself)"


def heading(summary: Summary) -> str:
    """Adaptation and scorer of a table, in words."""
    method = "" if summary["method"] == summary["adaptation"] else f" ({summary['method']})"
    return f"{summary['adaptation']}{method}, {summary['scorer']} ({summary['direction']}, {summary['unit']})"


def lines(summary: Summary) -> Lines:
    """The header, the untouched release's own distances, and one line for each defence; "-" where there is no number.

    `illegal`, `legal`: plain mean distances in the scorer's unit. `s`: mean seconds of an adaptation. `trained`:
    trained numbers as a share of the denoiser's. `cells`: done of all, and how many failed or are unfinished. Where
    legal classes that nothing is learned from count, their legal impact alone; where the scorer looks for faces, the
    share of pictures without one and the mean distance of the others.
    """
    everyone = [summary["release"], *summary["defences"]]
    faces = FACES if any(entry[name] is not None for entry in everyone for name in FACES.values()) else {}
    unseen = [UNSEEN] if any(entry.get("unseen_impact") is not None for entry in summary["defences"]) else []
    table = [[*HEADER, *unseen, *faces]]
    release = {"illegal": "distance_illegal", "legal": "distance_legal"}
    own = [_number(summary["release"][release[name]], ".4f") if name in release else "-" for name in HEADER[1:]]
    table.append([RELEASE, *own, *("-" for _ in unseen), *_faces(summary["release"], faces)])
    for entry in summary["defences"]:
        line = [entry["defence"], _percent(entry["freeze_ratio"]), _percent(entry["param_share"])]
        line += [_with_interval(entry, "mitigation"), _with_interval(entry, "legal_impact")]
        line += [_number(entry[f"distance_{role}"], ".4f") for role in ("illegal", "legal")]
        line += [_percent(entry[f"relative_{role}"], "+") for role in ("illegal", "legal")]
        line += [_percent(entry[f"sgr_{role}"], "+") for role in ("illegal", "legal")]
        line += [_number(entry["base_loss"], ".4f"), _number(entry["seconds_adapt"], ".1f")]
        peak = entry["peak_memory_bytes"]
        line += [_number(None if peak is None else peak / 2**20, ".0f"), _percent(entry["trainable_share"])]
        line.append(_counts(entry))
        line += [_with_interval(entry, "unseen_impact") for _ in unseen]
        table.append([*line, *_faces(entry, faces)])
    return table


def remarks(summary: Summary) -> list[str]:
    """What must be read with a table: the learned masks against the best baseline, what went around the masks, why
    cells have no number, what intervals hold."""
    found = [*answers(summary["equal_impact"]), *(f"Outside every mask: {what}." for what in summary["around"])]
    return [*found, *summary["reasons"], *summary["notes"]]


def block(summary: Summary) -> Block:
    """A summary as a table of text."""
    return Block(heading(summary), lines(summary), remarks(summary))


def to_markdown(summaries: Sequence[Summary]) -> str:
    """All tables, each with a heading and its remarks."""
    return markdown([block(summary) for summary in summaries])


def to_latex(summaries: Sequence[Summary]) -> str:
    """All tables as `table` environments with plain rules, which need no package."""
    return latex_tables([block(summary) for summary in summaries])


def to_html(summary: Summary) -> str:
    """One table as an HTML `table` element, without a heading."""
    return html_table(lines(summary))


def to_text(summaries: Sequence[Summary]) -> str:
    """The chief columns of all tables, for a terminal."""
    parts = []
    for summary in summaries:
        found = lines(summary)
        chief = [*range(5), *(found[0].index(name) for name in (UNSEEN, "cells") if name in found[0])]
        table = [[line[index] for index in chief] for line in found if line[0] != RELEASE]
        around = [f"outside every mask: {what}" for what in summary["around"]]
        parts.append(Block(heading(summary), table, [*answers(summary["equal_impact"]), *around, *summary["reasons"]]))
    return plain_text(parts)


def markdown(blocks: Sequence[Block]) -> str:
    """Every block as a heading, a Markdown table and a list of its remarks."""
    parts = []
    for title, table, notes in blocks:
        header, *body = [[cell.replace("|", "\\|") for cell in line] for line in table]
        rule = ["---", *["---:"] * (len(header) - 1)]
        rows = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))
        listed = "\n".join(f"- {note}" for note in notes)
        parts.append(f"## {title}\n\n{rows}\n\n{listed}\n")
    return "\n".join(parts)


def latex_tables(blocks: Sequence[Block]) -> str:
    """Every block as a `table` environment; its remarks are comments."""
    parts = []
    for title, table, notes in blocks:
        header, *body = [[latex(cell) for cell in line] for line in table]
        rows = "\n".join(f"{' & '.join(line)} \\\\" for line in body)
        comments = "\n".join(f"% {' '.join(note.split())}" for note in notes)
        parts.append(
            f"{comments}\n\\begin{{table}}\n\\centering\n\\caption{{{latex(title)}}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n\\hline\n{' & '.join(header)} \\\\\n\\hline\n{rows}\n"
            "\\hline\n\\end{tabular}\n\\end{table}\n"
        )
    return "\n".join(parts)


def html_table(table: Lines) -> str:
    """Header and lines as an HTML `table` element."""
    header, *body = [[escape(cell) for cell in line] for line in table]
    top = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    rows = "\n".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{cell}</td>" for cell in line[1:])}</tr>' for line in body
    )
    return f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def plain_text(blocks: Sequence[Block]) -> str:
    """Every block for a terminal: heading, aligned columns, one line for each remark."""
    parts = []
    for title, table, notes in blocks:
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
        parts.append("\n".join([title, *text, *notes]))
    return "\n\n".join(parts)


def latex(text: str) -> str:
    """`text` with every character that LaTeX reads as a command written out."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def _counts(entry: Mapping[str, Any]) -> str:
    total = sum(entry[status] for status in (DONE, FAILED, UNFINISHED))
    rest = [f"{entry[status]} {status}" for status in (FAILED, UNFINISHED) if entry[status]]
    return ", ".join([f"{entry[DONE]}/{total}", *rest])


def _with_interval(entry: Mapping[str, Any], name: str) -> str:
    value = entry[name]
    return "-" if value is None else f"{value:.3f} {bracket(entry[f'{name}_ci'])}".rstrip()


def _faces(entry: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    return [
        _percent(entry[name]) if name.startswith("undetected") else _number(entry[name], ".4f")
        for name in columns.values()
    ]


def _percent(value: float | None, sign: str = "") -> str:
    return _number(value, f"{sign}.1%")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
