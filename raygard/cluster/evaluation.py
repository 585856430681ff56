"""Measuring many users: adaptations as Ray tasks, pictures and scores from the evaluation actors.

`run_jobs` drives: it submits the adaptations, hands each finished one to the coordinator of an `EvaluationPool`, and
keeps no result that the store does not have. What is in the store is not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raygard.adaptation import learned_captions
from raygard.cluster.coordinator import Measurement
from raygard.cluster.errors import user_mistake
from raygard.cluster.evaluation_pool import EvaluationPool, outside_groups
from raygard.cluster.evaluators import SIGNS_OF_LIFE, Adaptation, adapt_task, base_loss_task, environment
from raygard.cluster.jobs import (
    BASE,
    EvaluationInputs,
    EvaluationJob,
    base_loss_content,
    held_out_key,
    job_content,
    job_names,
    job_result,
    reference_facts,
    save_result,
)
from raygard.cluster.pool import reason
from raygard.config import RunConfig
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.store import Store, content_key

__all__ = ["EvaluationInputs", "EvaluationJob", "EvaluationPool", "base_loss", "run_jobs", "save_result"]

OnResult = Callable[[dict[str, Any]], None]
OnMilestone = Callable[[int, dict[str, float], float], None]


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
    stop the others. on_result(result or failure) is called for each job when it ends. on_milestone(step, losses,
    seconds) is called once for each milestone, in order, when every job that has not failed in its adaptation has
    reached it; losses: held-out loss by job id, seconds: spent on adaptation so far. With on_milestone, jobs wait for
    each other at every milestone, and nothing is drawn or scored before the last one's call has returned: who does not
    return from a call, because the jobs are not worth more, has paid for no more. An exception from a callback ends
    all that was started.
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
    prompts: list[str]
    references_hash: str
    held_out: str | None
    mask: FreezeMask | None
    indices: list[int] = field(default_factory=list)
    attempts: int = 1
    losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)
    # When its adaptation last spoke; None while it waits for its resources, which may take any time.
    heard: float | None = None


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
        # At a milestone, and adapted but not to be drawn yet.
        self.paused: list[_Plan] = []
        self.adapted: list[_Plan] = []
        self.plans = self._plan()

    def run(self) -> list[dict[str, Any]]:
        import ray

        try:
            for plan in self.plans:
                self._begin(plan)
            while self.adapting or self.measuring:
                patience = self.config.evaluation.item_timeout_s / SIGNS_OF_LIFE
                ready, _ = ray.wait([*self.measuring, *self.adapting], num_returns=1, timeout=patience)
                for found in ready:
                    if found in self.measuring:
                        self._measured(found)
                    else:
                        self._next_record(found)
                self._end_silent()
        finally:
            for task in self.adapting:
                ray.cancel(task, force=True)
            for call in self.measuring:
                # What the coordinator's actors are on may be of other callers.
                ray.cancel(call, recursive=False)
        return [self.results[index] for index in range(len(self.jobs))]

    def _plan(self) -> list[_Plan]:
        """Jobs with the same content share one plan."""
        plans: dict[str, _Plan] = {}
        for index, job in enumerate(self.jobs):
            mask = FreezeMask.load(job.mask) if job.mask else None
            captions, references_hash = reference_facts(self.inputs.references, job.cls)
            captions = [captions[number % len(captions)] for number in range(self.config.generation.num_images)]
            content = job_content(job, self.inputs, self.config, mask, captions)
            key = content_key(content)
            if key not in plans:
                self.store.describe(key, content)
                held_out = held_out_key(job.cls, self.inputs, self.config)
                prompts = captions
                if job.defence != BASE:
                    prompts = learned_captions(captions, [job.cls] * len(captions), self.config.adapt)
                plans[key] = _Plan(key, job, captions, prompts, references_hash, held_out, mask)
            plans[key].indices.append(index)
        return list(plans.values())

    # Adaptation

    def _begin(self, plan: _Plan) -> None:
        record = self.store.adapted(plan.key)
        same = record is not None and record["held_out"] == plan.held_out
        known = dict(record["milestones"]) if record is not None and same else {}
        plan.record = record or {}
        if all(step in known for step in self._steps(plan)) and self._weights_settled(plan, record):
            for step in self._steps(plan):
                self._reach(plan, step, known[step], record["seconds"] if record else 0.0)
            self._go_on(plan, adapted=True)
        else:
            plan.record = {}
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
        plan.heard = None
        task = remote_task(adapt_task, self.config, num_returns="streaming")
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
            edit=plan.job.edit,
            untouched=plan.job.defence == BASE,
            milestones=self._steps(plan),
            held_out=plan.held_out,
            pause_at=next((step for step in self.ahead if step), None) if self.on_milestone is not None else None,
        )
        self.adapting[task.remote(adaptation)] = plan

    def _next_record(self, stream: Any) -> None:
        import ray

        plan = self.adapting[stream]
        try:
            record = ray.get(next(stream))
        except StopIteration:
            del self.adapting[stream]
            self._go_on(plan, adapted=bool(plan.record))
            self._pass_milestones()
        except ray.exceptions.RayError as error:
            del self.adapting[stream]
            self._adapt_again(plan, reason(error), hopeless=user_mistake(error) is not None)
        else:
            plan.heard = time.monotonic()
            plan.record = record.get("record", plan.record)
            if "step" in record:
                self._reach(plan, record["step"], record["loss"], record["seconds"])

    def _go_on(self, plan: _Plan, *, adapted: bool) -> None:
        """What follows a task: the next stretch of the adaptation, or pictures; or to wait for the others."""
        if self.on_milestone is not None and self.ahead and (adapted or self.ahead[0] in plan.losses):
            (self.adapted if adapted else self.paused).append(plan)
        elif adapted:
            self._measure(plan)
        else:
            self._adapt(plan)

    def _end_silent(self) -> None:
        import ray

        limit = self.config.evaluation.item_timeout_s
        for stream, plan in [*self.adapting.items()]:
            if plan.heard is None or time.monotonic() - plan.heard < limit:
                continue
            # It may have spoken while a callback kept this process from listening.
            if not ray.wait([stream], timeout=0)[0]:
                del self.adapting[stream]
                ray.cancel(stream, force=True)
                self._adapt_again(plan, f"the adaptation gave no sign of life for {limit:g} s")

    def _adapt_again(self, plan: _Plan, why: str, hopeless: bool = False) -> None:
        if hopeless or plan.attempts >= self.config.evaluation.max_attempts:
            self._fail(plan, "adapt", why, plan.attempts)
        else:
            plan.attempts += 1
            self._adapt(plan)

    def _reach(self, plan: _Plan, step: int, loss: float, seconds: float) -> None:
        plan.seconds = seconds
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
            # Who has reached it has written down how to go on only when the task has ended.
            if self.on_milestone is not None and self.ahead[0] > 0 and self.adapting:
                return
            step = self.ahead.pop(0)
            if self.on_milestone is not None:
                self.on_milestone(step, dict(self.reached[step]), sum(plan.seconds for plan in self.plans))
            paused, self.paused = self.paused, []
            for plan in paused:
                self._go_on(plan, adapted=False)
        if not self.ahead:
            adapted, self.adapted = self.adapted, []
            for plan in adapted:
                self._measure(plan)

    # Pictures and scores

    def _measure(self, plan: _Plan) -> None:
        config = self.config
        done = self.store.score(plan.key, config.evaluation.scorer, plan.references_hash)
        if done is not None:
            self._succeed(plan, done)
            return
        measurement = Measurement(
            key=plan.key,
            store=self.inputs.store,
            cls=plan.job.cls,
            captions=tuple(plan.captions),
            prompts=tuple(plan.prompts),
            adapted=plan.job.defence != BASE,
            generation=config.generation.model_dump(mode="json"),
            seed=config.seed,
            scorer=config.evaluation.scorer,
            references=self.inputs.references,
            references_hash=plan.references_hash,
        )
        self.measuring[self.pool.coordinator.measure.remote(measurement)] = plan

    def _measured(self, call: Any) -> None:
        import ray

        plan = self.measuring.pop(call)
        try:
            score = ray.get(call)
        except ray.exceptions.RayError as error:
            self._fail(plan, "score", reason(error), 1)
            return
        if score.get("failed"):
            self._fail(plan, score["stage"], score["reason"], score["attempts"])
        else:
            self._succeed(plan, score)

    def _succeed(self, plan: _Plan, score: dict[str, Any]) -> None:
        self.store.drop_tensors(plan.key)
        milestones = [[step, plan.losses[step]] for step in self.inputs.milestones]
        for index in plan.indices:
            result = job_result(self.jobs[index], self.config, plan.mask, plan.captions, plan.record, score)
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


def base_loss(
    config: RunConfig,
    cache: str,
    store: str,
    mask: Path | None = None,
    edit: str | None = None,
    *,
    kept: bool = False,
) -> float:
    """The release's own held-out loss on the general classes, from the store or from a task.

    cache: their latents. mask: a mask whose values the release carries. edit: file of an edit of the released values,
    which comes before the mask. kept: look only at the pictures that training values leaves out, also where this run
    trains none. Paths are on shared storage. Raises RaygardError with the reason when the task has
    failed `evaluation.max_attempts` times, or by a user's mistake.
    """
    import ray

    content = base_loss_content(config, cache, None if mask is None else FreezeMask.load(mask), edit, kept=kept)
    where = None if mask is None else str(mask)
    key, known = content_key(content), Store(Path(store))
    loss, attempts = known.base_loss(key), 0
    while loss is None:
        attempts += 1
        try:
            task = remote_task(base_loss_task, config)
            loss = float(ray.get(task.remote(config.model_dump(mode="json"), cache, where, edit, kept)))
        except ray.exceptions.RayError as error:
            if user_mistake(error) is not None or attempts >= config.evaluation.max_attempts:
                raise RaygardError(f"the release's own loss on general classes: {reason(error)}") from None
            continue
        known.describe(key, content)
        known.write_base_loss(key, loss)
    return loss


def remote_task(function: Callable[..., Any], config: RunConfig, **options: Any) -> Any:
    """`function` as a Ray task with what `evaluation` gives an adaptation, which Ray does not repeat by itself."""
    import ray

    evaluation = config.evaluation
    # Attempts are counted by the caller, so Ray must not add its own.
    return ray.remote(
        num_cpus=evaluation.cpus_per_job,
        num_gpus=evaluation.gpus_per_job,
        max_retries=0,
        scheduling_strategy=outside_groups(),
        runtime_env=environment(config.engine.torch_threads, evaluation.gpus_per_job),
        **options,
    )(function)
