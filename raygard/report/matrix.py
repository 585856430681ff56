"""compare.html: every table of a comparison, and heat maps of what is blocked, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from raygard.compare.tables import Block, heading, html_table, remarks, to_html
from raygard.report import plots
from raygard.report.html import both_themes, run_facts, settings_list, write_page

MEASURES = {"mitigation": "mitigation (illegal classes)", "legal_impact": "legal impact"}


def heat_map(summaries: Sequence[Mapping[str, Any]], theme: int) -> bytes:
    """Mitigation and legal impact of every defence (rows) under every adaptation (columns) of one scorer: a PNG file.

    Colours end at 0 and 1, the numbers in the cells are as measured, with a star where some users failed or are not
    measured yet; a cell without a number, where no class counts, holds a dash.
    """
    defences = list(dict.fromkeys(entry["defence"] for summary in summaries for entry in summary["defences"]))
    columns = [summary["adaptation"] for summary in summaries]
    width, height = 2.6 + 1.9 * len(columns), 1.2 + 0.36 * len(defences)
    figure, axes = plots.canvas(max(7.6, width), height, theme, columns=2)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        values = np.full((len(defences), len(columns)), np.nan)
        words = [["-"] * len(columns) for _ in defences]
        for column, summary in enumerate(summaries):
            for entry in summary["defences"]:
                if entry[measure] is not None:
                    row = defences.index(entry["defence"])
                    values[row, column] = entry[measure]
                    words[row][column] = f"{entry[measure]:.2f}{'*' * bool(entry['failed'] + entry['unfinished'])}"
        plots.cells(axis, theme, values, words)
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(defences)), defences)
        plots.titles(axis, theme, title)
    axes[1].set_yticklabels([])
    return plots.png(figure)


def build_matrix_page(
    summaries: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    target: Path,
) -> Path:
    """Write the page. counts: cells by status. config, run: configuration and run.json's content."""
    scorers = dict.fromkeys(summary["scorer"] for summary in summaries)
    maps = []
    for scorer in scorers:
        own = [summary for summary in summaries if summary["scorer"] == scorer]
        maps.append((scorer, both_themes(lambda theme, own=own: heat_map(own, theme))))  # type: ignore[misc]
    total = sum(counts.values())
    content = {
        "name": target.parent.name,
        "domain": config["domain"]["name"],
        "headline": f"{counts['done']} of {_cells(total)} measured",
        "verdict": [],
        "missing": [f"{_cells(counts[status])} {status}." for status in ("failed", "unfinished") if counts[status]],
        "cards": [],
        "maps": maps,
        "tables": [(heading(each), Markup(to_html(each)), remarks(each)) for each in summaries],
        "facts": run_facts(run),
        "counts": run.get("domain_counts") or {},
        "settings": settings_list(config),
    }
    return write_page("matrix.html.j2", content, target)


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"


def build_tables_page(blocks: Sequence[Block], target: Path) -> Path:
    """Write a page of tables alone, e.g. those of the paper with ours beside them."""
    content = {
        "name": "the paper's tables",
        "domain": "",
        "headline": "Ours beside the published numbers",
        "verdict": [],
        "missing": [],
        "cards": [],
        "maps": [],
        "tables": [(title, Markup(html_table(lines)), notes) for title, lines, notes in blocks],
        "facts": [("tables", str(len(blocks)))],
        "counts": {},
        "settings": [],
    }
    return write_page("matrix.html.j2", content, target)
