"""Ray Tune over trials: grid or Optuna proposes points, ASHA prunes where the proxy has earned it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from raygard.cluster.trial import TRIAL, TrialInputs, read_point, read_record, run_trial, rung_times, shares
from raygard.config import RunConfig
from raygard.files import require_own, write_text
from raygard.redaction import redact
from raygard.search.proxy import Evidence
from raygard.search.space import Point, concurrent_trials, dimensions, grid, num_trials

log = logging.getLogger("raygard")

NAME, DECISIONS = "search", "decisions.json"
MAX_FAILURES = 2
DRIVER_BYTES = 2**20

Listener = Callable[[str, str, dict[str, Any]], None]


@dataclass
class Session:
    """What lives in the driver's process while its trials run; Tune's pickled state refers to it and holds none of it.

    evidence: filled with the trials of earlier attempts. file: where decisions on pruning are written.
    """

    listener: Listener
    evidence: Evidence
    file: Path


_SESSION: Session | None = None


def _session() -> Session:
    assert _SESSION is not None, "no search runs in this process"
    return _SESSION


class CalibratedASHA(FIFOScheduler):
    """ASHA on calibrated proxies, which stops nothing until these have shown that they rank as the score does.

    The calibration changes with every scored trial, so each decision is Ray's ASHA replayed over the predictions as
    they are at that time. Ray does not save a scheduler's state: after a restart it is in the session's evidence.
    """

    def __init__(self, times: Sequence[int], reduction_factor: int, min_trials: int, min_correlation: float) -> None:
        """times: fidelity of each rung, and of the score last."""
        super().__init__()
        self.times, self.reduction_factor = list(times), reduction_factor
        self.min_trials, self.min_correlation = min_trials, min_correlation

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "fidelity" not in result:
            return self.CONTINUE
        session, name, rung = _session(), result["trial"], result["fidelity"]
        parts = list(zip(result["mitigations"], result["legal_impacts"], strict=True))
        if result["scored"]:
            session.evidence.finals[name] = parts
            return self.CONTINUE
        session.evidence.proxies.setdefault(name, {})[rung] = parts
        decisions = session.evidence.decisions
        # A trial that was cut off reports its rungs again; what was decided on them stands.
        decision = next((d for d in decisions if (d["trial_id"], d["rung"]) == (name, rung)), None)
        if decision is None:
            decision = self.decide(session.evidence, name, rung)
            decisions.append(decision)
            write_text(session.file, json.dumps(decisions, indent=1) + "\n")
        return self.STOP if decision["stopped"] else self.CONTINUE

    def decide(self, evidence: Evidence, name: str, rung: int) -> dict[str, Any]:
        """Whether the trial ends here, and on what grounds."""
        trusted = evidence.is_trusted(rung, threshold=self.min_correlation, min_trials=self.min_trials)
        return {
            "trial_id": name,
            "rung": rung,
            "scored": len(evidence.scored_at(rung)),
            "correlation": evidence.correlation(rung),
            "pruning": trusted,
            "stopped": trusted and self._asha_stops(evidence, name, rung),
        }

    def _asha_stops(self, evidence: Evidence, name: str, rung: int) -> bool:
        asha = AsyncHyperBandScheduler(
            time_attr="fidelity",
            metric="proxy",
            mode="max",
            grace_period=self.times[0],
            max_t=self.times[-1],
            reduction_factor=self.reduction_factor,
        )
        for each in [*(other for other in evidence.proxies if other != name), name]:
            value = evidence.prediction(each, rung) if rung in evidence.proxies[each] else None
            if value is None:
                continue
            handle = SimpleNamespace(trial_id=each)
            asha.on_trial_add(None, handle)
            decision = asha.on_trial_result(None, handle, {"fidelity": rung, "proxy": value})
            if each == name:
                return bool(decision == self.STOP)
        return False


class DistinctOptuna(OptunaSearch):
    """Optuna over a finite space, proposing each point once, and patient with reports that carry no score yet."""

    def __init__(
        self, space: dict[str, list[Any]], order: list[dict[str, Any]], seed: int, first: Sequence[Point] = ()
    ) -> None:
        """space: values of each dimension. order: every point, in the order taken when Optuna repeats itself.

        first: proposed before any other: those an earlier attempt has finished.
        """
        import optuna
        from optuna.distributions import CategoricalDistribution

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {name: CategoricalDistribution(values) for name, values in space.items()}
        super().__init__(space=distributions, metric="score", mode="max", seed=seed)
        self.order, self.proposed, self.first = order, set[Point](), list(first)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        from optuna.trial import TrialState

        left = [point for point in self.order if Point(**point) not in self.proposed]
        if not left:
            return self.FINISHED
        if self.first:
            self._ot_study.enqueue_trial(self.first.pop(0).to_json())
        point = super().suggest(trial_id)
        if point not in left:
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.PRUNED)
            self._ot_study.enqueue_trial(left[0])
            point = super().suggest(trial_id)
        self.proposed.add(Point(**point))
        return point

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            super().on_trial_result(trial_id, result)


class Forward(tune.Callback):
    """Hands results, ends and errors of trials to the session's listener: (event, trial id, result)."""

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._tell("result", trial, result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell("end", trial, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell("error", trial, {"reason": _reason(trial)})

    def _tell(self, event: str, trial: Any, result: dict[str, Any]) -> None:
        _session().listener(event, read_point(trial.config).trial_id, result)


def run_trials(config: RunConfig, inputs: TrialInputs, out: Path, listener: Listener) -> list[dict[str, Any]]:
    """Run every trial of the search; resumes a search that was cut off in the same folder.

    listener(event, trial_id, result) is called in this process: "result" for each report, "end" when a trial ends
    or is stopped, "error" when its process failed for good. Trials that failed in an earlier attempt run again.
    Returns the decisions on pruning, of all attempts.
    """
    global _SESSION
    # Another model or other data in the same folder is another search to Tune.
    folder = (out / "tune" / inputs.key).resolve()
    records = _records(config, inputs)
    _SESSION = Session(listener, _evidence(config, records), folder / DECISIONS)
    _SESSION.evidence.decisions += read_decisions(_SESSION.file)
    folder.mkdir(parents=True, exist_ok=True)
    require_own(folder, whole=True)
    # While a trial learns it reports losses, and neither proxy nor score.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Tune would take the first Ctrl-C as "enough trials", and the search would choose among half of them.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The new output prints tables that raygard's own progress bar would sit between.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    try:
        _tuner(config, inputs, folder, records).fit()
        return [_with_share(config, decision) for decision in _SESSION.evidence.decisions]
    finally:
        _SESSION = None


def _tuner(config: RunConfig, inputs: TrialInputs, folder: Path, records: Sequence[dict[str, Any]]) -> tune.Tuner:
    # The driver of a trial only waits: the CPUs belong to its workers and users. A bundle may not be empty.
    trainable = tune.with_resources(tune.with_parameters(run_trial, inputs=inputs), {"memory": DRIVER_BYTES})
    path = folder / NAME
    failed = any(record["status"] == "failed" for record in records)
    if tune.Tuner.can_restore(str(path)) and not failed:
        try:
            return tune.Tuner.restore(str(path), trainable, resume_unfinished=True, param_space=_param_space(config))
        except Exception as error:
            # Ray writes this state in place, so a kill may leave half of it; what its reader raises then is anything.
            log.warning("Tune's state cannot be read (%s); trials that have ended are not repeated", error)
    if path.exists():
        path.rename(folder / f"{NAME}.{time.time_ns()}")
    return tune.Tuner(
        trainable,
        param_space=_param_space(config),
        tune_config=tune.TuneConfig(
            search_alg=_searcher(config, records),
            scheduler=_scheduler(config),
            num_samples=num_trials(config) if config.search.algorithm == "optuna" else 1,
            max_concurrent_trials=concurrent_trials(config, ray.cluster_resources()),
        ),
        run_config=tune.RunConfig(
            name=NAME,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[Forward()],
            verbose=0,
        ),
    )


def _records(config: RunConfig, inputs: TrialInputs) -> list[dict[str, Any]]:
    """trial.json of every trial that ended in an earlier attempt."""
    found = [read_record(inputs.folder(point) / TRIAL) for point in grid(config)]
    return [record for record in found if record is not None and record["key"] == inputs.key]


def _evidence(config: RunConfig, records: Sequence[dict[str, Any]]) -> Evidence:
    evidence = Evidence(config.domain.legal_budget, config.search.legal_penalty)
    for record in sorted(records, key=lambda record: record["finished"]):
        evidence.add_record(record, {share: rung for rung, share in shares(config).items()})
    return evidence


def read_decisions(file: Path) -> list[dict[str, Any]]:
    """Decisions on pruning of an earlier attempt; none if the file is missing or not whole."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _with_share(config: RunConfig, decision: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in decision.items() if name != "rung"}
    return {**rest, "fidelity": shares(config)[decision["rung"]]}


def _param_space(config: RunConfig) -> dict[str, Any]:
    if config.search.algorithm == "optuna":
        return {}
    return {"point": tune.grid_search([point.to_json() for point in grid(config)])}


def _searcher(config: RunConfig, records: Sequence[dict[str, Any]]) -> Any:
    if config.search.algorithm == "grid":
        return None
    ended = {record["trial_id"] for record in records}
    points = grid(config)
    first = [point for point in points if point.trial_id in ended]
    return DistinctOptuna(dimensions(config), [point.to_json() for point in points], config.seed, first)


def _scheduler(config: RunConfig) -> Any:
    s = config.search
    if s.scheduler == "fifo":
        return FIFOScheduler()
    return CalibratedASHA(rung_times(config), s.reduction_factor, s.calibration_trials, s.min_proxy_correlation)


def _reason(trial: Any) -> str:
    lines = [line for line in redact(trial.get_error() or "the trial's process ended").splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else "the trial's process ended"
