"""Our numbers: read out of the folders of comparisons, learned masks and histories of mask learning."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raygard.compare.matrix import COLUMNS, DONE, FAILED, UNFINISHED
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.outcome import NONE
from raygard.paper_tables.published import Column, Row

MATRIX, MASK, HISTORY = "matrix.csv", "mask", "learn/seed-0/history.jsonl"
# The kind of user of every table: full fine-tuning of the denoiser.
METHOD = "full"
# Iterations of the lower loop that Figure 14 shows.
SHOWN = 30

MatrixRow = Mapping[str, str]


@dataclass(frozen=True)
class Value:
    """What we measured for one cell.

    values: one for each user, or for each class where the release itself is meant; empty where nothing is measured, and
    then status says why: "failed", "unfinished" or "not run". total: how many there should be.
    """

    values: tuple[float, ...]
    total: int
    status: str = DONE


def read_matrix(file: Path) -> list[MatrixRow]:
    """The lines of a matrix.csv. Raises RaygardError for a file that `raygard compare` has not written."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows: list[MatrixRow] = [*reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RaygardError(f"cannot read {file}: {error}") from None
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise RaygardError(f"{file} has no column '{missing[0]}'; write it anew with `raygard compare`")
    return rows


def used_scorer(rows: Sequence[MatrixRow], names: Sequence[str]) -> str | None:
    """The first of `names` that the comparison has used; without names its first scorer; None if there is none."""
    used = list(dict.fromkeys(row["scorer"] for row in rows))
    return next((name for name in (names or used) if name in used), None)


def measured(rows: Sequence[MatrixRow], row: Row, column: Column, scorer: str | None) -> Value:
    """Our measurement for a cell: users of kind METHOD under the row's defence, by the column's field.

    rows: of matrix.csv. scorer: of `used_scorer`. Raises RaygardError for a field that is no number.
    """
    defence = NONE if row.base else row.defence
    own = [
        each
        for each in rows
        if each["scorer"] == scorer
        and each["method"] == each["adaptation"] == METHOD
        and each["defence"] == defence
        and row.role in (None, each["role"])
        and (row.draw is None or each["draw"] == str(row.draw))
    ]
    if not own:
        return Value((), 0, "not run")
    field = "d_base" if row.base else column.field
    if row.base:
        # Users of one class share the release they started from.
        own = list({each["class"]: each for each in own}.values())
    try:
        values = tuple(float(each[field]) for each in own if each[field])
    except ValueError as error:
        raise RaygardError(f"{MATRIX}, column '{field}': {error}; write it anew with `raygard compare`") from None
    statuses = {each["status"] for each in own}
    return Value(values, len(own), DONE if values else FAILED if FAILED in statuses else UNFINISHED)


def saved(value: Value, without: Value) -> Value:
    """The share of a cost saved against that of users without a defence, by means."""
    if not value.values or not without.values:
        return Value((), value.total, value.status if not value.values else without.status)
    return Value((1 - float(np.mean(value.values)) / float(np.mean(without.values)),), 1)


def overlap(first: Path, second: Path) -> tuple[float, float]:
    """(Jaccard index of the frozen tensors of two masks, what masks drawn at random would have).

    first, second: run directories. By chance: k1 k2 / N tensors are in both, k1 + k2 less that in either. Raises
    RaygardError for masks of different models.
    """
    masks = [FreezeMask.load(folder / MASK) for folder in (first, second)]
    if masks[0].names != masks[1].names:
        raise RaygardError(f"the masks in {first} and {second} are of different models")
    frozen = [mask.frozen for mask in masks]
    both, counts = int((frozen[0] & frozen[1]).sum()), [int(each.sum()) for each in frozen]
    by_chance = counts[0] * counts[1] / len(frozen[0])
    return both / (sum(counts) - both), by_chance / (sum(counts) - by_chance)


def lower_loop(file: Path, updates: int) -> list[float] | None:
    """Losses (Eq 7) of the first SHOWN user steps after so many mask updates; None if the history has fewer.

    file: history.jsonl of mask learning. Raises RaygardError for a file that is no history.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        own = {row["l"]: row for row in rows if row["kind"] == "user" and row["k"] == updates}
        losses = [float(own[step]["illegal_loss"] + own[step]["legal_loss"]) for step in sorted(own)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RaygardError(f"{file} is no history of mask learning: {error}") from None
    return losses[:SHOWN] if len(losses) >= SHOWN else None
