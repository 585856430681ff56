"""MLflow runs, and the only module that knows MLflow.

A tracking server that dies or cannot be reached never stops a run: the first failure gives one warning, and
from then on every record is appended to `tracking_spool.jsonl` in the run directory. `sync(run_dir)` replays
it later; replaying twice changes nothing. Run ids live in `tracking.json`, so that a resumed run continues
its MLflow runs. Secrets in a tracking URI are used, but never written, logged or sent as a parameter.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import raygard
from raygard.config import TrackingConfig
from raygard.errors import RaygardError
from raygard.files import readable_disk_errors
from raygard.pictures import SUFFIXES
from raygard.redaction import redact, without_credentials
from raygard.tracking_store import run_address

STATE, SPOOL, DATABASE, ARTIFACTS = "tracking.json", "tracking_spool.jsonl", "mlflow.db", "mlartifacts"
DOMAIN_TAG, MASK_TAG, GIT_TAG, PARENT_TAG = (
    "raygard.domain",
    "raygard.mask_sha256",
    "git.sha",
    "mlflow.parentRunId",
)
# Limits of MLflow's REST interface; a longer value would be refused by a server.
MAX_KEY, MAX_VALUE, MAX_BATCH = 250, 500, 100
PICTURE_SUFFIXES = SUFFIXES | {".npz", ".html"}
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
# A record the server understood and refuses would be refused for ever; everything else may pass later.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}

log = logging.getLogger(__name__)


def git_sha() -> str | None:
    """Commit of the checkout this package is part of; None if it is installed or git is missing."""
    folder = Path(raygard.__file__).parent
    try:
        for command in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=5, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _write_json(path: Path, value: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
    os.replace(temporary, path)


class _State:
    """tracking.json: what every run is called, and for each store its ids and how far the spool was replayed."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STATE
        self.data: dict[str, Any] = {"uri": None, "experiment": None, "runs": {}, "stores": {}}
        if self.path.exists():
            try:
                self.data.update(json.loads(self.path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise RaygardError(f"cannot read {self.path}: {error}; delete it to start new MLflow runs") from None

    def save(self) -> None:
        _write_json(self.path, self.data)


class _Store:
    """One MLflow store; applies records and knows the ids of the runs in it."""

    def __init__(self, run_dir: Path, uri: str | None, experiment: str, state: _State) -> None:
        os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow import MlflowClient

        self.run_dir, self.experiment, self.state = run_dir, experiment, state
        self.artifacts = _artifacts(run_dir, uri)
        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{run_dir / DATABASE}")
        self.known = state.data["stores"].setdefault(redact(uri or "run directory"), {"id": None, "ids": {}})
        self.known.setdefault("replayed", 0)
        self._continued = set(self.known["ids"].values())
        self._points: dict[tuple[str, str], set[tuple[int, float]]] = {}

    def experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        if self.known["id"] is None:
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                try:
                    self.known["id"] = self.client.create_experiment(self.experiment, self.artifacts)
                except MlflowException as error:
                    found = self.client.get_experiment_by_name(self.experiment)
                    if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                        raise
            self.known["id"] = found.experiment_id if found else self.known["id"]
            self.state.save()
        return str(self.known["id"])

    def run_id(self, key: str) -> str:
        """Id of the run `key` in this store; it and its parents are created if it has none."""
        if key not in self.known["ids"]:
            run = self.state.data["runs"][key]
            tags = dict(run["tags"])
            if run["parent"] is not None:
                tags[PARENT_TAG] = self.run_id(run["parent"])
            created = self.client.create_run(
                self.experiment_id(), start_time=run["start_time"], tags=tags, run_name=run["name"]
            )
            self.known["ids"][key] = created.info.run_id
            self.state.save()
        return str(self.known["ids"][key])

    def apply(self, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        kind, run_id = record["op"], self.run_id(record["run"])
        if kind == "start":
            self.client.update_run(run_id, status="RUNNING")
        elif kind == "params":
            for items in _batches(record["values"].items()):
                self.client.log_batch(run_id, params=[Param(k, v) for k, v in items])
        elif kind == "metrics":
            new = [(k, v) for k, v in record["values"].items() if self._is_new(run_id, k, record["step"], v)]
            for items in _batches(new):
                metrics = [Metric(k, v, record["time"], record["step"]) for k, v in items]
                self.client.log_batch(run_id, metrics=metrics)
        elif kind == "tags":
            for items in _batches(record["values"].items()):
                self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in items])
        elif kind == "artifact":
            path = self.run_dir / record["path"]
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), record["folder"])
            elif path.exists():
                self.client.log_artifact(run_id, str(path), record["folder"])
            else:
                log.warning("artifact %s is gone, it is not tracked", path)
        elif kind == "register":
            self._register(run_id, record)
        elif kind == "finish":
            self.client.set_terminated(run_id, record["status"], record["time"])

    def _is_new(self, run_id: str, name: str, step: int, value: float) -> bool:
        """Whether the run has no such point yet: MLflow would keep one that a resumed run logs again twice."""
        if (run_id, name) not in self._points:
            history = self.client.get_metric_history(run_id, name) if run_id in self._continued else ()
            self._points[run_id, name] = {(metric.step, metric.value) for metric in history}
        known = self._points[run_id, name]
        if (step, value) in known:
            return False
        known.add((step, value))
        return True

    def _register(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        name, sha = record["name"], record["tags"][MASK_TAG]
        try:
            self.client.create_registered_model(name, description="Freeze masks learned by raygard (not a flavour).")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [v for v in self.client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
        if not any(version.tags.get(MASK_TAG) == sha for version in known):
            source = f"{self.client.get_run(run_id).info.artifact_uri}/{record['folder']}"
            self.client.create_model_version(name, source, run_id, tags=record["tags"])


def _artifacts(run_dir: Path, uri: str | None) -> str | None:
    """Where a new experiment keeps its artifacts: a server decides itself; MLflow would take the working directory."""
    if uri is None:
        return (run_dir / ARTIFACTS).as_uri()
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    return (Path(make_url(uri).database or run_dir / DATABASE).resolve().parent / ARTIFACTS).as_uri()


def _batches(items: Any) -> Iterator[Sequence[tuple[str, Any]]]:
    rows = list(items)
    for start in range(0, len(rows), MAX_BATCH):
        yield rows[start : start + MAX_BATCH]


def _failures() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _refused(error: Exception, record: Mapping[str, Any]) -> bool:
    return record["op"] != "start" and getattr(error, "error_code", None) in REFUSALS


@dataclass(frozen=True)
class RunHandle:
    """One MLflow run. Every method returns at once if tracking is disabled or its server is gone."""

    tracker: Tracker
    key: str

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a flat mapping; keys are cut at 250 and values at 500 characters, secrets are taken out."""
        cut = {redact(k)[:MAX_KEY]: redact(v)[:MAX_VALUE] for k, v in values.items()}
        self.tracker._submit({"op": "params", "run": self.key, "values": cut})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at one step; NaN and infinity are dropped, with one warning for the whole run."""
        finite = {str(k)[:MAX_KEY]: float(v) for k, v in values.items() if math.isfinite(v)}
        if len(finite) < len(values):
            self.tracker._warn_dropped(sorted(set(map(str, values)) - set(finite)), step)
        if finite:
            record = {"op": "metrics", "run": self.key, "values": finite, "step": int(step)}
            self.tracker._submit({**record, "time": _now()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, e.g. raygard.domain and raygard.mask_sha256."""
        cut = {redact(k)[:MAX_KEY]: redact(v)[:MAX_VALUE] for k, v in values.items()}
        self.tracker._submit({"op": "tags", "run": self.key, "values": cut})

    def artifact(self, path: Path, folder: str | None = None, *, pictures: bool | None = None) -> None:
        """Upload a file, or a folder's content, into the run's artifact folder `folder`.

        pictures: whether it shows pictures of the domain (`tracking.log_images=false` and `domain.sensitive` keep those
        back); None decides by file type (images, npz and html do), so a plot says False.
        Raises RaygardError if `path` does not exist or `folder` is absolute or holds `..`.
        """
        if folder is not None and (PurePosixPath(folder).is_absolute() or re.search(r"(^|[/\\])\.\.([/\\]|$)", folder)):
            raise RaygardError(f"artifact folder '{folder}' must be relative and must not contain '..'")
        path = Path(path).resolve()
        if not path.exists():
            raise RaygardError(f"artifact {path} does not exist")
        if not self.tracker.log_images and (_shows_pictures(path) if pictures is None else pictures):
            return
        root = self.tracker.run_dir
        stored = path.relative_to(root) if path.is_relative_to(root) else path
        self.tracker._submit({"op": "artifact", "run": self.key, "path": str(stored), "folder": folder})

    def register(self, name: str, folder: str, tags: Mapping[str, Any]) -> None:
        """Register the run's artifact folder `folder`, a mask, as a version of the registered model `name`.

        tags must hold raygard.mask_sha256; registering the same mask of the same run again changes nothing.
        """
        values = {str(k)[:MAX_KEY]: redact(v)[:MAX_VALUE] for k, v in tags.items()}
        self.tracker._submit({"op": "register", "run": self.key, "name": name, "folder": folder, "tags": values})

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise RaygardError(f"run status '{status}' must be FINISHED, FAILED or KILLED")
        self.tracker._submit({"op": "finish", "run": self.key, "status": status, "time": _now()})

    @property
    def address(self) -> str | None:
        """Where to look at the run; None if tracking is disabled or its server is gone."""
        return self.tracker._address(self.key)

    def __enter__(self) -> RunHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")


def _shows_pictures(path: Path) -> bool:
    files = path.rglob("*") if path.is_dir() else [path]
    return any(file.suffix.lower() in PICTURE_SUFFIXES for file in files)


def _now() -> int:
    return int(time.time() * 1000)


class Tracker:
    """Connection of one raygard run to its MLflow store. Open it once, in the driver."""

    def __init__(self, run_dir: Path, run_name: str, *, enabled: bool = True, log_images: bool = True) -> None:
        self.run_dir, self.run_name = run_dir, run_name
        self.enabled, self.log_images = enabled, log_images
        self._store: _Store | None = None
        self._state: _State | None = None
        self._tags: dict[str, str] = {}
        self._warned = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, config: TrackingConfig, run_dir: Path, run_name: str, *, sensitive: bool = False) -> Tracker:
        """Connect to the store; create the experiment; replay what an earlier attempt had to spool.

        sensitive: no picture of the domain may be sent, whatever `config.log_images` says.
        Never raises for a store that cannot be reached: records are then spooled. `config.enabled=False`
        gives a tracker that does nothing.
        """
        run_dir = Path(run_dir).resolve()
        tracker = cls(run_dir, run_name, enabled=config.enabled, log_images=config.log_images and not sensitive)
        if not config.enabled:
            return tracker
        run_dir.mkdir(parents=True, exist_ok=True)
        tracker._state = state = _State(run_dir)
        state.data.update(
            uri=config.tracking_uri and without_credentials(config.tracking_uri), experiment=config.experiment
        )
        state.save()
        sha = git_sha()
        tracker._tags = {"raygard.version": raygard.__version__, **({GIT_TAG: sha} if sha else {})}
        try:
            store = _Store(run_dir, config.tracking_uri, config.experiment, state)
            store.experiment_id()
            _replay(store)
        except _failures() as error:
            tracker._give_up(error)
        else:
            tracker._store = store
        return tracker

    def start(
        self, name: str | None = None, parent: RunHandle | None = None, tags: Mapping[str, str] | None = None
    ) -> RunHandle:
        """Start a run, or continue the run of this name and parent that an earlier attempt started.

        name: default is the tracker's run name. A run with a parent is nested under it in MLflow.
        """
        name = redact(name or self.run_name)
        key = f"{parent.key}/{name}" if parent else name
        if self._state is not None:
            with self._lock:
                self._state.data["runs"].setdefault(
                    key,
                    {
                        "name": name[:MAX_KEY],
                        "parent": parent.key if parent else None,
                        "tags": {k: redact(v)[:MAX_VALUE] for k, v in {**self._tags, **(tags or {})}.items()},
                        "start_time": _now(),
                    },
                )
                self._state.save()
        self._submit({"op": "start", "run": key})
        return RunHandle(self, key)

    @property
    def connected(self) -> bool:
        """False if tracking is disabled, or its store failed and records are spooled."""
        return self._store is not None

    def _address(self, key: str) -> str | None:
        if self._store is None or self._state is None:
            return None
        run_id, experiment_id = self._store.run_id(key), self._store.experiment_id()
        return run_address(self._state.data["uri"], self.run_dir / DATABASE, experiment_id, run_id)

    def _submit(self, record: dict[str, Any]) -> None:
        if not self.enabled:
            return
        with self._lock:
            if self._store is not None:
                try:
                    self._store.apply(record)
                    return
                except _failures() as error:
                    if _refused(error, record):
                        log.warning("MLflow refused %s of '%s': %s", record["op"], record["run"], _first_line(error))
                        return
                    self._give_up(error)
            _append(self.run_dir / SPOOL, record)

    def _give_up(self, error: Exception) -> None:
        self._store = None
        log.warning(
            "MLflow tracking failed, the run goes on and records are kept in %s (%s)",
            self.run_dir / SPOOL,
            _first_line(error),
        )

    def _warn_dropped(self, names: list[str], step: int) -> None:
        if self.enabled and not self._warned:
            self._warned = True
            log.warning("metrics that are not finite are not tracked, first at step %d: %s", step, ", ".join(names))


JOB_PARAMS = ("class", "role", "defence", "adaptation", "scorer", "draw", "mask_seed", "seed", "mask_sha256")
JOB_METRICS = ("distance", "freeze_ratio", "param_share", "trainable_params", "optimizer_bytes")


def track_job(tracker: Tracker, parent: RunHandle, result: Mapping[str, Any]) -> None:
    """One adaptation, as a run nested under `parent`. result: the content of its result.json."""
    losses = result["losses"]
    with tracker.start(result["job_id"], parent=parent) as run:
        run.params({key: result[key] for key in JOB_PARAMS})
        for step, value in enumerate(losses):
            if step % 10 == 0 or step == len(losses) - 1:
                run.metrics({"loss": value}, step=step)
        for step, value in result.get("milestones") or ():
            run.metrics({"held_out_loss": value}, step=step)
        seconds = {f"{name}_seconds": value for name, value in result["seconds"].items()}
        run.metrics({**{key: result[key] for key in JOB_METRICS}, **seconds}, step=len(losses))


def _first_line(error: Exception) -> str:
    return redact(str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]


def _append(path: Path, record: Mapping[str, Any]) -> None:
    # One write on an O_APPEND descriptor: lines of several writers do not mix.
    with readable_disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(record) + "\n").encode())
        finally:
            os.close(handle)


def _replay(store: _Store) -> int:
    """Apply what the spool holds beyond this store's last replay; remember every line that is dealt with."""
    spool, state = store.run_dir / SPOOL, store.state
    if not spool.exists():
        return 0
    lines = [line for line in spool.read_text(encoding="utf-8").split("\n")[:-1]]
    done = 0
    try:
        for line in lines[store.known["replayed"] :]:
            try:
                record = json.loads(line)
            except ValueError:
                log.warning("line %d of %s is torn and is left out", store.known["replayed"] + done + 1, spool)
                done += 1
                continue
            try:
                store.apply(record)
            except _failures() as error:
                if not _refused(error, record):
                    raise
                log.warning("MLflow refused %s of '%s': %s", record["op"], record["run"], _first_line(error))
            done += 1
    finally:
        store.known["replayed"] += done
        state.save()
    return done


def sync(run_dir: Path, tracking_uri: str | None = None) -> int:
    """Replay the spool of a run into its MLflow store; return the number of records sent. Idempotent.

    tracking_uri: default is the run's own. MLflow reads credentials from MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD. Another store gets the runs anew, with what the spool holds.
    Raises RaygardError if `run_dir` was never tracked, or the store cannot be reached; what has arrived by
    then is not sent again.
    """
    run_dir = Path(run_dir).resolve()
    if not (run_dir / STATE).exists():
        raise RaygardError(f"{run_dir} holds no {STATE}: nothing was tracked there")
    state = _State(run_dir)
    uri = tracking_uri or state.data["uri"]
    try:
        return _replay(_Store(run_dir, uri, state.data["experiment"], state))
    except _failures() as error:
        raise RaygardError(f"MLflow store {redact(uri or DATABASE)} failed: {_first_line(error)}") from None
