"""Dispatch with simulated workers: retry budget, replacement, affinity, and that nothing ever hangs."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.cluster import pool as pool_module
from raygard.cluster.pool import ItemFailed, WorkerDied, WorkerPool, reason
from raygard.errors import RaygardError
from tests.unit.simulated_workers import Crash, Hopeless, Simulated, crashing, make, play

CALLER: contextvars.ContextVar[int | None] = contextvars.ContextVar("CALLER", default=None)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "START_BACKOFF_S", 0.01)
    monkeypatch.setattr(pool_module, "ROOM_GRACE_S", 0.01)


@settings(deadline=None)
@given(
    num_workers=st.integers(1, 3),
    crashes=st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_each_item_is_charged_for_its_own_crashes_only(num_workers, crashes) -> None:
    async def work() -> tuple[list[Any], dict[str, Any]]:
        pool = make([Simulated() for _ in range(num_workers)])
        calls = [pool.run(crashing(times)) for times in crashes]
        return await asyncio.gather(*calls, return_exceptions=True), pool.status()

    results, status = play(work())
    for times, result in zip(crashes, results, strict=True):
        if times < 3:
            assert result == ("done", times + 1)
        else:
            assert isinstance(result, ItemFailed) and result.attempts == 3
            assert result.reason == "the generator's process died"
    assert status["done"] == sum(times < 3 for times in crashes)
    assert status["failed"] == sum(times >= 3 for times in crashes)
    assert status["retried"] == sum(min(times, 2) for times in crashes)
    assert status["queued"] == 0


def test_one_item_at_a_time_on_each_worker() -> None:
    running, most = set(), [0]

    async def item(worker: Simulated) -> None:
        assert worker not in running
        running.add(worker)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0.001)
        running.remove(worker)

    async def work() -> None:
        pool = make([Simulated(), Simulated()])
        await asyncio.gather(*(pool.run(item) for _ in range(20)))

    play(work())
    assert most[0] == 2


def test_a_silent_worker_is_replaced_and_its_item_retried() -> None:
    worker, silent = Simulated(), [True]

    async def item(_worker: Simulated) -> str:
        if silent.pop() if silent else False:
            await asyncio.sleep(60)
        return "done"

    async def work() -> Any:
        return await make([worker], timeout_s=0.05).run(item)

    assert play(work()) == ("done", 2)
    assert (worker.replaced, worker.starts) == (1, 2)


def test_an_item_that_is_always_silent_is_reported() -> None:
    async def item(_worker: Simulated) -> None:
        await asyncio.sleep(60)

    async def work() -> None:
        await make([Simulated()], timeout_s=0.02).run(item)

    with pytest.raises(ItemFailed, match=r"the generator did not answer within 0\.02 s") as caught:
        play(work())
    assert caught.value.attempts == 3


def test_hopeless_items_are_not_repeated() -> None:
    async def item(_worker: Simulated) -> None:
        raise Hopeless("its input is gone")

    async def work() -> None:
        await make([Simulated()]).run(item)

    with pytest.raises(ItemFailed) as caught:
        play(work())
    assert caught.value.attempts == 1 and isinstance(caught.value.cause, Hopeless)


def test_a_defect_is_passed_on_and_does_not_hang() -> None:
    async def item(_worker: Simulated) -> None:
        raise ZeroDivisionError("a defect")

    async def work() -> Any:
        pool = make([Simulated()])
        with pytest.raises(ZeroDivisionError):
            await pool.run(item)
        return await pool.run("next")

    assert play(work()) == ("next", 1)


def test_a_cancelled_call_leaves_the_queue() -> None:
    worker = Simulated()

    async def slow(_worker: Simulated) -> None:
        await asyncio.sleep(0.02)

    async def work() -> None:
        pool = make([worker])
        first = asyncio.ensure_future(pool.run(slow))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(pool.run("dropped"))
        await asyncio.sleep(0)
        second.cancel()
        await first
        await pool.run("last")

    play(work())
    assert worker.log == [slow, "last"]


@settings(deadline=None)
@given(st.permutations(["a"] * 4 + ["b"] * 4))
def test_no_worker_goes_back_to_weights_it_has_left(order) -> None:
    workers = [Simulated(), Simulated()]

    async def work() -> None:
        pool = make(workers)
        await asyncio.gather(*(pool.run((index, name), affinity=name) for index, name in enumerate(order)))

    play(work())
    for worker in workers:
        names = [name for _, name in worker.log]
        assert sum(first != second for first, second in pairwise(names)) <= 1


def test_an_idle_worker_that_holds_the_weights_is_preferred() -> None:
    workers = [Simulated() for _ in range(3)]

    async def work() -> None:
        pool = make(workers)
        for name in ("a", "b", "a", "b", "a"):
            await pool.run(name, affinity=name)

    play(work())
    assert [worker.log for worker in workers] == [["a", "a", "a"], ["b", "b"], []]


@pytest.mark.parametrize("error", [Crash("sticky"), WorkerDied(), RaygardError("no finite distance")])
def test_one_broken_worker_does_not_eat_the_items(error) -> None:
    broken, good = Simulated(), Simulated()

    class Mistake(Crash):
        cause = error

    async def item(worker: Simulated) -> str:
        if worker is broken:
            raise Mistake if isinstance(error, RaygardError) else error
        await asyncio.sleep(0.002)
        return "done"

    async def work() -> list[Any]:
        pool = make([broken, good])
        return await asyncio.gather(*(pool.run(item) for _ in range(30)))

    results = play(work())
    assert [result for result, _ in results] == ["done"] * 30
    assert max(attempts for _, attempts in results) <= 2 and len(broken.log) >= 1


def test_a_process_with_a_lasting_error_is_replaced_and_the_only_worker_gets_the_retry() -> None:
    worker = Simulated()

    async def item(_worker: Simulated) -> int:
        if worker.starts == 1:
            raise Crash("CUDA error: an illegal memory access was encountered")
        return worker.starts

    async def work() -> Any:
        return await make([worker]).run(item)

    assert play(work()) == (2, 2)


@pytest.mark.parametrize("error", [Hopeless("its input is gone"), RaygardError("lower the learning rate")])
def test_a_process_is_kept_after_what_is_not_its_fault(error) -> None:
    worker = Simulated()

    class TaskError(Hopeless if isinstance(error, Hopeless) else Crash):
        cause = error

    async def item(_worker: Simulated) -> None:
        raise TaskError

    async def work() -> Any:
        pool = make([worker])
        with pytest.raises(ItemFailed):
            await pool.run(item)
        return await pool.run("next")

    assert play(work()) == ("next", 1)
    assert (worker.starts, worker.replaced) == (1, 0)


OUTCOMES = st.lists(st.sampled_from(["fine", "raises", "dies", "mistake"]), max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    starts=st.lists(OUTCOMES, min_size=1, max_size=3),
    runs=OUTCOMES,
    affinities=st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=8),
)
def test_whatever_fails_every_item_ends(starts, runs, affinities) -> None:
    errors = {"raises": Crash("now and then"), "dies": WorkerDied(), "mistake": Crash("yours")}
    errors["mistake"].cause = RaygardError("yours")
    left = list(runs)

    def starting(outcomes: list[str]) -> Callable[[int], None]:
        def start(number: int) -> None:
            if outcomes[number - 1 : number] not in ([], ["fine"]):
                raise errors[outcomes[number - 1]]

        return start

    async def item(_worker: Simulated) -> str:
        await asyncio.sleep(0)
        outcome = left.pop() if left else "fine"
        if outcome != "fine":
            raise errors[outcome]
        return "done"

    async def work() -> tuple[list[Any], dict[str, Any]]:
        pool = make([Simulated(starting(outcomes)) for outcomes in starts])
        calls = [pool.run(item, affinity) for affinity in affinities]
        return await asyncio.gather(*calls, return_exceptions=True), pool.status()

    results, status = play(work())
    failures = [result for result in results if isinstance(result, ItemFailed)]
    assert all(result[0] == "done" and result[1] <= 3 for result in results if result not in failures)
    assert (status["done"], status["failed"], status["queued"]) == (len(results) - len(failures), len(failures), 0)


def test_work_of_one_item_does_not_run_in_the_context_of_another() -> None:
    seen: list[tuple[int, int | None]] = []

    def item(number: int) -> Callable[[Simulated], Any]:
        async def run(_worker: Simulated) -> None:
            seen.append((number, CALLER.get()))
            await asyncio.sleep(0.001)

        return run

    async def caller(pool: WorkerPool, number: int) -> None:
        CALLER.set(number)
        await pool.run(item(number))

    async def work() -> None:
        pool = make([Simulated(), Simulated()])
        await asyncio.gather(*(asyncio.create_task(caller(pool, number)) for number in range(6)))

    play(work())
    assert len(seen) == 6
    assert all(context in (None, number) for number, context in seen), seen


def test_reason_is_one_line_and_prefers_a_users_mistake() -> None:
    class TaskError(Crash):
        def __init__(self, cause: Exception) -> None:
            super().__init__("a long\ntraceback")
            self.cause = cause

    assert reason(TaskError(RaygardError("lower adapt.learning_rate"))) == "lower adapt.learning_rate"
    assert reason(TaskError(ValueError("first\nsecond"))) == "ValueError: first"
    assert reason(Crash("")) == "Crash: no message"
    assert len(reason(Crash("x" * 5000))) <= 300
