"""The exception type for mistakes a user can mend, the exit codes of every command and job, and common checks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from importlib.util import find_spec

from raygard.redaction import redact


class ExitCode(IntEnum):
    """What a command, or a job, ends with; docs/cluster-jobs.md says what each is for."""

    DONE = 0
    DEFECT = 1
    BAD_INPUT = 2
    MOVED = 3
    UNFIT_CLUSTER = 4
    NOT_SIGNED = 5
    INTERRUPTED = 130


class RaygardError(ValueError):
    """What is wrong, the offending value, and how to mend it, in one line.

    The command line prints it without a traceback and exits with `exit_code`.
    What it quotes may come from elsewhere: line breaks and other unprintable letters are shown, not printed, and
    secrets are taken out.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in redact(message)))


class UnfitClusterError(RaygardError):
    """What `raygard doctor` finds wrong with a cluster, before a job is started on it."""

    exit_code = ExitCode.UNFIT_CLUSTER


def require_packages(what: str, extra: str, *packages: str) -> None:
    """Raise RaygardError naming the extra to install if one of the packages is missing; imports none of them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RaygardError(f"{what} needs {', '.join(missing)}: pip install 'raygard[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
