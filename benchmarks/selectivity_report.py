"""Table and pictures of what benchmarks/selectivity.py recorded; nothing is run but what --samples draws.

    python benchmarks/selectivity_report.py [--results FILE] [--front FILE.png]
    python benchmarks/selectivity_report.py --samples FILE.png --mask FOLDER --domain emoji-styles --cache DIR

--front: mitigation against legal impact by scorer, a point for each rule, p and seed, the negative controls, and the
target's corner.
--samples: what users draw after learning each class from the release, without and with a mask the bench has kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.selectivity import crossover, interval, table  # noqa: E402
from benchmarks.selectivity_bench import ATTACKS, Bench  # noqa: E402
from benchmarks.selectivity_domains import DOMAINS, open_bench  # noqa: E402
from raygard.mask import FreezeMask  # noqa: E402

TARGET = (0.05, 0.5)
LIMIT = 1.7
# A control, and the domain it is shown with.
CONTROL = ("one-style", "emoji-styles")


def label(row: dict[str, Any]) -> str:
    """The rule, and what kind of control the run was."""
    control = ", one style" * (row["domain"] == CONTROL[0]) + ", roles exchanged" * row["swap"]
    return str(row["rule"]) + control


def front(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each domain, its controls in it; the plain attack only."""
    from matplotlib.figure import Figure

    plain = [row for row in rows if not row["overrides"] and row["attack"] == "plain"]
    domains = sorted({row["domain"] for row in plain} - {CONTROL[0]})
    labels = sorted(set(map(label, plain)))
    figure = Figure(figsize=(7.4 * len(domains), 4.8), layout="constrained")
    for axes, domain in zip(np.atleast_1d(figure.subplots(1, len(domains))), domains, strict=True):
        own = [row for row in plain if row["domain"] == domain or (row["domain"], domain) == CONTROL]
        outside = sum(row["illegal distance"] > LIMIT or row["legal distance"] > LIMIT for row in own)
        for number, name in enumerate(labels):
            points = [row for row in own if label(row) == name]
            for filled, role in ((True, "legal"), (False, "unseen")):
                axes.scatter(
                    [row[f"{role} distance"] for row in points],
                    [row["illegal distance"] for row in points],
                    s=[30 + 90 * row["p"] for row in points],
                    marker="osD^v<>PX*hd"[number % 12],
                    color=f"C{number % 10}" if filled else "none",
                    edgecolors=f"C{number % 10}",
                    label=name if filled and points else None,
                )
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
        low = min(-0.6, axes.get_xlim()[0])
        axes.fill_between([low, TARGET[0]], TARGET[1], 3.0, color="tab:green", alpha=0.12, linewidth=0)
        axes.set(xlim=(low, LIMIT), ylim=(-0.3, LIMIT), title=f"{domain} ({outside} masks beyond the axes)")
        axes.set(xlabel="legal impact (hollow: unseen legal classes)", ylabel="mitigation")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def crossovers(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each domain, rule and p that was run both ways round: what the role does, each class against itself.

    Mean over classes with a 95 % t-interval over them; of a rule that does not look at roles the difference is zero.
    """
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["attack"] == "plain" and not row["overrides"]:
            groups.setdefault((row["domain"], row["rule"], row["p"]), []).append(row)
    heads = "".join(f"{head:<22}" for head in ("as illegal", "as legal", "difference"))
    lines = [f"{'domain':<14}{'rule':<18}{'p':>5}{'classes':>8}{'runs':>7}  {heads}".rstrip()]
    for (domain, rule, p), own in sorted(groups.items()):
        found = list(crossover(own).values())
        if found:
            columns = [*zip(*found, strict=True), [illegal - legal for illegal, legal in found]]
            cells = "".join(f"{interval(column):<22}" for column in columns)
            runs = f"{sum(not row['swap'] for row in own)}+{sum(row['swap'] for row in own)}"
            lines.append(f"{domain:<14}{rule:<18}{p:>5g}{len(found):>8}{runs:>7}  {cells}".rstrip())
    return "\n".join(lines)


def samples(bench: Bench, mask: FreezeMask, path: Path, columns: int = 8) -> None:
    """Three rows a class: references, drawn after unguarded learning, drawn after learning under `mask`."""
    rows = []
    for cls in bench.roles:
        rows.append(bench.reference_pictures(cls)[:columns])
        rows.extend(bench.drawn(defence, cls, ATTACKS["plain"], 0, columns) for defence in (None, mask))
    side = rows[0].shape[1]
    sheet = Image.new("RGB", (columns * (side + 2), len(rows) * (side + 2)), "#888888")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (side + 2) + 1, y * (side + 2) + 1))
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "selectivity.jsonl")
    parser.add_argument("--front", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--mask", type=Path, help="folder under CACHE/masks")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="emoji-styles")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/selectivity"))
    arguments = parser.parse_args()
    if arguments.samples:
        if arguments.mask is None:
            parser.error("--samples needs --mask")
        torch.set_num_threads(1)
        bench = open_bench(arguments.domain, arguments.cache, arguments.pictures, [])
        samples(bench, FreezeMask.load(arguments.mask), arguments.samples)
        return
    rows = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, bool, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["domain"], row["swap"], tuple(row["overrides"])), []).append(row)
    for (domain, swap, overrides), own in sorted(groups.items()):
        print(", ".join([domain, *["illegal and legal exchanged"] * swap, *overrides]))
        print(table(own) + "\n")
    print("each class as illegal and as legal, distance\n" + crossovers(rows))
    if arguments.front:
        front(rows, arguments.front)


if __name__ == "__main__":
    main()
