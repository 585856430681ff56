"""Reading a Hugging Face imagefolder: its table and paths, either of which may be broken or hostile."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygard.errors import RaygardError, nearest
from raygard.files import named_inside, read_limited
from raygard.pictures import SUFFIXES

# Millions of rows; a table is held in memory.
MAX_TABLE_BYTES = 2**28
METADATA = ("metadata.jsonl", "metadata.csv")
ONE_CLASS = "all"


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    path: Path
    caption: str
    cls: str


def resolve_data(name: str) -> Path:
    """Folder of a domain: a path, or `zoo:emoji-styles` (bundled). Raises RaygardError if it is missing."""
    if name.startswith("zoo:"):
        zoo = Path(__file__).parent / "zoo"
        folder = zoo / name.removeprefix("zoo:").replace("-", "_")
        if folder.parent != zoo or not (folder / METADATA[0]).is_file():
            known = sorted(f"zoo:{p.parent.name.replace('_', '-')}" for p in zoo.glob(f"*/{METADATA[0]}"))
            raise RaygardError(f"no bundled domain '{name}'{nearest(name, known)}")
        return folder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise RaygardError(f"no data folder at {folder} (domain.data)")
    return folder


def has_column(folder: Path, column: str) -> bool:
    """Whether any row of the folder's table has `column`; a folder without a table has its classes as folders."""
    table = _table(folder)
    return table is None or any(column in row for _, row in _rows(table))


def read_entries(folder: Path, caption_column: str, class_column: str | None) -> list[Entry]:
    """Rows of `metadata.jsonl` or `metadata.csv`, with checked paths; else one folder for each class.

    class_column: None puts all pictures of a table into one class, ONE_CLASS.
    Raises RaygardError naming the row for an unreadable table, a missing column, caption or class, and a file
    name that is absolute, leaves the folder (also through a symbolic link) or does not exist.
    """
    table = _table(folder)
    if table is None:
        return _class_folders(folder)
    rows = _rows(table)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    needed = {
        "file_name": "",
        caption_column: " (domain.caption_column)",
        **({class_column: " (domain.class_column)"} if class_column is not None else {}),
    }
    for column, setting in needed.items():
        if column not in columns:
            raise RaygardError(
                f"{table} has no column '{column}'{setting}{nearest(column, columns)}; "
                f"columns found: {', '.join(columns) or 'none'}"
            )
    root = folder.resolve()
    return [
        Entry(
            _inside(folder, root, _text(row, "file_name", f"{table}, line {line}"), f"{table}, line {line}"),
            _text(row, caption_column, f"{table}, line {line}"),
            ONE_CLASS if class_column is None else _text(row, class_column, f"{table}, line {line}"),
        )
        for line, row in rows
    ]


def _table(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _rows(table: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = read_limited(table, MAX_TABLE_BYTES).decode("utf-8-sig")
        return _read_jsonl(table, text) if table.suffix == ".jsonl" else _read_csv(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RaygardError(f"cannot read {table}: {str(error).splitlines()[0]}") from None


def _read_jsonl(table: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            # Besides JSONDecodeError: numbers of thousands of digits, and deep nesting.
            why = getattr(error, "msg", None) or str(error)
            raise RaygardError(f"{table}, line {line} is not valid JSON: {why}") from None
        if not isinstance(row, dict):
            raise RaygardError(f"{table}, line {line}: expected an object, found {type(row).__name__}")
        rows.append((line, row))
    return rows


def _read_csv(content: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), restkey="", strict=True)
    return [(reader.line_num, {key: value for key, value in row.items() if key}) for row in reader]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RaygardError(f"{where}: '{column}' is empty or not text ({value!r})")
    return value


def _inside(folder: Path, root: Path, name: str, where: str) -> Path:
    path = named_inside(folder, name, f"{where}: file_name")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise RaygardError(f"{where}: {path} does not exist") from None
    if not target.is_relative_to(root):
        raise RaygardError(f"{where}: {path} is a link that leaves the folder")
    if not target.is_file():
        raise RaygardError(f"{where}: {path} is not a file")
    return path


def _class_folders(folder: Path) -> list[Entry]:
    root, entries = folder.resolve(), []
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                name = path.relative_to(folder).as_posix()
                inside = _inside(folder, root, name, str(folder))
                entries.append(Entry(inside, directory.name.replace("_", " "), directory.name))
    if not entries:
        raise RaygardError(f"{folder} holds no {' or '.join(METADATA)} and no folder for each class (domain.data)")
    return entries
