"""Progress of long work: bars on a terminal, one line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_INTERVAL_S = 15.0


class Bar:
    """Advances from any thread."""

    def __init__(self, name: str, total: int, show: Any) -> None:
        self.name, self.total, self.done, self.text = name, total, 0, ""
        self._show, self._lock = show, threading.Lock()

    def advance(self, steps: int = 1, text: str = "") -> None:
        with self._lock:
            self.done = min(self.total, self.done + steps)
            self.text = text
            self._show(self)


class Progress:
    """Creates one bar at a time."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._last = 0.0

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        started = time.monotonic()
        if self.quiet:
            yield Bar(name, total, lambda bar: None)
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with RichProgress(*columns, console=Console(stderr=True)) as rich:
                task = rich.add_task(name, total=total, text="")
                yield Bar(name, total, lambda bar: rich.update(task, completed=bar.done, text=bar.text))
        else:
            yield Bar(name, total, self._line)
            print(f"{name}: done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def _line(self, bar: Bar) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_INTERVAL_S:
            self._last = now
            print(f"{bar.name}: {bar.done}/{bar.total}  {bar.text}", file=sys.stderr, flush=True)
