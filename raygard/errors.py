"""The one exception type for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RaygardError(ValueError):
    """What is wrong, the offending value, and how to mend it, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
