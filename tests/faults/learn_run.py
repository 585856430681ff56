"""A driver of its own: `learn_run.py ROOT OUT [KEY=VALUE]...` learns a mask on the cluster of RAY_ADDRESS.

Its last act is OUT/left.json, what it leaves in the cluster. Its workers can be made slow: see `set_up`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

STEP_S, FILE_S = "RAYGARD_TEST_STEP_S", "RAYGARD_TEST_FILE_S"
LEFT = "left.json"


def set_up() -> None:
    """Run by Ray in every process of the job: until it is resumed each step, and always each file, takes longer."""
    step_s, file_s = (float(os.environ.get(name, 0)) for name in (STEP_S, FILE_S))
    if not step_s and not file_s:
        return
    from raygard.cluster import checkpoint, worker

    def slowed(function, seconds):
        def call(*arguments, **options):
            time.sleep(seconds)
            return function(*arguments, **options)

        return call

    for name in ("save_file", "sha256_file", "write_text", "safe_open"):
        setattr(checkpoint, name, slowed(getattr(checkpoint, name), file_s))

    class SlowHistory(worker.History):
        def __init__(self, path: Path, first_k: int) -> None:
            super().__init__(path, first_k)
            if first_k == 0:
                self.write = slowed(self.write, step_s)

    worker.History = SlowHistory


def main(root: Path, out: Path, overrides: list[str]) -> None:
    import ray

    from raygard.cluster.training import learn
    from raygard.errors import RaygardError
    from tests.ray_fixtures import Setting

    variables = {name: os.environ[name] for name in (STEP_S, FILE_S, "PYTHONPATH") if name in os.environ}
    ray.init(
        log_to_driver=True,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": "tests.faults.learn_run.set_up", "env_vars": variables},
    )
    setting = Setting(root, next((root / "cache").iterdir()), root / "relearned.safetensors")
    try:
        learn(setting.config(*overrides), setting.cache, setting.relearned, 0, out)
    except RaygardError as error:
        sys.exit(f"learn_run: {error}")
    (out / LEFT).write_text(json.dumps(groups_left()), encoding="utf-8")


def groups_left(timeout_s: float = 60) -> list[str]:
    """States of the placement groups that are still there after a while: Ray removes them without anyone waiting."""
    from ray.util import placement_group_table

    ends = time.monotonic() + timeout_s
    while True:
        states = [group["state"] for group in placement_group_table().values()]
        left = [state for state in states if state != "REMOVED"]
        if not left or time.monotonic() > ends:
            return left
        time.sleep(0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
