"""JSON Schemas of the files raygard exchanges, generated from the typed models that write them.

`python -m raygard.schemas` rewrites the shipped files after a model has changed; a test keeps both equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raygard.errors import RaygardError, nearest

FOLDER = Path(__file__).parent
NAMES = ("mask", "outcome", "choice")


def generate() -> dict[str, dict[str, Any]]:
    """JSON Schema (draft 2020-12) of every exchanged file, by name."""
    from raygard.mask.manifest import Manifest
    from raygard.schemas.choice import Choice
    from raygard.schemas.outcome import Outcome

    models: dict[str, type[BaseModel]] = {"mask": Manifest, "outcome": Outcome, "choice": Choice}
    return {name: model.model_json_schema() for name, model in models.items()}


def load(name: str) -> dict[str, Any]:
    """The shipped schema `mask`, `outcome` or `choice`. Raises RaygardError for another name."""
    if name not in NAMES:
        raise RaygardError(f"no schema '{name}'{nearest(name, NAMES)}")
    return json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all schemas to `folder`; returns the files written."""
    paths = []
    for name, schema in generate().items():
        path = folder / f"{name}.schema.json"
        path.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
