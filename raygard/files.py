"""Writing files so that a reader never sees a half, and a full disk or a damaged file is one line."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import re
import stat
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from raygard.errors import RaygardError

SCRATCH = ".tmp"
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


@contextmanager
def scratch(path: Path, *, keep_same: bool = False) -> Iterator[Path]:
    """A file to write, renamed to `path` at the end; of a name no other process on any node can have.

    Readers see the old content or the new, never a part. A missing folder is made. keep_same: a file that has this
    content already is left alone, with the time it was written.
    Raises RaygardError for a full disk or a folder that cannot be written.
    """
    file = path.with_name(f".{path.name}.{uuid.uuid4().hex}{SCRATCH}")
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield file
            _flush(file)
            if not (keep_same and _same(file, path)):
                os.replace(file, path)
        finally:
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, keep_same: bool = False) -> None:
    """Write a file as `scratch` does."""
    with scratch(path, keep_same=keep_same) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end, whole or not at all.

    Raises RaygardError if `target` is not empty, the disk is full, or the folder around it cannot be written.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise RaygardError(f"{target} is not empty; choose another folder")
    with readable_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as around:
            folder = Path(around) / target.name
            folder.mkdir()
            yield folder
            folder.rename(target)


# What numpy lets through for an npz file that is torn, or is none.
DAMAGED_ARCHIVE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an npz file. Raises RaygardError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except DAMAGED_ARCHIVE as error:
        raise RaygardError(f"cannot read {path}: {error}; delete it and run again") from None


def named_inside(folder: Path, name: str, what: str) -> Path:
    """`folder / name`, for a name from elsewhere that must not lead out of the folder by its letters alone.

    what: what the name is, for the message. Refused on every system is what leads out on any: absolute paths, `..`,
    drive letters, backslashes, control characters. Links are not followed. Raises RaygardError.
    """
    parts = name.split("/")
    unprintable = any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    if not parts[0] or ".." in parts or "\\" in name or unprintable or re.match(r"[A-Za-z]:", name):
        raise RaygardError(f"{what} {name[:200]!r} must be a path inside the folder, without '..', drive or backslash")
    return folder / name


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """A regular file's bytes. Raises OSError if it cannot be read, is no regular file, or is larger than the limit.

    For files from elsewhere: neither a pipe that never ends nor a huge file is read before it is refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a file")
        if found.st_size > limit_bytes:
            raise OSError(errno.EFBIG, f"larger than {limit_bytes / 2**20:g} MiB")
        return stream.read(limit_bytes)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def _flush(path: Path) -> None:
    # Without this a machine that loses power may keep the new name and not the content.
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def require_own(folder: Path, *, whole: bool = False) -> None:
    """Raise RaygardError if `folder`, or with `whole` anything in it, belongs to another user; a missing one is fine.

    What lies in a run directory is trusted: Ray's and DeepSpeed's state are pickles, which run code when they are read.
    """
    if not folder.exists():
        return
    own = own_users(folder)
    paths = [folder, *(folder.rglob("*") if whole else ())]
    for path in paths:
        try:
            # Of a link, both whoever made it and whoever owns what it leads to could have put something there.
            owners = {path.lstat().st_uid, path.stat().st_uid}
        except FileNotFoundError:
            continue
        if not owners <= own:
            other = min(owners - own)
            raise RaygardError(
                f"{path} belongs to another user ({other}); a run is resumed only from what this user wrote, since its "
                "checkpoints run code when they are read: choose another --out, or chown it if you trust all of it"
            )


def own_users(folder: Path) -> set[int]:
    """User ids that files of this process have in `folder`: its own, and what a network file system makes of it."""
    own = {os.geteuid()}
    if folder.stat().st_uid not in own:
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
            own.add(os.fstat(probe.fileno()).st_uid)
    return own


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
