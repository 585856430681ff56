"""The tables as files: Markdown, LaTeX and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raygard.compare.tables import Block, latex_tables, markdown
from raygard.files import readable_disk_errors, write_text
from raygard.report.matrix import build_tables_page


def write_tables(blocks: Sequence[Block], folder: Path) -> list[Path]:
    """Write tables.md, tables.tex and tables.html into `folder`; their paths. Raises RaygardError if it cannot be."""
    with readable_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tables.md", markdown(blocks))
    write_text(folder / "tables.tex", latex_tables(blocks))
    return [folder / "tables.md", folder / "tables.tex", build_tables_page(blocks, folder / "tables.html")]
