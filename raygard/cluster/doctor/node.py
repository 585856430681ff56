"""What runs on every node that is examined. It imports little: the node starts a fresh process for it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raygard.cluster.doctor.main_memory import main_memory

PACKAGES = ("raygard", "ray", "torch", "deepspeed", "diffusers", "transformers")
MIB = 1024**2
# Network file systems show a new file to other clients after a moment.
MARKER_WAIT_S = 10.0


@dataclass(frozen=True)
class Listing:
    """A folder as one node sees it: number of files and their bytes, or why it cannot be read."""

    num_files: int = 0
    size_bytes: int = 0
    error: str | None = None


def versions() -> dict[str, str]:
    """Versions of Python and of what must be equal on all nodes, in this process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def write_marker(folder: str, name: str) -> str | None:
    """Write a marker of this node; why it could not be written, or None."""
    try:
        # Not its parents: a node without the mount must say so, not make a folder of its own in its place.
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / name).write_text(name, encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
    return None


def unseen_markers(folder: str, names: Sequence[str], wait_s: float = MARKER_WAIT_S) -> list[str]:
    """Names whose markers this node cannot read after waiting for slow file systems."""
    deadline = time.monotonic() + wait_s
    while True:
        missing = [name for name in names if not _holds(Path(folder) / name, name)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def list_model(name: str, revision: str | None) -> Listing:
    """The model's files as this node sees them; of a hub id, which need not lie here, whether it can be fetched."""
    from raygard.diffusion.model import HUB_ID, INDEX, resolve_model

    try:
        folder = Path(resolve_model(name))
        if folder.is_dir() or not HUB_ID.fullmatch(name):
            return list_folder(folder, ("*.json", "*.safetensors"), needed=INDEX)
        from huggingface_hub import hf_hub_download

        hf_hub_download(name, INDEX, revision=revision)
    except (OSError, ValueError) as error:
        return Listing(error=str(error).strip().splitlines()[0][:200])
    return Listing()


def list_data(name: str) -> Listing:
    """What lies at the top of the domain's folder, as this process sees it; nothing is opened."""
    from raygard.errors import RaygardError
    from raygard.imagefolder import resolve_data

    try:
        folder = resolve_data(name).absolute()
        sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    except RaygardError as error:
        return Listing(error=f"{error}, seen from {Path.cwd()}")
    except OSError as error:
        return Listing(error=f"{error.filename or name}: {error.strerror or error}")
    return Listing(len(sizes), sum(sizes))


def list_folder(folder: Path, patterns: Sequence[str], needed: str) -> Listing:
    """Files of `folder` that match, in all depths, each opened once."""
    try:
        if not (folder / needed).is_file():
            return Listing(error=f"no {needed} in {folder}")
        files = [path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()]
        for path in files:
            with path.open("rb") as stream:
                stream.read(1)
        return Listing(len(files), sum(path.stat().st_size for path in files))
    except OSError as error:
        return Listing(error=f"{error.filename or folder}: {error.strerror or error}")


def gpu_memory() -> list[tuple[int, int]]:
    """Free and total bytes of every GPU that nvidia-smi sees; none without it."""
    command = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
        return [(int(free) * MIB, int(total) * MIB) for free, total in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def look_around(folder: str, node_id: str, model: str, revision: str | None) -> dict[str, Any]:
    """Everything `NodeFacts` says of the node that this runs on; its marker is written to `folder`."""
    try:
        shm_bytes = shutil.disk_usage("/dev/shm").total
    except OSError:
        shm_bytes = 0
    return {
        "versions": versions(),
        "shm_bytes": shm_bytes,
        "gpus": gpu_memory(),
        "memory_bytes": main_memory(),
        "wrote": write_marker(folder, node_id),
        "model": list_model(model, revision),
    }


def remove_markers(folder: str) -> None:
    """Remove the folder of markers as this node sees it."""
    shutil.rmtree(folder, ignore_errors=True)


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == content
    except OSError:
        return False
