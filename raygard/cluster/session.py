"""Connecting to a Ray cluster, or starting a small one, and refusing what it can never run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygard.config import EngineConfig
from raygard.errors import RaygardError

LOCAL_OBJECT_STORE_BYTES = 256 * 1024 * 1024


@contextmanager
def ray_session(local_cpus: int | None = None) -> Iterator[None]:
    """Use the cluster named by RAY_ADDRESS (set inside `ray job submit`), else a private local one.

    A local cluster started here is shut down on leaving; a cluster that existed before is left alone.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        # With the dashboard off, fewer processes start and nothing listens beyond what Ray itself needs.
        options |= {
            "address": "local",
            "num_cpus": local_cpus or max(2, os.cpu_count() or 2),
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.RaySystemError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise
        raise RaygardError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}); "
            "start it or unset RAY_ADDRESS"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(engine: EngineConfig) -> None:
    """Raise RaygardError, with the arithmetic, if the cluster can never place the workers of one training run."""
    import ray

    have = ray.cluster_resources()
    need = {"CPU": engine.num_workers * engine.cpus_per_worker}
    if engine.use_gpu:
        need["GPU"] = float(engine.num_workers)
    for resource, amount in need.items():
        if amount > have.get(resource, 0.0) + 1e-9:
            each = engine.cpus_per_worker if resource == "CPU" else 1
            raise RaygardError(
                f"{engine.num_workers} workers x {each:g} {resource} = {amount:g} {resource}, but the cluster has "
                f"{have.get(resource, 0.0):g}; lower engine.num_workers or engine.cpus_per_worker, or add nodes"
            )
