"""Connecting to a Ray cluster, or starting a small one, and refusing what it can never run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raygard.cluster.address import TOKEN_HELP, is_dashboard, refused_token, require_answer
from raygard.config import EngineConfig
from raygard.errors import RaygardError

LOCAL_OBJECT_STORE_BYTES = 256 * 1024 * 1024
STARTUP_CONCURRENCY = 8
IDLE_WORKER_MS = 60_000
LOOPBACK = "127.0.0.1"


@contextmanager
def ray_session(local_cpus: int | None = None, *, state_api: bool = False) -> Iterator[None]:
    """Use the cluster named by RAY_ADDRESS (set inside `ray job submit`), else a private local one.

    state_api: start the dashboard of a local cluster (on loopback); Ray's state API is served by it.
    A local cluster started here is shut down on leaving; a cluster that existed before is left alone.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        if is_dashboard(address):
            raise RaygardError(
                f"RAY_ADDRESS={address} is a dashboard: from outside a cluster, run `raygard submit -- python "
                "jobs/...`; to run on this machine alone, unset RAY_ADDRESS"
            )
        if address not in ("auto", "local"):
            require_answer(address)
        options["runtime_env"] = {"env_vars": {"RAY_ADDRESS": address}}
        variables = {}
    else:
        port = _free_port()
        variables = {
            "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{port}",
            # No cloud takes this machine back, and the process that would watch for it starts with every training run.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }
        # With the dashboard off, fewer processes start and nothing listens beyond what Ray itself needs.
        options |= {
            "address": "local",
            "num_cpus": local_cpus or max(2, os.cpu_count() or 2),
            "include_dashboard": state_api,
            "dashboard_host": LOOPBACK,
            "dashboard_port": port,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            # A search starts many small processes: Ray warns of each batch beyond the first number, and ends a process
            # that idles for a second when there are more than CPUs, though the next user would need it again.
            "_system_config": {
                "worker_maximum_startup_concurrency": STARTUP_CONCURRENCY,
                "idle_worker_killing_time_threshold_ms": IDLE_WORKER_MS,
            },
        }
    try:
        # Ray Train asks the state API, from worker processes, whether a run still lives. Unless these know their own
        # cluster's address, they ask whichever cluster of the machine is newest, and free the wrong things or nothing.
        with environment(variables):
            ray.init(**options)
    except ray.exceptions.AuthenticationError:
        raise refused_token(address or "this machine") from None
    except (ConnectionError, ray.exceptions.RaySystemError, RuntimeError) as error:
        if not address:
            raise
        # Ray says the same of a wrong token and of what is no Ray head at all.
        raise RaygardError(
            f"what listens at RAY_ADDRESS={address} does not let this process in ({str(error).splitlines()[0]}): "
            f"another token, another Ray version, or no Ray head; {TOKEN_HELP}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def require_state_api() -> None:
    """Raise RaygardError if the cluster's state API does not answer.

    Ray Train learns through it that a stopped trial's controller is gone, and only then frees the trial's workers:
    without it a search that stops a trial would wait for ever.
    """
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # Without the address Ray would look for any cluster on this machine, and refuse if there are two.
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except (RayStateApiException, OSError) as error:
        raise RaygardError(
            f"the cluster's state API does not answer ({str(error).splitlines()[0][:120]}); a search needs it: start "
            "the head with --include-dashboard=true and install ray[default]"
        ) from None


def node_resources() -> list[dict[str, float]]:
    """Total resources of every node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_resources(engine: EngineConfig) -> None:
    """`workers_fit` on the cluster that this process is connected to."""
    workers_fit(engine, node_resources())


def workers_fit(engine: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """The arithmetic of one training run's workers on nodes with these total resources.

    Raises RaygardError, with the arithmetic, if the nodes can never hold them.
    """
    count = engine.fewest_workers
    setting = "engine.num_workers" if engine.min_workers is None else "engine.min_workers"
    needs = {"CPU": engine.cpus_per_worker, "GPU": 1.0 if engine.use_gpu else 0.0}
    said = []
    for resource, each in needs.items():
        have = [node.get(resource, 0.0) for node in nodes]
        amount, total, largest = count * each, sum(have), max(have, default=0.0)
        if amount > total + 1e-9:
            raise RaygardError(
                f"{count} workers x {each:g} {resource} = {amount:g} {resource}, but the cluster has "
                f"{total:g}; lower {setting} or engine.cpus_per_worker, or add nodes"
            )
        if each > largest + 1e-9:
            raise RaygardError(
                f"one worker needs {each:g} {resource}, but the largest node has {largest:g}; lower "
                "engine.cpus_per_worker, or add a larger node"
            )
        if each:
            said.append(f"{count} workers x {each:g} {resource} = {amount:g} of {total:g}")
    # A worker cannot be split: what is left over on each node adds up to nothing.
    places = sum(int(min(node.get(name, 0.0) / each for name, each in needs.items() if each) + 1e-9) for node in nodes)
    if places < count:
        one = " and ".join(f"{each:g} {name}" for name, each in needs.items() if each)
        raise RaygardError(
            f"{count} workers of {one} each, but the nodes have room for {places} (a worker cannot be split over "
            f"nodes); lower {setting} or engine.cpus_per_worker, or add nodes"
        )
    return ", ".join(said)
