"""Driver side of relearning and mask learning: one Ray Train run each."""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from raygard.bilevel.segments import assemble
from raygard.cluster.errors import user_mistake
from raygard.cluster.session import require_resources
from raygard.cluster.worker import LOGITS, PARTS, RUN_NAME, STORAGE, save_tensors, train_worker
from raygard.config import EngineConfig, RunConfig
from raygard.errors import RaygardError
from raygard.files import require_own

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

OnRow = Callable[[dict[str, Any]], None]
# How often a run looks whether the cluster still has room for its workers.
ROOM_POLL_S = 2.0


def relearn(config: RunConfig, cache: Path, out: Path, *, on_row: OnRow | None = None) -> Path:
    """Fine-tune the base on illegal and legal pictures; return the file of theta_ft (float32, by name).

    Runs `config.engine` workers in Ray Train; resumes a run that was cut off in the same folder, and trains nothing
    where it had come to its end.
    """
    target = out / "relearned.safetensors"
    if not target.exists():
        job = {"stage": "relearn", "cache": str(cache), "out": str(out), "mask_seed": 0}
        fit(config, train_worker, job, out, on_row)
        save_tensors(_joined(config, out / PARTS), target)
    for folder in (PARTS, STORAGE):
        shutil.rmtree(out / folder, ignore_errors=True)
    return target


def _joined(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """Whole tensors from the parts that the workers left in `folder`."""
    from raygard.diffusion.model import load_denoiser

    shapes = {name: tuple(p.shape) for name, p in load_denoiser(config.model).named_parameters()}
    parts: list[dict[str, tuple[int, Tensor]]] = []
    for file in sorted(folder.glob("rank-*.safetensors")):
        pieces = {}
        for key, values in load_file(str(file)).items():
            start, name = key.split(":", 1)
            pieces[name] = (int(start), values)
        parts.append(pieces)
    return assemble(parts, shapes)


def learn(
    config: RunConfig,
    cache: Path,
    relearned: Path,
    mask_seed: int,
    out: Path,
    *,
    on_row: OnRow | None = None,
    callbacks: Sequence[Any] = (),
) -> tuple[Tensor, Tensor]:
    """Learn mask logits (Algorithm 1); return logits and soft mask, float64 (N,).

    Resumes as `relearn` does. callbacks: Ray Train user callbacks, e.g. Tune's `TuneReportCallback` inside a trial.
    """
    job = {
        "stage": "learn",
        "cache": str(cache),
        "relearned": str(relearned),
        "out": str(out),
        "mask_seed": mask_seed,
    }
    if not (out / LOGITS).exists():
        fit(config, train_worker, job, out, on_row, callbacks)
    arrays = load_file(str(out / LOGITS))
    shutil.rmtree(out / STORAGE, ignore_errors=True)
    if not torch.isfinite(arrays["logits"]).all():
        raise RaygardError("the mask's logits are not finite; lower mask.mask_lr")
    return arrays["logits"], arrays["soft"]


def fit(
    config: RunConfig,
    worker: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    out: Path,
    on_row: OnRow | None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `worker` with `job` and the configuration on `config.engine`'s workers, resuming what lies in `out`.

    Raises RaygardError for a user's mistake inside a worker, which is not tried again, for a cluster that can never
    hold the workers, and if what lies in `out` belongs to another user.
    """
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    require_resources(config.engine)
    engine = config.engine
    fewest, most = engine.fewest_workers, engine.num_workers
    out.mkdir(parents=True, exist_ok=True)
    require_own(out, whole=True)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump(mode="json"), **job},
        torch_config=TorchConfig(backend="nccl" if engine.use_gpu else "gloo", timeout_s=int(engine.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=engine.use_gpu,
            resources_per_worker={"CPU": engine.cpus_per_worker, **({"GPU": 1} if engine.use_gpu else {})},
        ),
        run_config=TrainRunConfig(
            name=RUN_NAME,
            storage_path=str((out / STORAGE).resolve()),
            failure_config=FailureConfig(max_failures=engine.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=engine.checkpoints_total_limit),
            callbacks=[*callbacks, end_on_mistake()],
        ),
    )
    with follow_history(out / "history.jsonl", on_row):
        try:
            fit_in_bounded_time(trainer, engine)
        except Exception as error:
            mistake = user_mistake(error)
            if mistake is None:
                raise
            raise RaygardError(mistake) from None


def end_on_mistake() -> Any:
    """A callback of Ray Train that ends a run at a user's mistake: every attempt would come to the same.

    Without it Ray Train starts the workers again `engine.max_failures` times, with -1 for ever.
    """
    from ray.train import UserCallback

    class EndOnMistake(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if (mistake := user_mistake(error)) is not None:
                    # Ray Train takes what a callback raises for an error of its own, and tries nothing again.
                    raise RaygardError(mistake)

    return EndOnMistake()


def fit_in_bounded_time(trainer: TorchTrainer, engine: EngineConfig) -> None:
    """`trainer.fit()`, given up once the cluster has lacked room for its workers for `engine.node_timeout_s`.

    Ray Train itself waits for ever for the nodes that an autoscaler may bring.
    Raises what `fit` raises, and RaygardError after the time.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run, daemon=True).start()
    short_since = None
    while True:
        try:
            error = ended.get(timeout=ROOM_POLL_S)
        except queue.Empty:
            pass
        else:
            if error is not None:
                raise error
            return
        try:
            require_resources(engine)
            short_since = None
        except RaygardError as short:
            short_since = short_since or time.monotonic()
            if time.monotonic() - short_since > engine.node_timeout_s:
                raise RaygardError(
                    f"nodes were lost and none came for {engine.node_timeout_s:g} s ({short}); the same command again "
                    "goes on from the last checkpoint, also with fewer workers (--workers 1:N)"
                ) from None


class follow_history:
    """Hand every new line of a history file to `on_row`, from a thread, while the block runs."""

    def __init__(self, path: Path, on_row: OnRow | None, interval_s: float = 1.0) -> None:
        self.path, self.on_row, self.interval_s = path, on_row, interval_s
        self._stop = threading.Event()
        self._seen = (-1, -1)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> follow_history:
        if self.on_row is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.on_row is not None:
            self._stop.set()
            self._thread.join()
            self._drain()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._drain()

    def _drain(self) -> None:
        assert self.on_row is not None
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                return
            # A resumed worker rewrites the steps after its checkpoint; each is handed on once.
            position = (row["k"], row["l"])
            if position > self._seen:
                self._seen = position
                self.on_row(row)
