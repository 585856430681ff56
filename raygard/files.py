"""Writing files so that a reader never sees a half, and a full disk is one line."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from raygard.errors import RaygardError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one line."""
    full = f"no space left while writing {path}; free some and run the same command again (finished stages are kept)"
    try:
        yield
    except SafetensorError as error:
        # safetensors wraps the operating system's error and keeps its number in the text only.
        if any(f"os error {number}" in str(error) for number in FULL):
            raise RaygardError(full) from None
        raise
    except OSError as error:
        if error.errno in FULL:
            raise RaygardError(full) from None
        if error.errno in FORBIDDEN:
            raise RaygardError(f"cannot write to {path}: {error.strerror}") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
