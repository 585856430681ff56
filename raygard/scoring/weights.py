"""Where published weights lie that no package brings: a folder named by RAYGARD_WEIGHTS, else the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raygard.errors import RaygardError

FOLDER = "RAYGARD_WEIGHTS"


def weights_file(scorer: str, name: str, repository: str | None = None) -> Path:
    """The file `name` in the folder RAYGARD_WEIGHTS, else of the hub's `repository`.

    Raises RaygardError saying where to put the file.
    """
    file = _given(name)
    if file is not None and file.is_file():
        return file
    if repository is not None:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(repository, name))
        except (OSError, ValueError, RuntimeError):
            raise _missing(scorer, name, f", or let the hub be reached ({repository})") from None
    raise _missing(scorer, name)


def pretrained(scorer: str, load: Callable[[str], Any], repository: str) -> Any:
    """`load` of the folder RAYGARD_WEIGHTS/<last part of repository>, else of the hub's `repository`.

    Raises RaygardError saying where to put the folder.
    """
    name = repository.rsplit("/", 1)[-1]
    folder = _given(name)
    local = folder is not None and folder.is_dir()
    try:
        return load(str(folder) if local else repository)
    except (OSError, ValueError, RuntimeError) as error:
        if local:
            raise RaygardError(f"scorer {scorer}: cannot load {folder}: {str(error).splitlines()[0]}") from None
        raise _missing(scorer, f"{name}/", f", or let the hub be reached ({repository})") from None


def _given(name: str) -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder).expanduser() / name if folder else None


def _missing(scorer: str, name: str, otherwise: str = "") -> RaygardError:
    set_to = os.environ.get(FOLDER)
    place = f"{FOLDER} (now {set_to})" if set_to else f"a folder and set {FOLDER} to it"
    return RaygardError(f"scorer {scorer} has no weights: put {name} into {place}{otherwise}")
