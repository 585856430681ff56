"""Runs an evaluation whose scorer chokes on some items; writes results and status to ROOT/output.json.

The scorer is registered in every process of the cluster by Ray's own worker_process_setup_hook.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np

from raygard.scoring import register

GREYS = {"c": 200, "d": 100}
LOG = "RAYGARD_TEST_LOG"


class Poisoned:
    """Mean colour. Raises on class c; kills its process on the last picture of class d, which is alone in its item."""

    name = "poisoned"
    direction: Literal["distance", "similarity"] = "distance"
    unit = source = licence = "none"

    def embed(self, images: np.ndarray) -> np.ndarray:
        return images.mean(axis=(1, 2)).astype(np.float32)

    def distances(self, generated: np.ndarray, references: np.ndarray) -> np.ndarray:
        grey = int(references[0, 0]) if (references == references[0, 0]).all() else None
        with open(os.environ[LOG], "a") as log:
            log.write(json.dumps([time.time(), grey, len(generated)]) + "\n")
        if grey == GREYS["c"]:
            raise ZeroDivisionError("cannot stand class c")
        if grey == GREYS["d"] and len(generated) == 1:
            os._exit(1)
        return np.abs(generated - references.mean(axis=0)).mean(axis=1) / 255


def set_up() -> None:
    register(Poisoned.name, Poisoned)


def main(root: Path) -> None:
    import ray

    from raygard.cluster.evaluation import EvaluationPool, run_jobs
    from tests.evaluation_bench import Bench

    environment = {"worker_process_setup_hook": "tests.faults.poison_run.set_up", "env_vars": {LOG: os.environ[LOG]}}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2**28,
        runtime_env=environment,
    )
    bench = Bench(root)
    config = bench.config("evaluation.scorer=poisoned")
    jobs = bench.jobs("base")
    with EvaluationPool.start(config) as pool:
        results = run_jobs(jobs, bench.inputs(config, root / "poisoned"), pool)
        (root / "output.json").write_text(json.dumps({"results": results, "status": pool.status()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
