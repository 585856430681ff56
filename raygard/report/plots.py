"""The report's plots as PNG bytes, each in a light and a dark variant."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raygard.report.layers import FrozenShares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET_MITIGATION = 0.5
LABELS = {
    "base": "base",
    "none": "no defence",
    "freeze": "learned mask",
    "random": "random",
    "random-matched": "random, same params",
    "largest-first": "largest first",
}
DEFENCE_COLOURS = {
    "none": ("#6b7280", "#9ca3af"),
    "freeze": ("#4f46e5", "#a5a0ff"),
    "random": ("#d97706", "#fbbf24"),
    "random-matched": ("#c2410c", "#fb923c"),
    "largest-first": ("#047857", "#34d399"),
}
OTHER = ("#334155", "#cbd5e1")
MARKERS = {"none": "o", "freeze": "D", "random": "^", "random-matched": "s", "largest-first": "v"}
ROLE_COLOURS = {"illegal": ("#c2255c", "#f783ac"), "legal": ("#1971c2", "#74c0fc")}
INK, FAINT, PAPER = ("#1f2430", "#e8e8ec"), ("#d5d8de", "#3a3f4b"), ("#ffffff", "#1b1e26")
THEMES = {"light": 0, "dark": 1}


def label(defence: str) -> str:
    """The words for a defence that plots and page share."""
    return LABELS.get(defence, defence)


def rank(defence: str) -> tuple[int, str]:
    """Sorting key: known defences in the order of the plots, others after them by name."""
    known = list(LABELS)
    return (known.index(defence) if defence in known else len(known)), defence


def colour_of(defence: str, theme: int) -> str:
    """The colour of a defence in every plot."""
    return DEFENCE_COLOURS.get(defence, OTHER)[theme]


def canvas(width: float, height: float, theme: int, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of width x height inches in a theme, and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=170, facecolor=PAPER[theme], layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for axis in axes:
        axis.set_facecolor(PAPER[theme])
        axis.grid(color=FAINT[theme], linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK[theme], labelsize=9, length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def titles(axis: Axes, theme: int, title: str = "", x: str = "", y: str = "") -> None:
    """Set what an axis says above, below and beside itself."""
    axis.set_title(title, fontsize=10, color=INK[theme], loc="left", weight="bold")
    axis.set_xlabel(x, fontsize=9.5, color=INK[theme])
    axis.set_ylabel(y, fontsize=9.5, color=INK[theme])


def legend(axis: Axes, theme: int, **options: Any) -> None:
    """Add a frameless legend in the ink of the theme."""
    axis.legend(frameon=False, fontsize=9, labelcolor=INK[theme], **options)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tradeoff(outcome: Mapping[str, Any], theme: int) -> bytes:
    """Mitigation against legal impact, with both 95 % intervals and the target corner."""
    from matplotlib.patches import Rectangle

    figure, (axis,) = canvas(7.6, 4.6, theme)
    points = [s for s in outcome["summary"] if s["mitigation"] is not None and s["legal_impact"] is not None]
    xs = [v for s in points for v in (*s["legal_impact_ci"], s["legal_impact"])]
    ys = [v for s in points for v in (*s["mitigation_ci"], s["mitigation"])]
    left, right = min([-0.06, *xs]) - 0.03, max([outcome["legal_budget"] + 0.1, *xs]) + 0.04
    bottom, top = min([-0.06, *ys]) - 0.03, max([0.75, *ys]) + 0.06
    corner = Rectangle((left, TARGET_MITIGATION), outcome["legal_budget"] - left, top - TARGET_MITIGATION)
    corner.set(facecolor="#2f9e44", alpha=0.13, linewidth=0)
    axis.add_patch(corner)
    axis.text(
        left + 0.01 * (right - left), top - 0.015 * (top - bottom), "aim", va="top", fontsize=9.5,
        color=("#2b8a3e", "#69db7c")[theme], weight="bold",
    )  # fmt: skip
    axis.axhline(0, color=INK[theme], linewidth=0.7)
    axis.axvline(0, color=INK[theme], linewidth=0.7)
    for s in points:
        x, y = s["legal_impact"], s["mitigation"]
        error_x = [[x - min(x, s["legal_impact_ci"][0])], [max(x, s["legal_impact_ci"][1]) - x]]
        error_y = [[y - min(y, s["mitigation_ci"][0])], [max(y, s["mitigation_ci"][1]) - y]]
        axis.errorbar(
            x, y, xerr=error_x, yerr=error_y, fmt=MARKERS.get(s["defence"], "o"), markersize=8,
            color=colour_of(s["defence"], theme), elinewidth=1.6, label=label(s["defence"]),
            markeredgecolor=PAPER[theme], markeredgewidth=0.8,
        )  # fmt: skip
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    titles(axis, theme, x="legal impact (0: legal users notice nothing)", y="mitigation (1: as if never trained)")
    legend(axis, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def blocked(outcome: Mapping[str, Any], theme: int) -> bytes:
    """Every adapted model as one dot: blocked share for each class and defence, means as bars.

    Classes that do not count are left out, unless none counts: their shares are ratios to a gap of nearly zero.
    """
    classes = [c["class"] for c in outcome["classes"] if c["counted"]] or [c["class"] for c in outcome["classes"]]
    counted = {c["class"]: c["counted"] for c in outcome["classes"]}
    roles = {c["class"]: c["role"] for c in outcome["classes"]}
    defences = [s["defence"] for s in outcome["summary"] if s["defence"] != "none"]
    figure, (axis,) = canvas(7.6, 0.7 + len(classes) * (0.28 + 0.17 * len(defences)), theme)
    axis.grid(axis="y", visible=False)
    for value in (0, 1):
        axis.axvline(value, color=INK[theme], linewidth=0.8)
    step = 0.8 / max(1, len(defences))
    for row, name in enumerate(classes):
        for place, defence in enumerate(defences):
            values = [
                r["blocked"]
                for r in outcome["rows"]
                if (r["class"], r["defence"]) == (name, defence) and r["blocked"] is not None
            ]
            if not values:
                continue
            y, colour = row - 0.4 + step * (place + 0.5), colour_of(defence, theme)
            axis.plot([np.mean(values)] * 2, [y - step * 0.42, y + step * 0.42], color=colour, linewidth=2.4)
            axis.plot(
                values,
                [y] * len(values),
                MARKERS.get(defence, "o"),
                color=colour,
                markersize=5.5,
                alpha=0.75,
                markeredgewidth=0,
                label=label(defence) if row == 0 else None,
            )
        if row:
            axis.axhline(row - 0.5, color=FAINT[theme], linewidth=0.8)
    axis.set_yticks(range(len(classes)))
    axis.set_yticklabels([f"{c}\n{roles[c]}{'' if counted[c] else ', not counted'}" for c in classes])
    axis.set_ylim(len(classes) - 0.5, -0.5)
    for tick, name in zip(axis.get_yticklabels(), classes, strict=True):
        tick.set_color(ROLE_COLOURS[roles[name]][theme])
    titles(axis, theme, x="blocked (0: adapts as if unguarded, 1: as if never trained)")
    legend(axis, theme, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def losses(relearn: Sequence[Mapping[str, Any]], learn: Mapping[str, Sequence[Mapping[str, Any]]], theme: int) -> bytes:
    """Diffusion loss of illegal and legal pictures in relearning, in user steps and in publisher steps."""
    panels: list[tuple[str, str, dict[str, Sequence[Mapping[str, Any]]]]] = []
    if relearn:
        panels.append(("relearning", "step", {"0": relearn}))
    for kind, title in (("user", "lower loop: user steps"), ("publisher", "upper loop: publisher steps")):
        series: dict[str, Sequence[Mapping[str, Any]]] = {
            seed: [r for r in history if r["kind"] == kind] for seed, history in learn.items()
        }
        if any(series.values()):
            panels.append((title, "step" if kind == "user" else "publisher step k", series))
    figure, axes = canvas(3.3 * max(2, len(panels)), 3.2, theme, len(panels))
    for index, (axis, (title, x, curves)) in enumerate(zip(axes, panels, strict=True)):
        for role, colours in ROLE_COLOURS.items():
            for number, history in enumerate(curves.values()):
                steps = [r["k"] if "publisher" in title else r["step"] for r in history]
                values = np.array([r[f"{role}_loss"] for r in history], dtype=float)
                axis.plot(steps, values, color=colours[theme], alpha=0.22, linewidth=0.9)
                axis.plot(steps, smooth(values), color=colours[theme], linewidth=1.8, label=None if number else role)
        titles(axis, theme, title, x, "diffusion loss (MSE)" if index == 0 else "")
    legend(axes[0], theme, loc="upper right")
    return png(figure)


def smooth(values: Any) -> Any:
    """Centred moving average over a fifteenth of the series; edges average what there is."""
    width = max(1, len(values) // 15) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def soft_mask(learn: Mapping[str, Sequence[Mapping[str, Any]]], theme: int) -> bytes:
    """Soft-mask mean, share a rounding would freeze, and the gap between both, at every publisher step."""
    figure, (left, right) = canvas(8.4, 3.1, theme, 2)
    lines = (
        ("soft_mean", "soft mask, mean", DEFENCE_COLOURS["freeze"], "-"),
        ("frozen_by_count", "frozen tensors", DEFENCE_COLOURS["random"], "--"),
        ("frozen_by_params", "frozen parameters", DEFENCE_COLOURS["largest-first"], "-"),
    )
    for number, history in enumerate(learn.values()):
        steps = [r for r in history if r["kind"] == "publisher"]
        ks = [r["k"] for r in steps]
        for key, words, colours, style in lines:
            values = [r[key] for r in steps]
            left.plot(ks, values, style, color=colours[theme], linewidth=1.8, label=None if number else words)
        right.plot(ks, [r["rounding_gap"] for r in steps], color=DEFENCE_COLOURS["freeze"][theme], linewidth=1.8)
    left.set_ylim(-0.02, 1.02)
    right.set_ylim(bottom=0)
    titles(left, theme, "how much is frozen", "publisher step k", "share")
    titles(right, theme, "soft against rounded mask", "publisher step k", "rounding gap")
    legend(left, theme, loc="upper left")
    return png(figure)


def cells(axis: Axes, theme: int, values: NDArray[np.float64], words: Sequence[Sequence[str]]) -> None:
    """A heat map of shares, (rows, columns), with words in its cells; NaN cells have no colour."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("frozen", [FAINT[theme], colour_of("freeze", theme)])
    axis.grid(visible=False)
    axis.imshow(np.ma.masked_invalid(values), cmap=ramp.with_extremes(bad=(0, 0, 0, 0)), vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ink = (PAPER if value >= 0.55 else INK)[theme]
        axis.text(column, row, words[row][column], ha="center", va="center", fontsize=7.5, color=ink)
    axis.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axis.grid(which="minor", color=PAPER[theme], linewidth=1.4)
    axis.tick_params(which="minor", length=0)


def heat_map(shares: FrozenShares, theme: int) -> bytes:
    """Share frozen of every block and module kind, by tensors and by parameters."""
    rows, columns = shares.by_count.shape
    figure, axes = canvas(max(7.6, 1.6 + 0.47 * columns), 1.5 + 0.54 * rows, theme, rows=2)
    for axis, values, title in zip(
        axes, (shares.by_count, shares.by_params), ("share of tensors", "share of parameters"), strict=True
    ):
        cells(axis, theme, values, [["" if np.isnan(value) else f"{value:.0%}" for value in row] for row in values])
        axis.set_xticks(range(columns), shares.kinds, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(rows), shares.blocks)
        titles(axis, theme, f"frozen {title}")
    axes[0].set_xticklabels([])
    return png(figure)
