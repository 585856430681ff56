"""Checkpoints of relearning and mask learning: by tensor name, checked by hash, for any number of workers.

Every rank writes what its shards hold as safetensors into one folder on shared storage, a file for each kind of state
so that it never holds all of it twice, and a manifest last. Nothing in them depends on how the state was divided, so
any number of workers at any ZeRO stage goes on from them: each reads the elements of its own shards. (DeepSpeed's own
checkpoints are tied to the world that wrote them.)
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raygard.bilevel.segments import ShardLayout
from raygard.errors import RaygardError
from raygard.files import scratch, sha256_file, write_text

log = logging.getLogger("raygard")

SHARED = "shared"


def manifest_name(rank: int) -> str:
    return f"manifest-{rank:05d}.json"


def write_manifest(folder: Path, k: int, files: Sequence[Path]) -> None:
    """Say that this rank has finished `k` steps and that `files` are whole."""
    content = {
        "k": k,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "files": {str(file.relative_to(folder)): sha256_file(file) for file in files},
    }
    write_text(folder / manifest_name(dist.get_rank()), json.dumps(content))


def read_manifest(folder: Path, rank: int = 0) -> dict[str, Any]:
    """`k`, `world_size` and hashes, as one of the ranks that wrote the checkpoint left them.

    Raises OSError or ValueError if it is missing or damaged.
    """
    content: dict[str, Any] = json.loads((folder / manifest_name(rank)).read_text(encoding="utf-8"))
    return content


def first_whole(folders: Sequence[Path], device: torch.device | str = "cpu") -> Path | None:
    """The first of these checkpoints that has every file of every rank that wrote it, or None. Collective.

    folders: the same on all ranks. device: where the process group's collectives take tensors.
    """
    for folder in folders:
        trouble = find_damage(folder, dist.get_rank(), dist.get_world_size())
        whole = torch.tensor([trouble is None], dtype=torch.int32, device=device)
        dist.all_reduce(whole, op=dist.ReduceOp.MIN)
        if whole.item():
            return folder
        log.warning(
            "checkpoint %s is not usable (%s); trying the one before it", folder.name, trouble or "another rank"
        )
    return None


def find_damage(folder: Path, part: int, parts: int) -> str | None:
    """Check the files of every `parts`-th rank that wrote the checkpoint; say what is wrong, or None."""
    rank = 0
    try:
        writers = int(read_manifest(folder)["world_size"])
        for rank in range(part, writers, parts):
            for name, digest in read_manifest(folder, rank)["files"].items():
                file = folder / name
                if not file.is_file() or sha256_file(file) != digest:
                    return f"{name} is missing or torn"
    except (OSError, ValueError, KeyError):
        return f"{manifest_name(rank)} is missing or damaged"
    return None


def save_state(
    folder: Path, k: int, layout: ShardLayout, state: Mapping[str, Sequence[Tensor]], shared: Mapping[str, Tensor]
) -> None:
    """Write this rank's part of a checkpoint.

    state: for each kind ("theta", "theta_d", ...) one flat float32 tensor for each shard of `layout`. shared: small
    tensors that are equal on all ranks. Raises RaygardError if the disk is full.
    """
    arrays = {f"{SHARED}:0:{name}": value.detach().cpu().contiguous() for name, value in shared.items()}
    files = [_write(folder, SHARED, arrays)]
    # Where every rank holds everything, one copy is enough.
    if not layout.replicated or dist.get_rank() == 0:
        for kind, shards in state.items():
            pieces = layout.pieces(shards, copy=False)
            files.append(
                _write(folder, kind, {f"{kind}:{start}:{name}": part for name, (start, part) in pieces.items()})
            )
    write_manifest(folder, k, files)


def _write(folder: Path, kind: str, arrays: Mapping[str, Tensor]) -> Path:
    file = folder / f"state-{dist.get_rank():05d}-{kind}.safetensors"
    with scratch(file) as unfinished:
        save_file(dict(arrays), str(unfinished))
    return file


class SavedState:
    """A checkpoint of `save_state`, read piece by piece.

    k: finished steps. world_size: how many workers wrote it. shared: as given to `save_state`.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError, ValueError or SafetensorError if a file is missing or damaged (see `first_whole`)."""
        manifest = read_manifest(folder)
        self.k, self.world_size = int(manifest["k"]), int(manifest["world_size"])
        self.shared: dict[str, Tensor] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._open = contextlib.ExitStack()
        names = [name for rank in range(self.world_size) for name in read_manifest(folder, rank)["files"]]
        for name in names:
            file = self._open.enter_context(safe_open(str(folder / name), framework="pt"))
            for key in file.keys():  # noqa: SIM118  (safetensors' file is no mapping)
                kind, start, name = key.split(":", 2)
                if kind == SHARED:
                    self.shared[name] = file.get_tensor(key)
                    continue
                length = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((kind, name), []).append((int(start), length, file, key))

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def has(self, kind: str) -> bool:
        return any(found == kind for found, _ in self._pieces)

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor `name`: float32 (length,)."""
        out = torch.empty(length)
        missing = length
        for first, count, file, key in self._pieces.get((kind, name), ()):
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
                missing -= high - low
        if missing:
            raise RaygardError(f"the checkpoint lacks {missing} elements of {kind} of '{name}'")
        return out

    def fill(self, kind: str, layout: ShardLayout, shards: Sequence[Tensor]) -> list[Tensor]:
        """For each shard a tensor of its shape and device with its elements of `kind`; padding is zero."""
        filled = []
        for segments, shard in zip(layout.shards, shards, strict=True):
            values = torch.zeros(shard.numel(), dtype=torch.float32, device=shard.device)
            for s in segments:
                part = self.read(kind, layout.names[s.tensor], s.tensor_start, s.length)
                values[s.shard_start : s.shard_start + s.length] = part.to(values.device)
            filled.append(values)
        return filled
