"""What a run directory holds so far, read for the report; a stage that has not run is simply absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from raygard.errors import RaygardError
from raygard.files import DAMAGED_ARCHIVE

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class RunFiles:
    """Lazy, read-only view of a run directory: missing files are empty, damaged ones a RaygardError."""

    path: Path

    def _json(self, name: str) -> Any:
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RaygardError(f"cannot read {file}: {error}") from None

    def _history(self, file: Path) -> list[dict[str, Any]]:
        """Records of a history; a step repeated after a resume counts once, a torn last line not at all."""
        if not file.exists():
            return []
        records: dict[tuple[Any, ...], dict[str, Any]] = {}
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
            except ValueError:
                if number == len(lines) - 1:
                    break
                raise RaygardError(f"cannot read {file}: line {number + 1} is damaged") from None
            records[tuple(record.get(key) for key in ("kind", "k", "l", "step"))] = record
        return list(records.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.yaml"
        if not file.exists():
            return {}
        try:
            return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise RaygardError(f"cannot read {file}: {str(error).splitlines()[0]}") from None

    @cached_property
    def run(self) -> dict[str, Any]:
        return self._json("run.json") or {}

    @cached_property
    def outcome(self) -> dict[str, Any] | None:
        return self._json("outcome.json")

    @cached_property
    def mask(self) -> dict[str, Any] | None:
        """Manifest of the released mask; where masks were given to be measured, of the first."""
        return self._json("mask/mask.json") or self._json("evaluation/masks/freeze-0/mask.json")

    @cached_property
    def relearn(self) -> list[dict[str, Any]]:
        return self._history(self.path / "relearn" / "history.jsonl")

    @cached_property
    def learn(self) -> dict[str, list[dict[str, Any]]]:
        """History of mask learning for each seed."""
        folders = sorted((self.path / "learn").glob("seed-*"))
        found = {f.name.removeprefix("seed-"): self._history(f / "history.jsonl") for f in folders}
        return {seed: history for seed, history in found.items() if history}

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        files = sorted((self.path / "evaluation" / "jobs").glob("*/result.json"))
        return [self._json(str(file.relative_to(self.path))) for file in files]

    def pictures(self, job_id: str) -> Pictures | None:
        """Generated pictures of a job, uint8 (n, H, W, 3); None if they are no longer in the store."""
        # Runs of raygard 0.1 kept them beside the result.
        beside = f"evaluation/jobs/{job_id}/pictures.npz"
        result = next((result for result in self.results if result["job_id"] == job_id), {})
        return self._arrays(self.path / result.get("pictures", beside)).get("images")

    @cached_property
    def references(self) -> dict[str, Pictures]:
        """Real pictures of each class, uint8 (n, H, W, 3)."""
        index = self._json("evaluation/references.json") or {"classes": []}
        arrays = self._arrays(self.path / "evaluation" / "references.npz")
        return {name: arrays[str(i)] for i, name in enumerate(index["classes"]) if str(i) in arrays}

    def _arrays(self, file: Path) -> dict[str, Pictures]:
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except DAMAGED_ARCHIVE as error:
            raise RaygardError(f"cannot read {file}: {error}") from None
