"""Peak memory of one task in a process that runs many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Linux: resets the peak resident size (man 5 proc_pid_clear_refs).
RESET_PEAK = "5"


class PeakMemory:
    """Counts from its creation: on a device what torch has allocated there, else the process's resident memory.

    The resident memory includes what the process holds anyway: libraries and the pristine model.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._known = True
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            self._known = False

    @property
    def bytes(self) -> int | None:
        """The peak so far; None where the system does not tell it for a part of a process's life."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        if not self._known:
            return None
        lines = STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)

    def over(self, earlier: Mapping[str, Any] | None) -> int | None:
        """The peak of this part and of the `earlier` part ("peak_memory_bytes") that it goes on from."""
        known = [self.bytes, *([earlier.get("peak_memory_bytes")] if earlier else [])]
        return None if None in known else max(value for value in known if value is not None)
