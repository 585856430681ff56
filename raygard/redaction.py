"""Secrets: taken out of what is written, logged, printed or sent; refused where everyone would read them."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "***"
# Shorter values are words that stand elsewhere for something else.
MIN_SECRET = 6
SECRET_NAME = (
    r"(?:[A-Za-z0-9_-]*PASSWORD|(?:[A-Za-z0-9_-]*[_-])?"
    r"(?:TOKEN|PASSWD|PASSPHRASE|SECRET|(?:SECRET|API)[_-]?KEY|ACCESS[_-]?KEY(?:[_-]?ID)?))"
)
_SECRET_VARIABLE = re.compile(rf"{SECRET_NAME}|\w+_KEY|MYSQL_PWD", re.IGNORECASE)
# In a word that a shell is to read; what it takes from elsewhere is no secret of the command's.
_ASSIGNED = re.compile(rf"(?:^|[\s;&|('\"])(?:{SECRET_NAME}=|--?{SECRET_NAME}\s+)['\"]?[^\s'\"$`;-]", re.IGNORECASE)
# Signed addresses, of AWS, Google and Azure, let in whoever has them.
_SIGNATURE = r"(?:X-(?:Amz|Goog)-)?Signature|sig"
_PATTERNS = (
    # Credentials of a URI. A password may hold slashes and at signs, though it should not; what follows a colon is no
    # password if it is a port.
    (
        re.compile(r"://(?:[^\s/@:]*:(?!\d+/)[^\s@]{0,256}(?:@[^\s/@]*)*|[^/\s]*|[^/\s@]*/[^/\s@]*)@"),
        f"://{HIDDEN}@",
    ),
    (re.compile(rf"([?&;#](?:{SECRET_NAME}|{_SIGNATURE})=)[^&\s#'\"]+", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"\b(bearer|basic) [A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\g<1> {HIDDEN}"),
    # Hugging Face, AWS, GitHub, Google, Slack.
    (
        re.compile(
            r"\b(?:(?:hf|gh[pousr]|github_pat)_\w{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,})"
        ),
        HIDDEN,
    ),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)


def redact(text: object) -> str:
    """`text` without secrets: credentials in URIs, tokens of known form, private keys, and the value of every
    environment variable that is named like a secret (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...)."""
    found = str(text)
    for value in _secret_values():
        found = found.replace(value, HIDDEN)
    for pattern, shown in _PATTERNS:
        found = pattern.sub(shown, found)
    return found


def redact_all(content: Any) -> Any:
    """JSON-able `content` with every string in it redacted, keys too."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, dict):
        return {redact(key): redact_all(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_all(value) for value in content]
    return content


def holds_secret(argument: str) -> bool:
    """Whether an argument of a command holds a secret, or gives one to an option or variable named like one."""
    whole = re.fullmatch(rf"-{{0,2}}{SECRET_NAME}=.+", argument, re.IGNORECASE | re.DOTALL)
    return whole is not None or _ASSIGNED.search(argument) is not None or redact(argument) != argument


def without_credentials(uri: str) -> str:
    """A URI that names the same place, without user and password."""
    return redact(uri).replace(f"://{HIDDEN}@", "://")


def _secret_values() -> list[str]:
    """Longest first: one may be part of another."""
    named = {value for name, value in os.environ.items() if _SECRET_VARIABLE.fullmatch(name)}
    return sorted((value for value in named if len(value) >= MIN_SECRET), key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Takes secrets out of whole log records, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
