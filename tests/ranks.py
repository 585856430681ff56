"""Several processes of one script that wait for each other, as ranks do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(script: Path, world: int, *arguments: object, timeout: float = 600) -> None:
    """Run `script RANK WORLD ARGUMENTS...` once for each rank; an assertion fails with the output of those that do."""
    rest: Sequence[str] = [str(argument) for argument in arguments]
    # A script's own folder is on its path, and the folder of `tests` is not.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), *rest],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(world)
    ]  # fmt: skip
    # The ranks wait for each other, so no pipe may fill while another is read.
    with ThreadPoolExecutor(world) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=timeout)[0], ranks))
    failed = [f"rank {rank}:\n{outputs[rank][-2500:]}" for rank in range(world) if ranks[rank].returncode]
    assert not failed, "\n".join(failed)
