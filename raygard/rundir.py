"""A run on disk: one folder, one sub-folder for each stage, each finished by a manifest written last.

A stage whose inputs' hash is unchanged is not run again. A stage that was cut off keeps its folder, so that Ray
Train can go on from its checkpoints; a stage whose inputs changed starts from an empty folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import raygard
from raygard.config import RunConfig, config_hash, decides, flatten, public
from raygard.config_file import UNREADABLE
from raygard.errors import RaygardError
from raygard.files import existing_folder, readable_disk_errors, require_own, write_text

SUCCESS, INPUTS, CONFIG, LOCK = "_SUCCESS.json", "_inputs.json", "config.yaml", ".lock"
VERSIONED = ("torch", "ray", "deepspeed", "diffusers", "transformers", "accelerate", "mlflow", "numpy")
MIN_FREE_BYTES = 200 * 1024 * 1024


class RunDirectory:
    """Resolved configuration, stages and outputs of one run."""

    def __init__(self, path: str | Path, config: RunConfig) -> None:
        """Open or create a run directory, which no other process may open while this object lives.

        Raises RaygardError as `check` does, or if another process has the directory.
        """
        self.path = Path(path).resolve()
        self.config = config
        self.check(self.path, config)
        with readable_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, _lock(self.path))
            write_text(self.path / CONFIG, yaml.safe_dump(public(config).model_dump(mode="json"), sort_keys=False))
            self.info: dict[str, Any] = self._read_info()
            self.note(
                raygard_version=raygard.__version__,
                versions={**_versions(), "python": platform.python_version()},
                config_hash=config_hash(config),
            )

    @staticmethod
    def check(path: str | Path, config: RunConfig) -> None:
        """Raise RaygardError if `path` holds another configuration, is no run directory, or the disk is full.

        The same if it belongs to another user: its checkpoints run code when they are read. Writes nothing.
        """
        folder = Path(path).resolve()
        with readable_disk_errors(folder):
            require_own(folder)
            if (folder / CONFIG).exists():
                _refuse_other_config(folder / CONFIG, config)
            elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
                raise RaygardError(f"{folder} is not empty and is not a raygard run; choose another --out")
            free = shutil.disk_usage(existing_folder(folder)).free
            if free < MIN_FREE_BYTES:
                raise RaygardError(
                    f"{folder}: only {free // 2**20} MiB free, a run needs at least {MIN_FREE_BYTES // 2**20} MiB"
                )

    @staticmethod
    def noted(path: str | Path) -> dict[str, Any]:
        """What run.json of the run directory `path` says; nothing if there is none."""
        return _read_json(Path(path) / "run.json") or {}

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def note(self, **values: Any) -> None:
        """Merge values into run.json."""
        self.info.update(values)
        write_text(self.path / "run.json", json.dumps(self.info, indent=2) + "\n")

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any]) -> Iterator[tuple[Path, bool]]:
        """Yield (folder, already_done); on a clean exit the stage is marked as finished.

        inputs: JSON-able values that decide the stage's result.
        """
        with stage(self.path / name, inputs) as (folder, done):
            yield folder, done
        if not done:
            seconds = stage_seconds(folder)
            with readable_disk_errors(folder):
                self.note(seconds={**self.info.get("seconds", {}), name: seconds})

    def _read_info(self) -> dict[str, Any]:
        return self.noted(self.path) or {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


@dataclass
class _Lock:
    descriptor: int
    holders: int = 0


# A process may open a directory twice, but closing any descriptor of a file gives up all its locks on it.
_LOCKS: dict[Path, _Lock] = {}


def _lock(folder: Path) -> Callable[[], None]:
    """Refuse a directory another process works in; return what gives it up, as the process's end does as well.

    Two processes would write the same trials and MLflow runs.
    """
    if folder not in _LOCKS:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            # Some network file systems have no locks; that is no reason not to run.
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return lambda: None
            raise RaygardError(
                f"{folder} is in use by another raygard process ({owner}); wait for it or choose another --out"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{socket.gethostname()}, process {os.getpid()}\n".encode())
        _LOCKS[folder] = _Lock(descriptor)
    lock = _LOCKS[folder]
    lock.holders += 1

    def release() -> None:
        lock.holders -= 1
        if lock.holders == 0:
            os.close(lock.descriptor)
            _LOCKS.pop(folder, None)

    return release


@contextmanager
def stage(folder: Path, inputs: dict[str, Any]) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, already_done); on a clean exit the folder is marked as finished for these inputs.

    inputs: JSON-able values that decide the stage's result. A folder begun for other inputs is emptied first.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    done = _read_json(folder / SUCCESS)
    if done is not None and done.get("inputs") == digest:
        yield folder, True
        return
    begun = _read_json(folder / INPUTS)
    started = time.monotonic()
    with readable_disk_errors(folder):
        # Marks go first: a folder that is only half removed must not look finished or resumable later.
        (folder / SUCCESS).unlink(missing_ok=True)
        if folder.exists() and (begun is None or begun.get("inputs") != digest):
            (folder / INPUTS).unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / INPUTS, json.dumps({"inputs": digest}))
        yield folder, False
        seconds = round(time.monotonic() - started, 2)
        write_text(folder / SUCCESS, json.dumps({"inputs": digest, "seconds": seconds}))


def stage_seconds(folder: Path) -> float:
    """Wall-clock seconds the finished stage in `folder` took when it ran."""
    return float((_read_json(folder / SUCCESS) or {}).get("seconds", 0.0))


def _refuse_other_config(path: Path, config: RunConfig) -> None:
    try:
        before = flatten(RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except UNREADABLE:
        raise RaygardError(f"{path} is damaged or of another raygard version; choose another --out") from None
    now = flatten(config)
    for key, value in now.items():
        if decides(key) and before.get(key) != value:
            raise RaygardError(
                f"{path.parent} holds another configuration: {key} was {before.get(key)!r}, now {value!r}; "
                "choose another --out or use the same values"
            )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
