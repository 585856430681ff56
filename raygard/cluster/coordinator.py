"""The coordinator of an evaluation: owns generation and scorer actors and passes pictures from one to the other.

It holds references to pictures, never pictures: an item goes from the generator that drew it straight to a scorer,
while the next one is drawn.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from raygard.cluster.evaluators import (
    GeneratorActor,
    PictureRequest,
    ScorerActor,
    ScoreRequest,
    environment,
    save_task,
)
from raygard.cluster.pool import ItemFailed, RayWorker, WorkerPool, reason
from raygard.config import EvaluationConfig, RunConfig
from raygard.errors import RaygardError
from raygard.scoring import DETECTION, pooled_detection
from raygard.store import Store

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

SAVE_RETRIES = 3


@dataclass(frozen=True)
class Measurement:
    """Pictures to draw (unless the store has them) and to score. Paths are on shared storage.

    captions: of the references, which name the noise; prompts: the words asked with, one for each caption.
    key: where in the store. adapted: whether the weights lie there too, or the base is measured. references: file
    of the reference pictures; references_hash: of those of the class.
    """

    key: str
    store: str
    cls: str
    captions: tuple[str, ...]
    prompts: tuple[str, ...]
    adapted: bool
    generation: dict[str, Any]
    seed: int
    scorer: str
    references: str
    references_hash: str

    def spans(self) -> list[tuple[int, int]]:
        """Half-open ranges of pictures, one for each item."""
        size, count = int(self.generation["batch_size"]), len(self.captions)
        return [(start, min(start + size, count)) for start in range(0, count, size)]


class Coordinator:
    """An asynchronous actor. Restarted after a death, it starts its actors anew and repeats what was not finished."""

    def __init__(self, config: dict[str, Any], group: PlacementGroup | None) -> None:
        """group: one bundle for each actor that reserves something, generators' first; None if none does."""
        settings = RunConfig.model_validate(config)
        evaluation = settings.evaluation
        model = settings.model.model_dump(mode="json")
        bundles = iter(range(evaluation.generators + evaluation.scorers))
        self._generators = _pool("generator", GeneratorActor, model, evaluation, group, bundles)
        self._scorers = _pool("scorer", ScorerActor, evaluation.scorer, evaluation, group, bundles)
        self._attempts = evaluation.max_attempts
        # A lock is forgotten with the last call that holds it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Pictures of a job lie in the object store until all are drawn and scored: with one job for each actor that is
        # bounded, however many jobs wait and however slow the scorers are.
        self._room = asyncio.Semaphore(evaluation.generators + evaluation.scorers)

    async def warm(self) -> None:
        """Start all actors, without waiting for them."""
        self._generators.warm()
        self._scorers.warm()

    async def status(self) -> dict[str, Any]:
        """{"pid", "generators", "scorers"}, the last two as `WorkerPool.status` says."""
        return {"pid": os.getpid(), "generators": self._generators.status(), "scorers": self._scorers.status()}

    async def measure(self, measurement: Measurement) -> dict[str, Any]:
        """Score record of the pictures, from the store or made now; or {"failed", "stage", "reason", "attempts"}.

        Calls for the same key wait for each other, so that the second one finds what the first one made.
        """
        async with self._locks.setdefault(measurement.key, asyncio.Lock()), self._room:
            store = Store(Path(measurement.store))
            for attempt in range(1, self._attempts + 1):
                found = store.score(measurement.key, measurement.scorer, measurement.references_hash)
                if found is not None:
                    return found
                try:
                    return await self._measure(measurement, store)
                except _Failed as failed:
                    if not failed.pictures_lost or attempt == self._attempts:
                        return failed.record
                except (OSError, RaygardError) as error:
                    return _record("score", ItemFailed(reason(error), attempt, error))
        raise AssertionError("max_attempts is at least 1")

    async def _measure(self, measurement: Measurement, store: Store) -> dict[str, Any]:
        spans, drawn, saving = measurement.spans(), [], []
        if store.has_pictures(measurement.key):
            store.drop_tensors(measurement.key)
        else:
            drawn = [asyncio.ensure_future(self._draw(measurement, span)) for span in spans]
            saving = [asyncio.ensure_future(self._save(measurement, drawn))]
        scored = [
            asyncio.ensure_future(self._score(measurement, span, drawn[index] if drawn else None))
            for index, span in enumerate(spans)
        ]
        try:
            results = await asyncio.gather(*scored, *saving)
        finally:
            for task in (*drawn, *scored, *saving):
                task.cancel()
        items = results[: len(spans)]
        record = {
            "scorer": measurement.scorer,
            "references": measurement.references_hash,
            "distances": [distance for item in items for distance in item["distances"]],
            "items": [item["item"] for item in items],
            "seconds": {kind: round(sum(item["seconds"][kind] for item in items), 3) for kind in ("generate", "score")},
            **pooled_detection([(len(item["distances"]), item["detection"]) for item in items]),
        }
        store.write_score(measurement.key, measurement.scorer, record)
        return record

    async def _draw(self, measurement: Measurement, span: tuple[int, int]) -> tuple[dict[str, Any], Any, int]:
        """Facts about an item, the reference to its pictures, and the attempts it took."""
        store, captions = Store(Path(measurement.store)), measurement.captions
        adapted = str(store.tensors_file(measurement.key)) if measurement.adapted else None
        rows = range(*span)
        request = PictureRequest(
            adapted=adapted,
            captions=tuple(measurement.prompts[row] for row in rows),
            keys=tuple(f"{measurement.cls}/{row}/{captions[row]}" for row in rows),
            generation=measurement.generation,
            seed=measurement.seed,
        )

        async def item(actor: Any) -> Any:
            facts, pictures = actor.generate.options(num_returns=2).remote(request)
            return await facts, pictures

        try:
            (facts, pictures), attempts = await self._generators.run(item, affinity=adapted or "base")
        except ItemFailed as failure:
            raise _Failed("generate", failure) from failure
        return facts, pictures, attempts

    async def _score(
        self, measurement: Measurement, span: tuple[int, int], drawn: asyncio.Future[Any] | None
    ) -> dict[str, Any]:
        request = ScoreRequest(measurement.cls, measurement.references, measurement.captions[slice(*span)])
        if drawn is None:
            saved = str(Store(Path(measurement.store)).pictures_file(measurement.key))
            request = replace(request, saved=saved, rows=span)
            facts, pictures, drawing = {}, None, 0
        else:
            facts, pictures, drawing = await drawn

        async def item(actor: Any) -> Any:
            return await actor.score.remote(request, pictures)

        try:
            result, attempts = await self._scorers.run(item)
        except ItemFailed as failure:
            raise _Failed("score", failure) from failure
        return {
            "distances": result["distances"],
            "detection": {name: result[name] for name in DETECTION if name in result},
            "item": {"rows": list(span), "generate_attempts": drawing, "score_attempts": attempts},
            "seconds": {"generate": facts.get("seconds", 0.0), "score": result["seconds"]},
        }

    async def _save(self, measurement: Measurement, drawn: Sequence[asyncio.Future[Any]]) -> None:
        """Write all pictures as one file; the weights they came from are then of no more use."""
        import ray

        pictures = [found[1] for found in await asyncio.gather(*drawn)]
        task = ray.remote(num_cpus=0, max_retries=SAVE_RETRIES)(save_task)
        try:
            await task.remote(measurement.store, measurement.key, *pictures)
            Store(Path(measurement.store)).drop_tensors(measurement.key)
        except (ray.exceptions.RayError, OSError) as error:
            raise _Failed("generate", ItemFailed(reason(error), 1, error)) from None


class _Failed(Exception):
    """A job that cannot be measured."""

    def __init__(self, stage: str, failure: ItemFailed) -> None:
        super().__init__(failure.reason)
        self.pictures_lost = failure.cause is not None and _pictures_lost(failure.cause)
        self.record = _record(stage, failure)


def _record(stage: str, failure: ItemFailed) -> dict[str, Any]:
    return {"failed": True, "stage": stage, "reason": failure.reason, "attempts": failure.attempts}


def _pictures_lost(error: BaseException) -> bool:
    """Whether the pictures went down with their node: scoring them again is of no use, drawing them again is."""
    import ray

    lost = ray.exceptions.ObjectLostError
    return isinstance(error, lost) or isinstance(getattr(error, "cause", None), lost)


def _pool(
    name: str,
    actor: Callable[..., Any],
    argument: Any,
    evaluation: EvaluationConfig,
    group: PlacementGroup | None,
    bundles: Iterator[int],
) -> WorkerPool:
    """bundles: numbers of the bundles of `group` that no other pool has; taken if these actors reserve something."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cpus, gpus = (getattr(evaluation, f"{name}_{kind}") for kind in ("cpus", "gpus"))
    # The pool counts attempts and replaces processes; if Ray did so as well, it could not tell which process answers.
    remote = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        runtime_env=environment(evaluation.actor_threads, gpus),
    )(actor)
    own = group if cpus or gpus else None

    async def room() -> None:
        # The bundles of a lost node are placed again as soon as another has room for them.
        if own is not None:
            await own.ready()

    def worker() -> RayWorker:
        # Without an explicit None an actor would be charged to the group that the coordinator's caller sits in.
        placement = PlacementGroupSchedulingStrategy(
            placement_group=own, placement_group_bundle_index=-1 if own is None else next(bundles)
        )
        placed = remote.options(scheduling_strategy=placement)
        return RayWorker(lambda: placed.remote(argument, evaluation.actor_threads, gpus), room)

    return WorkerPool(
        name,
        [worker() for _ in range(getattr(evaluation, f"{name}s"))],
        max_attempts=evaluation.max_attempts,
        timeout_s=evaluation.item_timeout_s,
        failures=(ray.exceptions.RayError,),
        hopeless=_pictures_lost,
    )
