"""The plots of a search's report as PNG bytes, each in a light and a dark variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raygard.outcome import legal_upper_bound
from raygard.report import plots
from raygard.report.search_load import SearchFiles, last_proxy
from raygard.search.proxy import is_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

MITIGATION_AXIS = "mitigation (share blocked)"
LEGAL_AXIS = "legal impact (share blocked)"
STAGES = {
    "learn": "freeze",
    "values": "random-matched",
    "adapt": "random",
    "generate": "largest-first",
    "score": "none",
}
PROXY_PARTS = (
    ("mitigation", "mitigation", "random", "s"),
    ("legal_impact", "legal impact", "largest-first", "v"),
    ("score", "score (calibrated)", "freeze", "D"),
)
FIDELITY_MARKERS = ("o", "s", "^", "D", "v", "P")
AIM = ("#2b8a3e", "#69db7c")
BUDGET = ("#c2255c", "#f783ac")
BAR_HEIGHT, SPREAD = 0.2, 0.05


def against_p(files: SearchFiles, theme: int) -> bytes:
    """Mitigation and legal impact of learned masks and controls at each p, with 95 % intervals."""
    figure, axes = plots.canvas(9.0, 4.1, theme, columns=2)
    defences = sorted({c["defence"] for c in files.controls}, key=plots.rank)
    ps = sorted({c["p"] for c in (*files.scored, *files.controls)})
    gap = min(np.diff(ps), default=0.2)
    names = {c["candidate_id"] for c in files.best}
    for axis, field in zip(axes, ("mitigation", "legal_impact"), strict=True):
        others = [c for c in files.scored if c["candidate_id"] not in names and is_finite(c[field])]
        axis.plot(
            [c["p"] for c in others], [c[field] for c in others], "D", markersize=4.5, alpha=0.5, markeredgewidth=0,
            color=plots.colour_of("freeze", theme), label="learned mask, other T and L" if others else None,
        )  # fmt: skip
        for place, defence in enumerate(defences):
            own = sorted((c for c in files.controls if c["defence"] == defence), key=lambda c: c["p"])
            _interval_line(axis, own, field, defence, theme, 0.07 * gap * (place + 1))
        _interval_line(axis, files.best, field, "freeze", theme, 0.0)
        axis.axhline(0, color=plots.INK[theme], linewidth=0.7)
        axis.set_xticks(ps, [f"{p:g}" for p in ps])
        axis.set_xlim(ps[0] - 0.35 * gap, ps[-1] + 0.55 * gap)
        _mark_pick(axis, files, "p", field, theme)
    _line(axes[0], plots.TARGET_MITIGATION, "aim", AIM[theme], vertical=False)
    _line(axes[1], files.budget, "budget", BUDGET[theme], vertical=False)
    plots.titles(axes[0], theme, "illegal classes", files.ratio_axis, MITIGATION_AXIS)
    plots.titles(axes[1], theme, "legal classes", files.ratio_axis, LEGAL_AXIS)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=plots.INK[theme]
    )
    return plots.png(figure)


def _interval_line(axis: Axes, points: Sequence[Record], field: str, defence: str, theme: int, shift: float) -> None:
    points = [point for point in points if is_finite(point[field])]
    if not points:
        return
    values = [point[field] for point in points]
    learned = defence == "freeze"
    axis.errorbar(
        [point["p"] + shift for point in points], values, yerr=_errors(points, field),
        fmt=f"{plots.MARKERS.get(defence, 'o')}-", color=plots.colour_of(defence, theme),
        markersize=7 if learned else 5, linewidth=2.2 if learned else 1,
        elinewidth=1.5 if learned else 1, label=plots.label(defence),
        markeredgecolor=plots.PAPER[theme], markeredgewidth=0.7, zorder=4 if learned else 3,
    )  # fmt: skip


def _errors(points: Sequence[Record], field: str) -> list[list[float]]:
    """Distances from the values to the ends of their intervals, (2, points); zero without an interval."""
    spans = [point[f"{field}_ci"] or (point[field], point[field]) for point in points]
    pairs = list(zip(points, spans, strict=True))
    return [
        [max(0.0, point[field] - low) for point, (low, _) in pairs],
        [max(0.0, high - point[field]) for point, (_, high) in pairs],
    ]


def _mark_pick(axis: Axes, files: SearchFiles, x: str, y: str, theme: int) -> None:
    if files.pick is not None:
        words = "chosen" if files.choice and files.choice["meets_budget"] else "nearest to the budget"
        axis.plot(
            files.pick[x], files.pick[y], "o", markersize=15, markerfacecolor="none", label=words,
            markeredgecolor=plots.INK[theme], markeredgewidth=1.6, zorder=6,
        )  # fmt: skip


def _line(axis: Axes, value: float, words: str, shade: str, *, vertical: bool) -> None:
    if vertical:
        axis.axvline(value, color=shade, linewidth=1.4, linestyle=(0, (4, 3)))
        place: tuple[float, float] = (value, 0.0)
        options: dict[str, Any] = {"ha": "left", "va": "bottom", "xytext": (4, 4)}
        words = f"{words} "
        frame = axis.get_xaxis_transform()
    else:
        axis.axhline(value, color=shade, linewidth=1.4, linestyle=(0, (4, 3)))
        place = (1.0, value)
        options = {"ha": "left", "va": "center", "xytext": (4, 0)}
        words = f"{words}\n"
        frame = axis.get_yaxis_transform()
    axis.annotate(
        f"{words}{value:g}", place, xycoords=frame, textcoords="offset points", color=shade, fontsize=9, **options
    )


def pareto(files: SearchFiles, theme: int) -> bytes:
    """Mitigation against legal impact of all candidates and controls, the front, the budget and the aim."""
    from matplotlib.patches import Rectangle

    figure, (axis,) = plots.canvas(8.8, 4.8, theme)
    points = [c for c in files.scored if is_finite(c["legal_impact"])]
    controls = [c for c in files.controls if is_finite(c["legal_impact"])]
    uppers = [legal_upper_bound(c) for c in files.front]
    xs = [c["legal_impact"] for c in (*points, *controls)] + uppers
    ys = [c["mitigation"] for c in (*points, *controls)]
    left, right = min([-0.05, *xs]) - 0.03, max([files.budget + 0.1, *xs]) + 0.04
    bottom, top = min([-0.05, *ys]) - 0.03, max([0.7, *ys]) + 0.08
    corner = Rectangle((left, plots.TARGET_MITIGATION), files.budget - left, top - plots.TARGET_MITIGATION)
    corner.set(facecolor="#2f9e44", alpha=0.13, linewidth=0)
    axis.add_patch(corner)
    axis.annotate(
        "aim", (left, top), xytext=(5, -5), textcoords="offset points", va="top", fontsize=9.5, color=AIM[theme],
        weight="bold",
    )  # fmt: skip
    axis.axhline(0, color=plots.INK[theme], linewidth=0.7)
    axis.axvline(0, color=plots.INK[theme], linewidth=0.7)
    for defence in sorted({c["defence"] for c in controls}, key=plots.rank):
        own = [c for c in controls if c["defence"] == defence]
        axis.plot(
            [c["legal_impact"] for c in own], [c["mitigation"] for c in own], plots.MARKERS.get(defence, "o"),
            color=plots.colour_of(defence, theme), markersize=6, alpha=0.85, markeredgewidth=0,
            label=plots.label(defence),
        )  # fmt: skip
    shade = plots.colour_of("freeze", theme)
    axis.plot(
        [c["legal_impact"] for c in points], [c["mitigation"] for c in points], "D", color=shade, markersize=5,
        alpha=0.55, markeredgewidth=0, label="learned mask",
    )  # fmt: skip
    _front(axis, files.front, theme)
    _mark_pick(axis, files, "legal_impact", "mitigation", theme)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    _line(axis, files.budget, "budget", BUDGET[theme], vertical=True)
    plots.titles(axis, theme, x="legal impact (0: legal users notice nothing)", y="mitigation (1: as if never trained)")
    plots.legend(axis, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return plots.png(figure)


def _front(axis: Axes, front: Sequence[Record], theme: int) -> None:
    if not front:
        return
    shade = plots.colour_of("freeze", theme)
    ys = [c["mitigation"] for c in front]
    uppers = [legal_upper_bound(c) for c in front]
    axis.step(uppers, ys, where="post", color=shade, linewidth=1.4, alpha=0.8, label="front (by upper bounds)")
    axis.hlines(ys, [c["legal_impact"] for c in front], uppers, color=shade, linewidth=1.4)
    axis.plot(
        [c["legal_impact"] for c in front], ys, "D", color=shade, markersize=7,
        markeredgecolor=plots.PAPER[theme], markeredgewidth=0.8,
    )  # fmt: skip
    before = -1.0
    for candidate in front:
        if candidate["p"] != before:
            axis.annotate(
                f"p {candidate['p']:g}", (candidate["legal_impact"], candidate["mitigation"]), xytext=(-9, 4),
                textcoords="offset points", ha="right", fontsize=8.5, color=plots.INK[theme], zorder=7,
                bbox={"facecolor": plots.PAPER[theme], "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
            )  # fmt: skip
        before = candidate["p"]


def parallel(files: SearchFiles, settings: Sequence[tuple[str, str]], theme: int) -> bytes:
    """Parallel coordinates of all candidates: settings, proxy score, mitigation, legal impact.

    settings: (field of a candidate, its words). A line ends where the candidate has no further numbers.
    """
    figure, (axis,) = plots.canvas(8.8, 4.2, theme)
    axis.grid(visible=False)
    columns = [[c[field] for c in files.candidates] for field, _ in settings]
    columns.append([(last_proxy(c) or {}).get("score") for c in files.candidates])
    columns += [[c[field] for c in files.candidates] for field in ("mitigation", "legal_impact")]
    words = [*(word for _, word in settings), "proxy score", "mitigation", "legal impact"]
    heights = [
        _as_levels(axis, place, column, theme) if place < len(settings) else _as_scale(axis, place, column, theme)
        for place, column in enumerate(columns)
    ]
    for place in range(len(columns)):
        axis.plot([place, place], [0, 1], color=plots.INK[theme], linewidth=0.9, zorder=5)
    drawn: set[str] = set()
    pick_last = sorted(enumerate(files.candidates), key=lambda entry: entry[1]["candidate_id"] == files.pick_id)
    for index, candidate in pick_last:
        places = [place for place, column in enumerate(heights) if column[index] is not None]
        values = np.array([heights[place][index] for place in places], dtype=float)
        kind = "chosen" if candidate["candidate_id"] == files.pick_id else candidate["status"]
        style = {"scored": ("freeze", "-", 1.3, 0.45), "chosen": ("random", "-", 3, 1)}
        name, dash, width, alpha = style.get(kind, ("none", ":", 1.5, 0.9))
        axis.plot(
            places, values, dash, color=plots.colour_of(name, theme), linewidth=width, alpha=alpha,
            label=None if kind in drawn else _line_words(kind, files), zorder=4,
        )  # fmt: skip
        drawn.add(kind)
    axis.set_xticks(range(len(columns)), words, fontsize=9.5)
    axis.set_yticks([])
    axis.set_ylim(-0.09, 1.06)
    axis.set_xlim(-0.35, len(columns) - 0.55)
    plots.legend(axis, theme, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return plots.png(figure)


def _line_words(kind: str, files: SearchFiles) -> str:
    return "nearest to the budget" if kind == "chosen" and not (files.choice or {}).get("meets_budget") else kind


def _as_levels(axis: Axes, place: int, column: Sequence[Any], theme: int) -> list[float | None]:
    """Equally spaced levels, one for each value, lines a little apart so that each can be followed."""
    levels = sorted(set(column))
    heights: list[float | None] = []
    for index, value in enumerate(column):
        level = (levels.index(value) + 0.5) / len(levels)
        heights.append(level + SPREAD * (2 * index / max(1, len(column) - 1) - 1))
    for rank, value in enumerate(levels):
        text = value if isinstance(value, str) else f"{value:g}"
        _tick(axis, place, (rank + 0.5) / len(levels), text, theme)
    return heights


def _as_scale(axis: Axes, place: int, column: Sequence[float | None], theme: int) -> list[float | None]:
    """A linear scale from the smallest value to the largest."""
    known = [value for value in column if value is not None and is_finite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = (high - low) or 1.0
    ticks = (low, low + span / 2, high) if len(known) and high > low else tuple(known[:1])
    for value in ticks:
        _tick(axis, place, (value - low) / span, f"{value:.2f}", theme)
    return [None if value is None or not is_finite(value) else (value - low) / span for value in column]


def _tick(axis: Axes, x: float, y: float, text: str, theme: int) -> None:
    box = {"facecolor": plots.PAPER[theme], "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    axis.annotate(
        text, (x, y), xytext=(-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8.5,
        color=plots.INK[theme], bbox=box, zorder=7,
    )  # fmt: skip


def cost(trials: Sequence[Record], theme: int) -> bytes:
    """Seconds of each trial, by stage, in the order given."""
    figure, (axis,) = plots.canvas(8.8, 1.1 + BAR_HEIGHT * len(trials), theme)
    axis.grid(axis="y", visible=False)
    left = np.zeros(len(trials))
    for stage, defence in STAGES.items():
        widths = np.array([trial["seconds"].get(stage) or 0.0 for trial in trials])
        if not widths.any():
            continue
        axis.barh(range(len(trials)), widths, 0.72, left=left, color=plots.colour_of(defence, theme), label=stage)
        left += widths
    names = [t["trial_id"] + ("" if t["status"] == "scored" else f" ({t['status']})") for t in trials]
    axis.set_yticks(range(len(trials)), names, fontsize=8.5)
    axis.set_ylim(len(trials) - 0.4, -0.6)
    plots.titles(axis, theme, x="time of all tasks of the trial (s)")
    plots.legend(axis, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return plots.png(figure)


def proxy(files: SearchFiles, theme: int) -> bytes:
    """Rank correlations of the proxy and its parts by fidelity, and the proxy against the final score."""
    figure, (left, right) = plots.canvas(8.8, 3.6, theme, columns=2)
    record = files.search["proxy"]
    known: list[float] = []
    for part, words, defence, marker in PROXY_PARTS:
        pairs = sorted((float(f), entry[part]) for f, entry in record["correlation"].items() if is_finite(entry[part]))
        known += [rho for _, rho in pairs]
        left.plot(
            [fidelity for fidelity, _ in pairs], [rho for _, rho in pairs], f"{marker}-", markersize=6,
            color=plots.colour_of(defence, theme), label=words, linewidth=2 if part == "score" else 1,
        )  # fmt: skip
    if files.search.get("scheduler") != "fifo":
        _line(left, record["threshold"], "prunes\nfrom", plots.INK[theme], vertical=False)
        known.append(record["threshold"])
    points = [(e["fidelity"], e["score"], c["score"]) for c in files.scored for e in c["proxy"]]
    points = [point for point in points if is_finite(point[1]) and is_finite(point[2])]
    fidelities = sorted({fidelity for fidelity, _, _ in points})
    ticks = sorted(float(fidelity) for fidelity in record["correlation"]) or [0, 0.5, 1]
    left.set_xlim(0, 1.08)
    left.set_ylim(min([-0.05, *known]) - 0.05, 1.12)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for rank, fidelity in enumerate(fidelities):
        own = [point for point in points if point[0] == fidelity]
        right.plot(
            [point[1] for point in own], [point[2] for point in own], FIDELITY_MARKERS[rank % len(FIDELITY_MARKERS)],
            color=plots.colour_of("freeze", theme), alpha=0.3 + 0.65 * (rank + 1) / len(fidelities), markersize=6,
            markeredgewidth=0, label=f"fidelity {fidelity:g}",
        )  # fmt: skip
    plots.titles(left, theme, "", "fidelity (share of the full adaptation)", f"rank correlation (n = {record['n']})")
    plots.titles(right, theme, "", "proxy: score expected from held-out losses", "final score (scorer)")
    plots.legend(left, theme, loc="best")
    if fidelities:
        plots.legend(right, theme, loc="best")
    return plots.png(figure)
