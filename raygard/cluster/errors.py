"""Finding a user's mistake inside what Ray wraps around it."""

from __future__ import annotations

from raygard.errors import RaygardError


def user_mistake(error: BaseException | None) -> str | None:
    """Return the message of the RaygardError that caused `error` in another process, or None."""
    seen: set[int] = set()
    stack: list[object] = [error]
    while stack:
        current = stack.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RaygardError):
            # Ray's task errors inherit from the cause; only the cause's own arguments are the message.
            cause = getattr(current, "cause", None)
            return str(cause if isinstance(cause, RaygardError) else current)
        stack += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        stack.append(getattr(current, "controller_failure", None))
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            stack += list(failures.values())
    return None
