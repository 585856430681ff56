"""Measuring many users: adaptations as Ray tasks, pictures and scores from the evaluation actors.

`run_jobs` drives: it submits the adaptations, hands each finished one to the coordinator of an `EvaluationPool`, and
keeps no result that the store does not have. What is in the store is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raygard.cluster.coordinator import Measurement
from raygard.cluster.errors import user_mistake
from raygard.cluster.evaluation_pool import EvaluationPool, outside_groups
from raygard.cluster.evaluators import Adaptation, adapt_task, environment
from raygard.cluster.jobs import (
    BASE,
    EvaluationInputs,
    EvaluationJob,
    held_out_key,
    job_content,
    job_names,
    job_result,
    reference_facts,
    save_result,
)
from raygard.cluster.pool import reason
from raygard.config import RunConfig
from raygard.diffusion.cache import load_cache
from raygard.diffusion.loss import DiffusionLoss, held_out_loss
from raygard.diffusion.model import load_noise_scheduler, load_unet
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.store import Store, content_key

__all__ = ["EvaluationInputs", "EvaluationJob", "EvaluationPool", "base_loss_task", "run_jobs", "save_result"]

OnResult = Callable[[dict[str, Any]], None]
OnMilestone = Callable[[int, dict[str, float]], None]


def run_jobs(
    jobs: Sequence[EvaluationJob],
    inputs: EvaluationInputs,
    pool: EvaluationPool,
    *,
    on_result: OnResult | None = None,
    on_milestone: OnMilestone | None = None,
) -> list[dict[str, Any]]:
    """Adapt, draw and score every job; return results and failures in the order of `jobs`.

    A result is the content of result.json (docs/evaluation-actors.md). A failure is {"job_id", "failed": True,
    "stage": "adapt" | "generate" | "score", "reason", "attempts"} and what names the job: one job's failure does not
    stop the others. on_result(result or failure) is called for each job when it ends. on_milestone(step, losses) is
    called once for each milestone, in order, when every job that has not failed in its adaptation has reached it;
    losses: held-out loss by job id. An exception from a callback ends all that was started.
    Raises RaygardError if a milestone lies beyond the adaptation, or a mask, the cache or the references cannot be
    read.
    """
    return _Run(jobs, inputs, pool, on_result, on_milestone).run()


@dataclass(eq=False)
class _Plan:
    """One key of the store and the jobs that want it."""

    key: str
    job: EvaluationJob
    captions: list[str]
    references_hash: str
    held_out: str | None
    mask: FreezeMask | None
    indices: list[int] = field(default_factory=list)
    attempts: int = 0
    losses: dict[int, float] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        jobs: Sequence[EvaluationJob],
        inputs: EvaluationInputs,
        pool: EvaluationPool,
        on_result: OnResult | None,
        on_milestone: OnMilestone | None,
    ) -> None:
        self.jobs, self.inputs, self.pool = jobs, inputs, pool
        self.on_result, self.on_milestone = on_result, on_milestone
        self.config = RunConfig.model_validate(inputs.config)
        pool.check(self.config)
        last = self.config.adapt.max_train_steps
        if list(inputs.milestones) != sorted({m for m in inputs.milestones if 0 <= m <= last}):
            raise RaygardError(f"milestones must be ascending and within 0 and {last}, not {inputs.milestones}")
        self.store = Store(Path(inputs.store))
        self.results: dict[int, dict[str, Any]] = {}
        self.reached: dict[int, dict[str, float]] = {step: {} for step in inputs.milestones}
        self.ahead = list(inputs.milestones)
        self.adapting: dict[Any, _Plan] = {}
        self.measuring: dict[Any, _Plan] = {}
        self.plans = self._plan()

    def run(self) -> list[dict[str, Any]]:
        import ray

        try:
            for plan in self.plans:
                self._begin(plan)
            while self.adapting or self.measuring:
                (ready,), _ = ray.wait([*self.measuring, *self.adapting], num_returns=1)
                if ready in self.measuring:
                    self._measured(self.measuring.pop(ready), ray.get(ready))
                else:
                    self._next_record(ready)
        finally:
            for task in self.adapting:
                ray.cancel(task, force=True)
            for call in self.measuring:
                ray.cancel(call)
        return [self.results[index] for index in range(len(self.jobs))]

    def _plan(self) -> list[_Plan]:
        """Jobs with the same content share one plan."""
        plans: dict[str, _Plan] = {}
        for index, job in enumerate(self.jobs):
            mask = FreezeMask.load(job.mask) if job.mask else None
            captions, references_hash = reference_facts(self.inputs.references, job.cls)
            captions = captions[: self.config.generation.num_images]
            content = job_content(job, self.inputs, self.config, mask, captions)
            key = content_key(content)
            if key not in plans:
                self.store.describe(key, content)
                held_out = held_out_key(job.cls, self.inputs, self.config)
                plans[key] = _Plan(key, job, captions, references_hash, held_out, mask)
            plans[key].indices.append(index)
        return list(plans.values())

    # Adaptation

    def _begin(self, plan: _Plan) -> None:
        record = self.store.adapted(plan.key)
        same = record is not None and record["held_out"] == plan.held_out
        known = dict(record["milestones"]) if record is not None and same else {}
        if all(step in known for step in self._steps(plan)) and self._weights_settled(plan, record):
            for step in self._steps(plan):
                self._reach(plan, step, known[step])
            self._measure(plan)
        else:
            self.pool.coordinator.warm.remote()
            self._adapt(plan)

    def _steps(self, plan: _Plan) -> tuple[int, ...]:
        """Steps whose loss the task takes: the untouched base has the same one at every milestone."""
        untouched = plan.job.defence == BASE
        return (0,) if untouched and self.inputs.milestones else self.inputs.milestones

    def _weights_settled(self, plan: _Plan, record: dict[str, Any] | None) -> bool:
        if plan.job.defence == BASE:
            return True
        return record is not None and (self.store.has_pictures(plan.key) or self.store.has_tensors(plan.key))

    def _adapt(self, plan: _Plan) -> None:
        import ray

        plan.attempts += 1
        evaluation = self.config.evaluation
        # Attempts are counted here, so Ray must not add its own.
        task = ray.remote(
            num_cpus=evaluation.cpus_per_job,
            num_gpus=evaluation.gpus_per_job,
            num_returns="streaming",
            max_retries=0,
            scheduling_strategy=outside_groups(),
            runtime_env=environment(self.config.engine.torch_threads, evaluation.gpus_per_job),
        )(adapt_task)
        adaptation = Adaptation(
            key=plan.key,
            store=self.inputs.store,
            config=self.inputs.config,
            cache=self.inputs.cache,
            cls=plan.job.cls,
            adapt_part=self.inputs.adapt_part,
            reference_part=self.inputs.reference_part,
            seed=plan.job.seed,
            mask=plan.job.mask,
            untouched=plan.job.defence == BASE,
            milestones=self._steps(plan),
            held_out=plan.held_out,
        )
        self.adapting[task.remote(adaptation)] = plan

    def _next_record(self, stream: Any) -> None:
        import ray

        plan = self.adapting[stream]
        try:
            record = ray.get(next(stream))
        except StopIteration:
            del self.adapting[stream]
            self._measure(plan)
        except ray.exceptions.RayError as error:
            del self.adapting[stream]
            if user_mistake(error) is None and plan.attempts < self.config.evaluation.max_attempts:
                self._adapt(plan)
            else:
                self._fail(plan, "adapt", reason(error), plan.attempts)
        else:
            if "step" in record:
                self._reach(plan, record["step"], record["loss"])

    def _reach(self, plan: _Plan, step: int, loss: float) -> None:
        for milestone in self.inputs.milestones if plan.job.defence == BASE else (step,):
            plan.losses[milestone] = loss
            for index in plan.indices:
                self.reached[milestone][self.jobs[index].job_id] = loss
        self._pass_milestones()

    def _pass_milestones(self) -> None:
        waited = [
            job.job_id for index, job in enumerate(self.jobs) if self.results.get(index, {}).get("stage") != "adapt"
        ]
        while waited and self.ahead and all(job_id in self.reached[self.ahead[0]] for job_id in waited):
            step = self.ahead.pop(0)
            if self.on_milestone is not None:
                self.on_milestone(step, dict(self.reached[step]))

    # Pictures and scores

    def _measure(self, plan: _Plan) -> None:
        config = self.config
        done = self.store.score(plan.key, config.evaluation.scorer, plan.references_hash)
        if done is not None:
            self._measured(plan, done)
            return
        measurement = Measurement(
            key=plan.key,
            store=self.inputs.store,
            cls=plan.job.cls,
            captions=tuple(plan.captions),
            adapted=plan.job.defence != BASE,
            generation=config.generation.model_dump(mode="json"),
            seed=config.seed,
            scorer=config.evaluation.scorer,
            references=self.inputs.references,
            references_hash=plan.references_hash,
        )
        self.measuring[self.pool.coordinator.measure.remote(measurement)] = plan

    def _measured(self, plan: _Plan, score: dict[str, Any]) -> None:
        if score.get("failed"):
            self._fail(plan, score["stage"], score["reason"], score["attempts"])
            return
        adapted = self.store.adapted(plan.key) or {}
        milestones = [[step, plan.losses[step]] for step in self.inputs.milestones]
        for index in plan.indices:
            result = job_result(self.jobs[index], self.config, plan.mask, plan.captions, adapted, score)
            self._end(index, {"store": plan.key, **result, "milestones": milestones})

    def _fail(self, plan: _Plan, stage: str, why: str, attempts: int) -> None:
        for index in plan.indices:
            failure = {"failed": True, "stage": stage, "reason": why, "attempts": attempts}
            self._end(index, {**job_names(self.jobs[index]), **failure})
        self._pass_milestones()

    def _end(self, index: int, result: dict[str, Any]) -> None:
        self.results[index] = result
        if self.on_result is not None:
            self.on_result(result)


def base_loss_task(config_dict: dict[str, Any], cache: str) -> float:
    """The release's own loss on the general classes' captions, on fixed noise."""
    config = RunConfig.model_validate(config_dict)
    torch.set_num_threads(config.engine.torch_threads)
    loss = DiffusionLoss(load_noise_scheduler(config.model), config.model.prediction_type, None)
    unet = load_unet(config.model).eval()
    return held_out_loss(unet, load_cache(Path(cache)), loss, config.seed, config.generation.batch_size, 1)
