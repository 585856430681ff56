"""The coordinator over simulated actors: pictures that are lost are drawn again, equal calls share one run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raygard.cluster import pool
from raygard.cluster.coordinator import Coordinator, Measurement
from raygard.cluster.pool import WorkerPool
from raygard.config import RunConfig
from raygard.errors import RaygardError
from raygard.store import Store, read_pictures

CAPTIONS = tuple(f"thing {number}" for number in range(5))
LOST = ray.exceptions.ObjectLostError("00" * 28, "", "")


class Method:
    """`actor.method.remote(...)` and `actor.method.options(...).remote(...)` of a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def options(self, **_options: Any) -> Method:
        return self

    def remote(self, *args: Any) -> Any:
        return self.function(*args)


async def given(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


class Generator:
    """Picture of row r is the number r. broken: rows whose item cannot be drawn."""

    def __init__(self, broken: int | None = None) -> None:
        self.drawn: list[tuple[str, ...]] = []
        self.broken = broken
        self.generate = Method(self._generate)

    def _generate(self, request: Any) -> tuple[Any, Any]:
        self.drawn.append(request.captions)
        rows = [CAPTIONS.index(caption) for caption in request.captions]
        error = ray.exceptions.RaySystemError("no such weights") if self.broken in rows else None
        images = np.stack([np.full((2, 2, 3), row, dtype=np.uint8) for row in rows])
        return given(error or {"seconds": 1.0}), images


class Scorer:
    """Distance of a picture is its number. losses: how many times the pictures it is sent have been lost."""

    def __init__(self, losses: int = 0) -> None:
        self.losses, self.scored = losses, 0
        self.score = Method(self._score)

    def _score(self, request: Any, pictures: Any) -> Any:
        if pictures is None:
            pictures = read_pictures(request.saved)[slice(*request.rows)]
        if self.losses and pictures[0].max() >= 2:
            self.losses -= 1
            return given(LOST)
        self.scored += len(pictures)
        return given({"distances": [float(picture.max()) for picture in pictures], "seconds": 0.5})


class Actor:
    """A simulated Ray actor as a pool's worker."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def room(self) -> None:
        return None

    async def ready(self) -> dict[str, Any]:
        return {"pid": 1}

    async def run(self, item: Any) -> Any:
        return await item(self.actor)

    def replace(self) -> None:
        return None


class Simulated(Coordinator):
    """Writes pictures in this process."""

    def __init__(self, generator: Generator, scorer: Scorer) -> None:
        super().__init__(RunConfig().model_dump(mode="json"), None)
        for name, actor in (("_generators", generator), ("_scorers", scorer)):
            made: WorkerPool = getattr(self, name)
            pool = WorkerPool(
                made.name, [Actor(actor)], max_attempts=3, timeout_s=5, failures=made.failures, hopeless=made.hopeless
            )
            setattr(self, name, pool)

    async def _save(self, measurement: Measurement, drawn: Any) -> None:
        parts = [found[1] for found in await asyncio.gather(*drawn)]
        await asyncio.sleep(0.01)
        Store(Path(measurement.store)).write_pictures(measurement.key, np.concatenate(parts))


def measurement(store: Path, **changes: Any) -> Measurement:
    content = {
        "key": "k",
        "store": str(store),
        "cls": "a",
        "captions": CAPTIONS,
        "prompts": CAPTIONS,
        "adapted": False,
        "generation": {"batch_size": 2},
        "seed": 0,
        "scorer": "style",
        "references": "",
        "references_hash": "r",
    }
    return Measurement(**{**content, **changes})


def test_items_cover_the_pictures_in_order(tmp_path) -> None:
    generator, scorer = Generator(), Scorer()
    record = asyncio.run(Simulated(generator, scorer).measure(measurement(tmp_path)))
    assert record["distances"] == [0, 1, 2, 3, 4]
    assert [item["rows"] for item in record["items"]] == [[0, 2], [2, 4], [4, 5]]
    assert record["seconds"] == {"generate": 3.0, "score": 1.5}
    assert Store(tmp_path).score("k", "style", "r") == record
    assert read_pictures(Store(tmp_path).pictures_file("k"))[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_other_words_are_asked_with_the_same_noise(tmp_path) -> None:
    class Recording(Generator):
        def __init__(self) -> None:
            super().__init__()
            self.keys: list[tuple[str, ...]] = []

        def _generate(self, request: Any) -> tuple[Any, Any]:
            self.keys.append(request.keys)
            return super()._generate(request)

    own, other = Recording(), Recording()
    asyncio.run(Simulated(own, Scorer()).measure(measurement(tmp_path / "own")))
    asyncio.run(Simulated(other, Scorer()).measure(measurement(tmp_path / "other", prompts=CAPTIONS[::-1])))
    assert own.keys == other.keys and own.drawn != other.drawn


def test_an_item_is_scored_while_the_next_is_drawn(tmp_path) -> None:
    scored = asyncio.Event()

    class Patient(Generator):
        def _generate(self, request: Any) -> tuple[Any, Any]:
            facts, images = super()._generate(request)

            async def after_the_first_score() -> Any:
                if CAPTIONS[0] not in request.captions:
                    await scored.wait()
                return await facts

            return after_the_first_score(), images

    class Telling(Scorer):
        def _score(self, request: Any, pictures: Any) -> Any:
            scored.set()
            return super()._score(request, pictures)

    record = asyncio.run(Simulated(Patient(), Telling()).measure(measurement(tmp_path)))
    assert record["distances"] == [0, 1, 2, 3, 4]
    assert all(item["generate_attempts"] == 1 for item in record["items"])


def test_lost_pictures_are_drawn_again_not_scored_again(tmp_path) -> None:
    generator, scorer = Generator(), Scorer(losses=1)
    record = asyncio.run(Simulated(generator, scorer).measure(measurement(tmp_path)))
    assert record["distances"] == [0, 1, 2, 3, 4]
    assert len(generator.drawn) == 6


def test_pictures_that_are_always_lost_are_reported(tmp_path) -> None:
    record = asyncio.run(Simulated(Generator(), Scorer(losses=99)).measure(measurement(tmp_path)))
    assert (record["failed"], record["stage"]) == (True, "score")
    assert record["reason"].startswith("ObjectLostError")


def test_equal_calls_share_one_run(tmp_path) -> None:
    generator, scorer = Generator(), Scorer()

    async def both() -> list[Any]:
        coordinator = Simulated(generator, scorer)
        return await asyncio.gather(*(coordinator.measure(measurement(tmp_path)) for _ in range(3)))

    first, second, third = asyncio.run(both())
    assert first == second == third
    assert len(generator.drawn) == 3 and scorer.scored == 5


def test_generators_wait_for_slow_scorers_however_many_jobs_there_are(tmp_path) -> None:
    class Counting(Generator):
        most = 0

        def _generate(self, request: Any) -> tuple[Any, Any]:
            found = super()._generate(request)
            self.most = max(self.most, sum(map(len, self.drawn)) - scorer.scored)
            return found

    class Slow(Scorer):
        def _score(self, request: Any, pictures: Any) -> Any:
            async def later() -> Any:
                await asyncio.sleep(0.005)
                return await super(Slow, self)._score(request, pictures)

            return later()

    generator, scorer = Counting(), Slow()

    async def all_jobs() -> list[Any]:
        coordinator = Simulated(generator, scorer)
        calls = (coordinator.measure(measurement(tmp_path, key=f"job {number}")) for number in range(8))
        return await asyncio.gather(*calls)

    assert len(asyncio.run(all_jobs())) == 8 and scorer.scored == 8 * len(CAPTIONS)
    # One generator and one scorer: two jobs lie in memory.
    assert generator.most <= 2 * len(CAPTIONS)


@pytest.mark.parametrize("change", [{"scorer": "face"}, {"references_hash": "other"}])
def test_saved_pictures_are_scored_without_being_drawn_again(tmp_path, change) -> None:
    generator, scorer = Generator(), Scorer()
    coordinator = Simulated(generator, scorer)
    first = asyncio.run(coordinator.measure(measurement(tmp_path)))
    second = asyncio.run(Simulated(generator, scorer).measure(measurement(tmp_path, **change)))
    assert second["distances"] == first["distances"] and second["seconds"]["generate"] == 0
    assert len(generator.drawn) == 3 and scorer.scored == 10


def test_an_item_that_cannot_be_drawn_fails_its_job_only(tmp_path) -> None:
    generator, scorer = Generator(broken=4), Scorer()

    async def both() -> list[Any]:
        coordinator = Simulated(generator, scorer)
        good = measurement(tmp_path, key="good", captions=CAPTIONS[:4])
        return await asyncio.gather(coordinator.measure(measurement(tmp_path)), coordinator.measure(good))

    failed, good = asyncio.run(both())
    assert (failed["failed"], failed["stage"], failed["attempts"]) == (True, "generate", 3)
    assert "no such weights" in failed["reason"]
    assert good["distances"] == [0, 1, 2, 3]
    assert not Store(tmp_path).has_pictures("k") and Store(tmp_path).score("k", "style", "r") is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RaygardError("the disk is full")])
def test_a_score_that_cannot_be_written_fails_its_job_only(tmp_path, monkeypatch, error) -> None:
    write = Store.write_score

    def full(self: Store, key: str, *args: Any) -> None:
        if key == "k":
            raise error
        write(self, key, *args)

    monkeypatch.setattr(Store, "write_score", full)

    async def both() -> list[Any]:
        coordinator = Simulated(Generator(), Scorer())
        good = measurement(tmp_path, key="good")
        return await asyncio.gather(coordinator.measure(measurement(tmp_path)), coordinator.measure(good))

    failed, good = asyncio.run(both())
    assert (failed["failed"], failed["stage"], failed["attempts"]) == (True, "score", 1)
    assert str(error.args[-1]) in failed["reason"]
    assert good["distances"] == [0, 1, 2, 3, 4]


class Started:
    """Stands for `ray.remote`: records the placement of each actor that is made, and how often it may restart."""

    def __init__(self, log: list[tuple[str, Any, int]]) -> None:
        self.log, self.content = log, {}

    def __call__(self, **content: Any) -> Any:
        def class_of(actor: Any) -> Any:
            made = Started(self.log)
            made.content = {"name": actor.__name__, **content}
            return made

        return class_of

    def options(self, **content: Any) -> Started:
        made = Started(self.log)
        made.content = {**self.content, **content}
        return made

    def remote(self, *_args: Any) -> Any:
        strategy = self.content["scheduling_strategy"]
        self.log.append((self.content["name"], strategy.placement_group, strategy.placement_group_bundle_index))
        raise ray.exceptions.RaySystemError("not started in this test")


class Group:
    def ready(self) -> Any:
        return given(None)


@pytest.mark.parametrize(
    ("settings", "generators", "scorers"),
    [
        ({"generator_cpus": 1, "scorer_gpus": 0.5}, (0, 1), (2, 3)),
        ({"generator_gpus": 1}, (0, 1), None),
        ({"scorer_cpus": 0.5}, None, (0, 1)),
        ({}, None, None),
    ],
)
def test_each_actor_that_reserves_has_a_bundle_of_its_own_for_good(monkeypatch, settings, generators, scorers) -> None:
    log: list[tuple[str, Any, int]] = []
    monkeypatch.setattr(ray, "remote", Started(log))
    monkeypatch.setattr(pool, "START_BACKOFF_S", 0)
    group = Group() if settings else None
    config = RunConfig.model_validate({"evaluation": {"generators": 2, "scorers": 2, "max_attempts": 3, **settings}})

    async def work() -> None:
        coordinator = Coordinator(config.model_dump(mode="json"), group)
        await coordinator.warm()
        while len(log) < 12:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(work(), 10))
    for name, bundles in (("GeneratorActor", generators), ("ScorerActor", scorers)):
        placed = [(used, bundle) for actor, used, bundle in log if actor == name]
        expected = [(None, -1)] * 2 if bundles is None else [(group, bundle) for bundle in bundles]
        assert sorted(placed, key=str) == sorted(expected * 3, key=str)
