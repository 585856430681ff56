"""Which cluster is meant, and one clear line when it does not answer or refuses the token."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from raygard.errors import RaygardError

ANSWER_TIMEOUT_S = 5.0
# A tunnel takes connections also where nothing stands behind it; a dashboard on a busy machine may be slow.
DASHBOARD_TIMEOUT_S = 30.0
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_HELP = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token (clusters/README.md)"


def cluster_address(option: str | None) -> str | None:
    """The address given on the command line, else by the environment; None if neither names one."""
    return option or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)


def is_dashboard(address: str) -> bool:
    """Whether jobs can be submitted to it from outside (http), instead of drivers joining the cluster."""
    return address.startswith(("http://", "https://"))


def require_answer(address: str) -> None:
    """Raise RaygardError unless something listens at `address`, and answers if it should be a dashboard.

    Ray itself would wait for most of a minute for what does not listen, and for ever for what does not answer.

    address: `http://HOST:PORT` of a dashboard or `HOST:PORT` of a head.
    """
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise RaygardError(
            f"'{address}' is no cluster's address; give http://HOST:8265 (the dashboard) or HOST:6379 (the head)"
        )
    try:
        socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S).close()
        if is_dashboard(address):
            _require_dashboard(address)
    except OSError as error:
        raise RaygardError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start it, open the tunnel to it, or "
            "correct the address (clusters/README.md)"
        ) from None


def _require_dashboard(address: str) -> None:
    """Raises OSError if nothing comes from `address`, RaygardError if it is something else than Ray's dashboard."""
    # As Ray's client asks it, proxies and certificates included.
    import requests

    answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=DASHBOARD_TIMEOUT_S)
    if not answer.ok:
        # It may want the token, which is Ray's client's to send.
        return
    try:
        known = "ray_version" in answer.json()
    except (ValueError, TypeError):
        known = False
    if not known:
        raise RaygardError(f"what answers at {address} is no Ray dashboard; correct the address (clusters/README.md)")


def refused_token(address: str) -> RaygardError:
    """What to say when the cluster at `address` refuses the token, or there is none to send."""
    return RaygardError(f"the cluster at {address} refuses the token, or there is none to send; {TOKEN_HELP}")
