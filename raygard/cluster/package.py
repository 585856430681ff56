"""What `--working-dir` would upload: Ray sends what no ignore file names and it does not leave out by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import PathSpec

from raygard.errors import RaygardError

MIB = 1024**2
# Ray keeps the package in one message of its control store, which may have so many bytes (Ray 2.60).
LIMIT_BYTES = 512 * MIB
IGNORE_FILES = (".gitignore", ".rayignore")
NO_GITIGNORE = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
NUM_NAMED = 5


@dataclass(frozen=True)
class Package:
    """Files of a working directory as Ray packs them: their number, bytes, and the bytes of each top-level entry."""

    num_files: int
    size_bytes: int
    entries: dict[str, int]

    @property
    def largest(self) -> str:
        """The heaviest top-level entries, in words."""
        heavy = sorted(self.entries.items(), key=lambda entry: -entry[1])[:NUM_NAMED]
        return ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in heavy if size)


def measure_package(folder: Path) -> Package:
    """Files and bytes that Ray would upload of `folder`; it packs without compression, so the bytes are the package's.

    As Ray does, .gitignore and .rayignore of every folder are honoured, what Ray leaves out by default
    (RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES) is not counted, and links are followed. Raises RaygardError if
    `folder` is none, or if a link leads back to a folder above it.
    """
    if not folder.is_dir():
        raise RaygardError(f"no working directory at {folder} (--working-dir)")
    entries: dict[str, int] = {}
    num_files = 0

    def visit(path: Path, specs: Sequence[tuple[Path, PathSpec]], above: Sequence[Path]) -> int:
        nonlocal num_files
        if path.is_dir():
            real = path.resolve()
            if real in above:
                raise RaygardError(
                    f"{path} links back to {real}, which Ray would follow for ever; name it in .rayignore"
                )
            specs = [*specs, *_ignored(path)]
            return sum(visit(child, specs, [*above, real]) for child in path.iterdir() if not _skip(child, specs))
        if not path.is_file():
            return 0
        num_files += 1
        return path.stat().st_size

    # Ray has no public name for what it leaves out; a list of our own would go stale.
    from ray._private.ray_constants import get_runtime_env_default_excludes

    by_default = PathSpec.from_lines("gitignore", get_runtime_env_default_excludes())
    specs = [(folder, by_default), *_ignored(folder)]
    for child in sorted(folder.iterdir()):
        if not _skip(child, specs):
            entries[child.name] = visit(child, specs, [folder.resolve()])
    return Package(num_files, sum(entries.values()), entries)


def require_uploadable(folder: Path) -> Package:
    """`measure_package`, and RaygardError naming the largest entries if Ray would refuse the upload."""
    package = measure_package(folder)
    if package.size_bytes > LIMIT_BYTES:
        raise RaygardError(
            f"the working directory {folder} has {package.size_bytes / MIB:.0f} MiB, Ray uploads at most "
            f"{LIMIT_BYTES / MIB:.0f} (largest: {package.largest}); name in .rayignore what the job does not read"
        )
    return package


def _ignored(folder: Path) -> list[tuple[Path, PathSpec]]:
    found = []
    for name in IGNORE_FILES[os.environ.get(NO_GITIGNORE) == "1" :]:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            found.append((folder, PathSpec.from_lines("gitignore", lines)))
    return found


def _skip(path: Path, specs: Sequence[tuple[Path, PathSpec]]) -> bool:
    return any(spec.match_file(str(path.relative_to(folder))) for folder, spec in specs)
