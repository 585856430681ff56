"""What each fault cost, told by the tests and printed at the end as one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
SENT = "raygard faults"
HEAD = ("fault", "what was lost", "time to recover")

ReportFault = Callable[[str, str, float], None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def report_fault(pytestconfig: pytest.Config) -> ReportFault:
    """`report_fault(fault, lost, seconds)`: a line of the table, with what the test measured."""

    def report(fault: str, lost: str, seconds: float) -> None:
        pytestconfig.stash[ROWS].append((fault, lost, f"{seconds:.0f} s"))

    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist sends its rows to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[SENT] = session.config.stash[ROWS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A process that died has sent nothing.
    rows = getattr(node, "workeroutput", {}).get(SENT, [])
    node.config.stash[ROWS].extend(tuple(row) for row in rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(len(HEAD))]
    terminalreporter.section("faults")
    for row in (HEAD, *rows):
        line = " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
