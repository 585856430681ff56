"""The tables of the FreezeAsGuard paper: published numbers as data files, and ours from comparison folders beside them.

Nothing here starts anything (docs/tables.md).
"""

from raygard.paper_tables.published import NAMES, PublishedTable, load_table
from raygard.paper_tables.table import FOLDERS, command, fill, place
from raygard.paper_tables.write import write_tables

__all__ = ["FOLDERS", "NAMES", "PublishedTable", "command", "fill", "load_table", "place", "write_tables"]
