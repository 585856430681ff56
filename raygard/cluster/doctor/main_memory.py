"""How much main memory a process can still get, on a machine or in a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Of cgroup versions 2 and 1: limit, usage, and the field of memory.stat that says what of it can be had back.
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def main_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can still be had; 0 if the system does not say.

    The least of what Linux estimates for the machine and what each control group around this process leaves below its
    limit: in a container, /proc/meminfo is that of the whole machine. root: where /proc and /sys are.
    """
    available = [*_machine(root), *(limit - used for limit, used in _groups(root))]
    return max(0, min(available, default=0))


def _machine(root: Path) -> Iterator[int]:
    for line in _read(root / "proc" / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and used bytes, without file pages that can be dropped, of this process's group and those around it."""
    mounts = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = mounts / controllers
        # A container sees its own group at the mount, whatever the name that the machine knows it by.
        inside = Path(name.lstrip("/"))
        for folder in {mount / part for part in (inside, *inside.parents)}:
            yield from _group(folder)


def _group(folder: Path) -> Iterator[tuple[int, int]]:
    for limit, usage, reclaimable in FILES:
        # "max" stands for no limit.
        found = [_read(folder / name).strip() for name in (limit, usage)]
        if all(value.isdigit() for value in found):
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if line.count(" ") == 1)
            yield int(found[0]), max(0, int(found[1]) - int(stat.get(reclaimable, 0)))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
