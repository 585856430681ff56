"""The published tables as data: numbers as printed, their source, and which of our measurements belongs to each cell.

Cells of a row are written in one string. `5.4*` has lost its decimal point in our copy of the paper and got it back,
`-` is a dash of the paper, `.` a place where the paper's table has no cell.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from raygard.config_section import Section
from raygard.errors import RaygardError, nearest

NAMES = (*(f"table{number}" for number in range(1, 9)), "figure12", "figure14")
CELL = re.compile(r"-|\.|\d+(\.\d+)?\*?")
# Why raygard has no number for a column, by the word used in the data files.
REASONS = {
    "clip": "CLIP's weights cannot be had where this was written; with them: evaluation.scorer=CLIP",
    "topiq": "raygard has no TOPIQ scorer: its weights cannot be had where this was written",
    "human": "needs volunteers",
    "faces": "needs faces, and the bundled domain has none; with pictures of people: jobs/configs/paper/table2.yaml",
    "memory": "on a CPU the peak is of the whole process, which freezing hardly changes",
}


class Source(Section):
    """Where the numbers are printed. Our copy of the paper is plain text, without page numbers."""

    paper: str
    label: str
    where: str


class Column(Section):
    """scorer: ours of the real run; small: of the small twin, the first that was used, default that of the real run.

    field: column of matrix.csv. saved: the share saved against users without a defence. missing, small_missing: word of
    REASONS. part: of which part, None if the table has but one.
    """

    name: str
    scorer: str | None = None
    small: tuple[str, ...] = ()
    field: Literal["distance", "seconds_adapt", "peak_memory_bytes", "param_share"] = "distance"
    saved: bool = False
    missing: str | None = None
    small_missing: str | None = None
    part: str | None = None

    def why_missing(self, small: bool) -> str | None:
        """Why there is no number of ours, None if there can be one."""
        word = self.missing or (self.small_missing if small else None)
        return None if word is None else REASONS[word]

    def scorers(self, small: bool) -> tuple[str, ...]:
        """Names that ours may have."""
        return self.small if small and self.small else ((self.scorer,) if self.scorer else ())


class Row(Section):
    """base: the release itself. draw: of a random mask, None for all of them. published: None if not in our copy."""

    method: str
    role: Literal["illegal", "legal"] | None = None
    defence: str | None = None
    base: bool = False
    draw: int | None = None
    published: str | None = None

    @property
    def cells(self) -> list[str] | None:
        """The published cells."""
        return None if self.published is None else self.published.split()


class Part(Section):
    """One of several comparisons of a table: what it overrides in the table's configuration."""

    name: str
    full: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    small_missing: str | None = Field(None, description="why there is no small twin of this part")


class PublishedTable(Section):
    """A table or figure of the paper. not_in_copy: what our copy of the paper lacks. pictures: which pictures only the
    reader can give. kind: ours come from matrix.csv, from overlaps of masks, or from the losses of mask learning."""

    title: str
    source: Source
    not_in_copy: str | None = None
    pictures: str | None = None
    kind: Literal["matrix", "overlap", "loss"] = "matrix"
    claims: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> PublishedTable:
        parts = {part.name for part in self.parts}
        for column in self.columns:
            if column.part is not None and column.part not in parts:
                raise ValueError(f"column '{column.name}' is of part '{column.part}', which there is not")
            for word in (column.missing, column.small_missing):
                if word is not None and word not in REASONS:
                    raise ValueError(f"column '{column.name}': no reason is called '{word}'")
        for row in self.rows:
            cells = row.cells
            if cells is None and self.not_in_copy is None:
                raise ValueError(f"row '{row.method}' has no published numbers, and not_in_copy does not say why")
            if cells is not None and (len(cells) != len(self.columns) or not all(map(CELL.fullmatch, cells))):
                raise ValueError(f"row '{row.method}' needs {len(self.columns)} published cells, got '{row.published}'")
        return self


def load_table(name: str) -> PublishedTable:
    """The table called `name`, one of NAMES. Raises RaygardError for another name, or a data file that is not valid."""
    if name not in NAMES:
        raise RaygardError(f"the paper has no '{name}'{nearest(name, NAMES)}")
    file = resources.files(__package__) / "published" / f"{name}.yaml"
    try:
        return PublishedTable.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise RaygardError(f"published numbers of {name}: {' '.join(str(error).split())}"[:400]) from None
