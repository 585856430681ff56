"""Ray Tune over trials: grid or Optuna proposes points, ASHA prunes where the proxy has earned it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from raygard.cluster.trial import TrialInputs, read_point, run_trial, rung_times
from raygard.config import RunConfig
from raygard.search.proxy import rank_correlation
from raygard.search.space import Point, concurrent_trials, dimensions, grid, num_trials

NAME = "search"
MAX_FAILURES = 2
DRIVER_BYTES = 2**20

Listener = Callable[[str, str, dict[str, Any]], None]


class CalibratedASHA(AsyncHyperBandScheduler):
    """ASHA that stops nothing until the proxy has shown, on fully scored trials, that it ranks as the score does."""

    def __init__(self, times: list[int], reduction_factor: int, min_trials: int, min_correlation: float) -> None:
        """times: fidelity of each rung, and of the score last."""
        super().__init__(
            time_attr="fidelity",
            metric="proxy",
            mode="max",
            grace_period=times[0],
            max_t=times[-1],
            reduction_factor=reduction_factor,
        )
        self.min_trials, self.min_correlation = min_trials, min_correlation
        self.proxies: dict[str, dict[int, float]] = {}
        self.scores: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "fidelity" not in result:
            return self.CONTINUE
        fidelity = result["fidelity"]
        if result["scored"]:
            if "score" in result:
                self.scores[trial.trial_id] = result["score"]
            return self.CONTINUE
        if "proxy" in result:
            self.proxies.setdefault(trial.trial_id, {})[fidelity] = result["proxy"]
        decision = super().on_trial_result(tune_controller, trial, result)
        return decision if decision == self.CONTINUE or self.may_prune(fidelity) else self.CONTINUE

    def may_prune(self, fidelity: int) -> bool:
        """Whether the proxy at this fidelity is correlated enough with the score, over the trials scored so far."""
        known = [trial for trial in self.scores if fidelity in self.proxies.get(trial, {})]
        if len(known) < self.min_trials:
            return False
        rho = rank_correlation([self.proxies[t][fidelity] for t in known], [self.scores[t] for t in known])
        return rho is not None and rho >= self.min_correlation


class DistinctOptuna(OptunaSearch):
    """Optuna over a finite space, proposing each point once, and patient with reports that carry no score yet."""

    def __init__(self, space: dict[str, list[Any]], order: list[dict[str, Any]], seed: int) -> None:
        """space: values of each dimension. order: every point, in the order taken when Optuna repeats itself."""
        import optuna
        from optuna.distributions import CategoricalDistribution

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {name: CategoricalDistribution(values) for name, values in space.items()}
        super().__init__(space=distributions, metric="score", mode="max", seed=seed)
        self.order, self.proposed = order, set[Point]()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        from optuna.trial import TrialState

        left = [point for point in self.order if Point(**point) not in self.proposed]
        if not left:
            return self.FINISHED
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


# A restored Tuner brings back its pickled callbacks; what they report to belongs to this process.
_LISTENERS: dict[str, Listener] = {}


class Forward(tune.Callback):
    """Hands results, ends and errors of trials to the driver's listener: (event, trial id, result)."""

    def __init__(self, key: str) -> None:
        self.key = key

    def _tell(self, event: str, trial: Any, result: dict[str, Any]) -> None:
        if self.key in _LISTENERS:
            _LISTENERS[self.key](event, read_point(trial.config).trial_id, result)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._tell("result", trial, result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell("end", trial, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell("error", trial, {"reason": _reason(trial)})


def run_trials(config: RunConfig, inputs: TrialInputs, out: Path, listener: Listener) -> None:
    """Run every trial of the search; resumes a search that was cut off in the same folder.

    listener(event, trial_id, result) is called in this process: "result" for each report, "end" when a trial ends
    or is stopped, "error" when its process failed for good.
    """
    storage = (out / "tune").resolve()
    path = storage / NAME
    # The driver of a trial only waits: the CPUs belong to its workers and users. A bundle may not be empty.
    trainable = tune.with_resources(tune.with_parameters(run_trial, inputs=inputs), {"memory": DRIVER_BYTES})
    _LISTENERS[str(path)] = listener
    # While a trial learns it reports losses, and neither proxy nor score.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Tune would take the first Ctrl-C as "enough trials", and the search would choose among half of them.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The new output prints tables that raygard's own progress bar would sit between.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    try:
        if tune.Tuner.can_restore(str(path)):
            tuner = tune.Tuner.restore(
                str(path), trainable, resume_unfinished=True, restart_errored=True, param_space=_param_space(config)
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_param_space(config),
                tune_config=tune.TuneConfig(
                    search_alg=_searcher(config),
                    scheduler=_scheduler(config),
                    num_samples=num_trials(config) if config.search.algorithm == "optuna" else 1,
                    max_concurrent_trials=concurrent_trials(config, ray.cluster_resources()),
                ),
                run_config=tune.RunConfig(
                    name=NAME,
                    storage_path=str(storage),
                    failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                    callbacks=[Forward(str(path))],
                    verbose=0,
                ),
            )
        tuner.fit()
    finally:
        del _LISTENERS[str(path)]


def _param_space(config: RunConfig) -> dict[str, Any]:
    if config.search.algorithm == "optuna":
        return {}
    return {"point": tune.grid_search([point.to_json() for point in grid(config)])}


def _searcher(config: RunConfig) -> Any:
    if config.search.algorithm == "grid":
        return None
    return DistinctOptuna(dimensions(config), [point.to_json() for point in grid(config)], config.seed)


def _scheduler(config: RunConfig) -> Any:
    s = config.search
    if s.scheduler == "fifo":
        return FIFOScheduler()
    return CalibratedASHA(rung_times(config), s.reduction_factor, s.calibration_trials, s.min_proxy_correlation)


def _reason(trial: Any) -> str:
    lines = [line for line in str(trial.get_error() or "the trial's process ended").splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else "the trial's process ended"
