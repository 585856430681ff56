"""The points of a search: which values each trial tries, and the configuration a trial runs with."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from raygard.config import DEFAULT_RULE, RunConfig
from raygard.errors import RaygardError
from raygard.seeding import generator


@dataclass(frozen=True)
class Point:
    """One trial. freeze_ratio None: the trial learns one ranking that serves every p of the search."""

    freeze_ratio: float | None
    temperature: float
    inner_steps: int
    illegal_weight: float
    legal_weight: float
    rule: str

    @property
    def trial_id(self) -> str:
        """Name of the trial's folder and of its MLflow run."""
        p = "all-p" if self.freeze_ratio is None else f"p{self.freeze_ratio:g}"
        name = f"{p}-T{self.temperature:g}-L{self.inner_steps}"
        if (self.illegal_weight, self.legal_weight, self.rule) != (1.0, 1.0, DEFAULT_RULE):
            name += f"-w{self.illegal_weight:g}-{self.legal_weight:g}-{self.rule}"
        return name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dimensions(config: RunConfig) -> dict[str, list[Any]]:
    """Values of each searched dimension, by `Point` field; dimensions that are not searched have one value."""
    s, b, m = config.search, config.bilevel, config.mask
    one_ranking = s.mode == "one_ranking"
    return {
        "freeze_ratio": [None] if one_ranking else list(s.freeze_ratios),
        "temperature": list(s.temperatures) or [m.temperature],
        "inner_steps": list(s.inner_steps) or [b.inner_steps],
        "illegal_weight": list(s.illegal_weights) or [b.illegal_weight],
        "legal_weight": list(s.legal_weights) or [b.legal_weight],
        "rule": list(s.rules) or [m.rule],
    }


def grid(config: RunConfig) -> list[Point]:
    """Every combination once, in a seeded order, so that the first trials are spread over the whole space."""
    points: list[dict[str, Any]] = [{}]
    for name, values in dimensions(config).items():
        points = [{**point, name: value} for point in points for value in values]
    order = torch.randperm(len(points), generator=generator(config.seed, "search order")).tolist()
    return [Point(**points[index]) for index in order]


def num_trials(config: RunConfig) -> int:
    """How many different trials the search runs."""
    size = len(grid(config))
    wanted = config.search.num_trials
    return size if wanted is None else min(wanted, size)


def trial_config(config: RunConfig, point: Point) -> RunConfig:
    """The run's configuration at one point. K times L is held; T moves with the mask's learning rate held.

    Raises ValueError (pydantic) if the combination is not a valid configuration.
    """
    b, s = config.bilevel, config.search
    rounds = max(1, round(b.publisher_steps * b.inner_steps / point.inner_steps))
    mask = {**config.mask.model_dump(), "temperature": point.temperature, "rule": point.rule}
    if point.freeze_ratio is None:
        mask["draw_ratios"] = s.freeze_ratios
    else:
        mask["freeze_ratio"] = point.freeze_ratio
    bilevel = {
        **b.model_dump(),
        "inner_steps": point.inner_steps,
        "publisher_steps": rounds,
        "illegal_weight": point.illegal_weight,
        "legal_weight": point.legal_weight,
    }
    return RunConfig.model_validate({**config.model_dump(), "mask": mask, "bilevel": bilevel})


def candidate_ratios(config: RunConfig, point: Point) -> tuple[float, ...]:
    """The p values read off one trial's ranking."""
    return config.search.freeze_ratios if point.freeze_ratio is None else (point.freeze_ratio,)


def candidate_id(point: Point, ratio: float) -> str:
    return point.trial_id.replace("all-p", f"p{ratio:g}", 1) + ("@all-p" if point.freeze_ratio is None else "")


def milestones(config: RunConfig) -> tuple[int, ...]:
    """Steps of the adaptation at which the proxy is measured, one for each fidelity."""
    steps = config.adapt.max_train_steps
    return tuple(sorted({max(1, round(fidelity * steps)) for fidelity in config.search.fidelities}))


def concurrent_trials(config: RunConfig, have: dict[str, float]) -> int:
    """Trials the cluster's resources hold at once, beside the evaluation actors, which stay warm all the while.

    have: `ray.cluster_resources()`. Raises RaygardError, with the arithmetic, if not even one fits.
    """
    e, v = config.engine, config.evaluation
    reserved = {
        "CPU": v.generators * v.generator_cpus + v.scorers * v.scorer_cpus,
        "GPU": v.generators * v.generator_gpus + v.scorers * v.scorer_gpus,
    }

    # A trial first learns, then lets its users adapt: it needs the larger of the two.
    def trial(workers: int) -> dict[str, float]:
        return {
            "CPU": max(workers * e.cpus_per_worker, v.cpus_per_job),
            "GPU": max(float(workers) if e.use_gpu else 0.0, v.gpus_per_job),
        }

    wanted = trial(e.num_workers)
    fits = [config.search.max_concurrent_trials or math.inf]
    for resource, amount in trial(e.fewest_workers).items():
        left = have.get(resource, 0.0) - reserved[resource]
        if amount > left + 1e-9:
            raise RaygardError(
                f"one trial needs {amount:g} {resource} and the evaluation actors hold {reserved[resource]:g}, but the "
                f"cluster has {have.get(resource, 0.0):g}; lower engine.num_workers or what the actors hold "
                f"(evaluation.generator_{resource.lower()}s, scorer_{resource.lower()}s), or add nodes"
            )
        if amount > 0:
            fits.append(max(1, int(left / wanted[resource] + 1e-9)))
    return int(min(fits))
