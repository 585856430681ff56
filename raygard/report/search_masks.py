"""How the mask changes with p: frozen share of every block, what a larger p adds, and how nested the masks are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raygard.report import plots
from raygard.report.layers import block_of, block_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
NUM_NAMED_BLOCKS = 3


@dataclass(frozen=True)
class Step:
    """From one p to the next larger: tensors added and released, and the blocks with most of those added."""

    smaller: float
    larger: float
    num_added: int
    num_released: int
    blocks: tuple[tuple[str, int], ...]

    @property
    def sentence(self) -> str:
        """The step in plain words."""
        most = ", ".join(f"{block} ({count})" for block, count in self.blocks)
        return (
            f"p = {self.smaller:g} to {self.larger:g}: {self.num_added} tensors added"
            f"{f', most in {most}' if most else ''}; {self.num_released} released."
        )


@dataclass(frozen=True)
class MaskPath:
    """Masks of rising p over one model. by_count, by_params: frozen shares, (blocks, P).

    nested (P, P): share of the tensors frozen at row p that are frozen at column p too, NaN unless row < column.
    ratios (P,): share of all tensors frozen, which is what `nested` would be by chance.
    """

    p: tuple[float, ...]
    blocks: tuple[str, ...]
    by_count: Array
    by_params: Array
    nested: Array
    ratios: Array
    steps: tuple[Step, ...]


def mask_path(masks: Mapping[float, Sequence[Mapping[str, Any]]]) -> MaskPath:
    """Follow the masks from the smallest p to the largest. masks: tensors of a manifest (name, shape, frozen) by p."""
    ps = tuple(sorted(masks))
    shares = []
    for p in ps:
        sizes = [int(np.prod(t["shape"])) for t in masks[p]]
        shares.append(block_shares([t["name"] for t in masks[p]], sizes, [t["frozen"] for t in masks[p]]))
    frozen = [{t["name"] for t in masks[p] if t["frozen"]} for p in ps]
    nested = np.full((len(ps), len(ps)), np.nan)
    for row, smaller in enumerate(frozen):
        for column in range(row + 1, len(ps)):
            nested[row, column] = len(smaller & frozen[column]) / max(1, len(smaller))
    steps = []
    for (p, before), (q, after) in pairwise(zip(ps, frozen, strict=True)):
        added = Counter(block_of(name)[0] for name in after - before)
        most = sorted(added.items(), key=lambda entry: (-entry[1], entry[0]))[:NUM_NAMED_BLOCKS]
        steps.append(Step(p, q, len(after - before), len(before - after), tuple(most)))
    return MaskPath(
        p=ps,
        blocks=shares[0][0],
        by_count=np.stack([by_count for _, by_count, _ in shares], axis=1),
        by_params=np.stack([by_params for _, _, by_params in shares], axis=1),
        nested=nested,
        ratios=np.array([len(names) / len(masks[p]) for names, p in zip(frozen, ps, strict=True)]),
        steps=tuple(steps),
    )


def blocks_by_p(path: MaskPath, ratio_axis: str, theme: int) -> bytes:
    """Share frozen of every block at each p, by tensors and by parameters."""
    width = max(8.8, 2.4 + 1.1 * len(path.p))
    figure, axes = plots.canvas(width, 1.0 + 0.38 * len(path.blocks), theme, columns=2)
    for axis, values, words in zip(axes, (path.by_count, path.by_params), ("tensors", "parameters"), strict=True):
        plots.cells(axis, theme, values, [[f"{value:.0%}" for value in row] for row in values])
        axis.set_xticks(range(len(path.p)), [f"{p:g}" for p in path.p])
        axis.set_yticks(range(len(path.blocks)), path.blocks)
        plots.titles(axis, theme, f"frozen share of a block's {words}", ratio_axis)
    axes[1].set_yticklabels([])
    return plots.png(figure)


def agreement(path: MaskPath | None, seeds: Sequence[Mapping[str, Any]], ratio_axis: str, theme: int) -> bytes:
    """Overlap of masks beside chance: between two values of p, and between learning seeds at one p.

    path: with two values of p at least, else None. seeds: the `agreement` of search.json. Not both may be missing.
    """
    panels = (path is not None) + bool(seeds)
    figure, axes = plots.canvas(8.8, 3.3, theme, columns=panels)
    if path is not None:
        _nested(axes[0], path, theme)
    if seeds:
        _seeds(axes[-1], seeds, ratio_axis, theme)
    return plots.png(figure)


def _nested(axis: Axes, path: MaskPath, theme: int) -> None:
    values = path.nested[:-1, 1:]
    # Only a larger p can keep a smaller one's mask: below the diagonal there is nothing to say.
    chance = path.ratios[1:]
    words = [["" if np.isnan(v) else f"{v:.0%}\n({c:.0%})" for v, c in zip(row, chance, strict=True)] for row in values]
    plots.cells(axis, theme, values, words)
    axis.set_xticks(range(len(path.p) - 1), [f"{p:g}" for p in path.p[1:]])
    axis.set_yticks(range(len(path.p) - 1), [f"{p:g}" for p in path.p[:-1]])
    plots.titles(axis, theme, "kept of a smaller p (by chance)", "larger p", "smaller p")


def _seeds(axis: Axes, seeds: Sequence[Mapping[str, Any]], ratio_axis: str, theme: int) -> None:
    xs = np.arange(len(seeds))
    axis.grid(axis="x", visible=False)
    for shift, field, words, shade in (
        (-0.19, "seed_agreement", "two seeds agree", plots.colour_of("freeze", theme)),
        (0.19, "seed_agreement_chance", "by chance", plots.colour_of("none", theme)),
    ):
        heights = [entry[field] for entry in seeds]
        axis.bar(xs + shift, heights, 0.36, color=shade, label=words)
        for x, height in zip(xs + shift, heights, strict=True):
            axis.text(x, height + 0.015, f"{height:.0%}", ha="center", fontsize=8.5, color=plots.INK[theme])
    axis.set_xticks(xs, [f"{entry['p']:g}" for entry in seeds])
    side = max(0.0, (4 - len(seeds)) / 2)
    axis.set_xlim(-0.6 - side, len(seeds) - 0.4 + side)
    axis.set_ylim(0, 1.28)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    plots.titles(axis, theme, "agreement of seeds", ratio_axis, "share of frozen tensors")
    plots.legend(axis, theme, loc="upper left", ncols=2)
