"""A published table with ours beside it, as cells of text, and the command that would measure what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from raygard.compare.matrix import DONE
from raygard.compare.tables import Block, Lines
from raygard.outcome import NONE
from raygard.paper_tables import ours
from raygard.paper_tables.published import Column, Part, PublishedTable, Row, load_table

CONFIGS = "jobs/configs/paper"
# Where runs lie: what was run here, and what the repository holds.
FOLDERS = (Path("runs/paper"), Path("benchmarks/results/paper"))
NOT_AVAILABLE, NOT_RUN = "n/a", "not run"
WHOLE = Part(name="")
MEBIBYTE = 2**20


def place(name: str, small: bool, part: str = "") -> str:
    """Where a comparison lies in the folder of runs: `table3-small`, or `table5-small/2-classes` for one of several."""
    return f"{name}{'-small' * small}{'/' * bool(part)}{part}"


def fill(name: str, small: bool, folders: Sequence[Path] = FOLDERS) -> Block:
    """The table called `name` with our numbers beside the published ones.

    small: of the small twins. folders: where runs lie, at least one; the first that has a run counts. Raises
    RaygardError for an unknown name or a run that cannot be read.
    """
    table = load_table(name)
    runs = {part.name: _find(table, place(name, small, part.name), folders) for part in _parts(table)}
    filler = {"matrix": _matrix, "overlap": _overlaps, "loss": _losses}[table.kind]
    lines, notes = filler(table, small, runs)
    source = f"{table.source.label} ({table.source.paper}, {table.source.where})"
    title = f"{table.title}{'; ours: small twin' * small}"
    remarks = [*_remarks(table), *notes, *_commands(name, table, small, runs, folders[0])]
    return Block(f"{source}: {title}", lines, remarks)


def _parts(table: PublishedTable) -> tuple[Part, ...]:
    return table.parts or (WHOLE,)


def _find(table: PublishedTable, where: str, folders: Sequence[Path]) -> Path | None:
    file = {"matrix": ours.MATRIX, "overlap": ours.MASK, "loss": ours.HISTORY}[table.kind]
    return next((folder / where for folder in folders if (folder / where / file).exists()), None)


def _matrix(table: PublishedTable, small: bool, runs: dict[str, Path | None]) -> tuple[Lines, list[str]]:
    found = {part: ours.read_matrix(run / ours.MATRIX) if run else [] for part, run in runs.items()}
    used = [ours.used_scorer(found[column.part or ""], column.scorers(small)) for column in table.columns]
    header = ["method", "class"]
    for column, scorer in zip(table.columns, used, strict=True):
        header += [f"{column.name}, paper", f"{_our_name(column, scorer, small)}, ours"]
    lines = [header]
    for row in table.rows:
        published = row.cells or [NOT_AVAILABLE] * len(table.columns)
        line = [row.method, row.role or "all"]
        for cell, column, scorer in zip(published, table.columns, used, strict=True):
            rows = found[column.part or ""]
            part = next(each for each in _parts(table) if each.name == (column.part or ""))
            if cell == ".":
                line += ["", ""]
            elif column.why_missing(small) or (small and part.small_missing):
                line += [cell, NOT_AVAILABLE]
            else:
                line += [cell, _text(_value(rows, row, column, scorer), column)]
        lines.append(line)
    return lines, list(dict.fromkeys(_column_notes(table, small, used)))


def _our_name(column: Column, scorer: str | None, small: bool) -> str:
    if column.missing or column.field != "distance" or column.part is not None:
        return column.name
    return scorer or next(iter(column.scorers(small)), column.name)


def _value(rows: Sequence[ours.MatrixRow], row: Row, column: Column, scorer: str | None) -> ours.Value:
    value = ours.measured(rows, row, column, scorer)
    if not column.saved:
        return value
    return ours.saved(value, ours.measured(rows, row.model_copy(update={"defence": NONE}), column, scorer))


def _text(value: ours.Value, column: Column) -> str:
    """Mean +- standard deviation over users, and how many; the status where there is no number."""
    if value.status != DONE:
        return value.status
    scale, form = 1.0, ".4f" if column.scorer == "kid_enlite0" else ".3f"
    if column.saved or column.field == "param_share":
        form = ".1%"
    elif column.field == "seconds_adapt":
        form = ".1f"
    elif column.field == "peak_memory_bytes":
        scale, form = MEBIBYTE, ".0f"
    values = [each / scale for each in value.values]
    text = f"{np.mean(values):{form}}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):{form}}"
    count = f"{len(values)} of {value.total}" if len(values) < value.total else str(len(values))
    return text if column.saved else f"{text} (n={count})"


def _column_notes(table: PublishedTable, small: bool, used: Sequence[str | None]) -> Iterator[str]:
    for column, scorer in zip(table.columns, used, strict=True):
        why = column.why_missing(small)
        if why is not None:
            yield f"{column.name}: n/a, {why}."
        elif column.scorer is not None:
            name = scorer or column.scorers(small)[0]
            published = column.name if column.part is None else column.scorer
            if name != published:
                yield f"{published}: ours is {name}, another measure; its numbers do not compare with the paper's."


def _overlaps(table: PublishedTable, small: bool, runs: dict[str, Path | None]) -> tuple[Lines, list[str]]:
    lines = [["masks", *(f"{column.name}, {whose}" for column in table.columns for whose in ("paper", "ours"))]]
    pairs = combinations(runs.values(), 2)
    for row, (first, second) in zip(table.rows, pairs, strict=True):
        found = [f"{value:.3f}" for value in ours.overlap(first, second)] if first and second else [NOT_RUN] * 2
        lines.append([row.method, *(cell for value in found for cell in (NOT_AVAILABLE, value))])
    return lines, []


def _losses(table: PublishedTable, small: bool, runs: dict[str, Path | None]) -> tuple[Lines, list[str]]:
    lines = [["curve", *(f"{column.name}, {whose}" for column in table.columns for whose in ("paper", "ours"))]]
    run = runs[WHOLE.name]
    for row in table.rows:
        losses = ours.lower_loop(run / ours.HISTORY, int(row.method.split()[-1])) if run else None
        found = [NOT_RUN] * len(table.columns)
        if losses is not None:
            early, late = np.array(losses[:10]), np.array(losses[10:])
            found = [f"{value:.3f}" for value in (early[0], early.mean(), late.mean())]
            found.append(f"{(late.max() - late.min()) / late.mean():.0%}")
        lines.append([row.method, *(cell for value in found for cell in (NOT_AVAILABLE, value))])
    return lines, []


def _remarks(table: PublishedTable) -> list[str]:
    found = [f"Not in our copy of the paper, hence n/a: {table.not_in_copy}."] if table.not_in_copy else []
    found += [f"The paper says: {claim}" for claim in table.claims]
    if any("*" in (row.published or "") for row in table.rows):
        found.append("*: the decimal point was lost in our copy of the paper and restored.")
    return [*found, *table.notes]


def _commands(name: str, table: PublishedTable, small: bool, runs: dict[str, Path | None], folder: Path) -> list[str]:
    """What to say of every part: where its run is, or the command that would run it."""
    found = []
    for part in _parts(table):
        run, where = runs[part.name], place(name, small, part.name)
        if small and part.small_missing:
            found.append(f"{part.name}: n/a, {part.small_missing}.")
            continue
        if run is not None:
            found.append(f"Ours: {run}")
            continue
        pictures = f"{table.pictures}. " if table.pictures else ""
        found.append(f"{pictures}{where}: not run; {command(name, small, part.name, folder)}")
    return found


def command(name: str, small: bool, part: str = "", folder: Path = FOLDERS[0]) -> str:
    """The command line that fills one part of a table. folder: of the runs. Raises RaygardError for an unknown name."""
    table = load_table(name)
    chosen = next(each for each in _parts(table) if each.name == part)
    verb = "compare" if table.kind == "matrix" else "learn"
    words = ["raygard", verb, "--config", f"{CONFIGS}/{place(name, small)}.yaml"]
    words += ["--out", f"{folder}/{place(name, small, part)}"]
    words += ["--data", "FOLDER"] if table.pictures else []
    return shlex.join([*words, *(chosen.small if small else chosen.full)])
