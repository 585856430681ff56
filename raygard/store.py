"""What evaluation has computed, on disk and keyed by content, so that nothing is computed twice.

    <root>/<key>/inputs.json           what the key was made from
    <root>/<key>/adapted.json          losses and counts of an adaptation, hash of the tensors it wrote
    <root>/<key>/adapted.safetensors   tensors it changed; removed once the job is measured
    <root>/<key>/adapting.pt           an adaptation that has paused; removed once it has ended
    <root>/<key>/pictures.npz          images, uint8 (n, H, W, 3)
    <root>/<key>/score-<scorer>.json   how far those pictures are from the references
    <root>/<key>/base-loss.json        held-out loss of a release on general classes

A file appears whole or not at all. Writers that race write the same content, so the last one may win.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raygard.files import SCRATCH, read_array, readable_disk_errors, scratch, sha256_file, write_text

INPUTS, RECORD, TENSORS, PICTURES = "inputs.json", "adapted.json", "adapted.safetensors", "pictures.npz"
BASE_LOSS, PAUSED = "base-loss.json", "adapting.pt"
STALE_S = 86400.0
# 160 bits are beyond accident and keep paths short.
KEY_LENGTH = 40


def content_key(inputs: Mapping[str, Any]) -> str:
    """Name of what JSON-able `inputs` decide: equal for equal values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True)
class Store:
    """A folder of results by key, on storage that every node can reach."""

    root: Path

    def folder(self, key: str) -> Path:
        return self.root / key

    def describe(self, key: str, inputs: Mapping[str, Any]) -> None:
        """Write down what `key` stands for, once."""
        if not (self.folder(key) / INPUTS).exists():
            self._write_json(key, INPUTS, inputs)

    def adapted(self, key: str) -> dict[str, Any] | None:
        """Record of the adaptation; None if it has not ended."""
        return self._read_json(key, RECORD)

    def tensors_file(self, key: str) -> Path:
        return self.folder(key) / TENSORS

    def has_tensors(self, key: str) -> bool:
        """Whether the adapted tensors are there and are those of the record."""
        record = self.adapted(key)
        if record is None:
            return False
        try:
            return sha256_file(self.tensors_file(key)) == record["tensors_sha256"]
        except (OSError, KeyError):
            return False

    def write_adapted(self, key: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the tensors, if any, and then the record, with their hash.

        Raises RaygardError for a full disk or a folder that cannot be written.
        """
        from safetensors.torch import save_file

        digest = None
        if tensors is not None:
            with scratch(self.tensors_file(key)) as file:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(file))
                digest = sha256_file(file)
        self._write_json(key, RECORD, {**record, "tensors_sha256": digest})

    def drop_tensors(self, key: str) -> None:
        """Remove the adapted tensors, the only large file. Raises RaygardError if the folder cannot be written."""
        with readable_disk_errors(self.folder(key)):
            self.tensors_file(key).unlink(missing_ok=True)

    def paused(self, key: str) -> dict[str, Any] | None:
        """An adaptation that has paused; None if there is none, or it cannot be read."""
        try:
            found = torch.load(self.folder(key) / PAUSED, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
            return None
        return found if isinstance(found, dict) else None

    def write_paused(self, key: str, state: Mapping[str, Any]) -> None:
        """state: tensors, numbers, strings, lists and dictionaries. Raises RaygardError for a full disk."""
        with scratch(self.folder(key) / PAUSED) as file:
            torch.save(dict(state), file)

    def drop_paused(self, key: str | None = None) -> None:
        """Remove what has paused under `key`, or all there is: nothing will go on from it."""
        for folder in [self.folder(key)] if key else self.root.glob("*"):
            (folder / PAUSED).unlink(missing_ok=True)

    def pictures_file(self, key: str) -> Path:
        return self.folder(key) / PICTURES

    def has_pictures(self, key: str) -> bool:
        return self.pictures_file(key).is_file()

    def write_pictures(self, key: str, images: NDArray[np.uint8]) -> None:
        """images: uint8 (n, H, W, 3), all of the job. Raises RaygardError for a full disk."""
        with scratch(self.pictures_file(key)) as file, file.open("wb") as stream:
            np.savez_compressed(stream, images=images)

    def score(self, key: str, scorer: str, references: str) -> dict[str, Any] | None:
        """Record of the scorer for pictures compared with these references; None if there is none.

        references: hash of the reference pictures.
        """
        record = self._read_json(key, f"score-{scorer}.json")
        return record if record is not None and record.get("references") == references else None

    def write_score(self, key: str, scorer: str, record: Mapping[str, Any]) -> None:
        """record: `references` (hash of the reference pictures), `distances` and whatever else is worth keeping."""
        self._write_json(key, f"score-{scorer}.json", record)

    def base_loss(self, key: str) -> float | None:
        """Held-out loss of a release; None if it is not known."""
        record = self._read_json(key, BASE_LOSS)
        return record.get("loss") if record is not None else None

    def write_base_loss(self, key: str, loss: float) -> None:
        self._write_json(key, BASE_LOSS, {"loss": loss})

    def sweep(self, older_than_s: float = STALE_S) -> None:
        """Remove what processes that died have left: half-written files, and tensors nobody came to draw with.

        older_than_s: seconds since they were written; younger ones may be in use, or save a resumed run an adaptation.
        """
        limit = time.time() - older_than_s
        with readable_disk_errors(self.root):
            for file in (
                *self.root.glob(f"*/.*{SCRATCH}"),
                *self.root.glob(f"*/{TENSORS}"),
                *self.root.glob(f"*/{PAUSED}"),
            ):
                if file.exists() and file.stat().st_mtime < limit:
                    file.unlink(missing_ok=True)

    def _read_json(self, key: str, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder(key) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write_json(self, key: str, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.folder(key) / name, json.dumps(content, indent=1) + "\n")


def read_pictures(path: str | Path) -> NDArray[np.uint8]:
    """Pictures of a job, uint8 (n, H, W, 3). Raises RaygardError if the file is missing or damaged."""
    return read_array(Path(path), "images")
