"""Dispatch with simulated workers: retry budget, replacement, affinity, and that nothing ever hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.cluster.pool import ItemFailed, WorkerDied, WorkerPool, reason
from raygard.errors import RaygardError


class Crash(Exception):
    """Stands for an error of Ray."""


class Hopeless(Crash):
    pass


class Simulated:
    """Runs functions of the worker; counts starts. start: what `ready` does each time."""

    def __init__(self, start: Callable[[int], None] = lambda number: None) -> None:
        self.start, self.starts, self.replaced, self.log = start, 0, 0, []
        self.up = False

    async def ready(self) -> dict[str, Any]:
        if not self.up:
            self.starts += 1
            self.start(self.starts)
            self.up = True
        return {"pid": self.starts}

    async def run(self, item: Any) -> Any:
        assert self.up, "an item was given to a worker that is not ready"
        self.log.append(item)
        if callable(item):
            return await item(self)
        await asyncio.sleep(0)
        return item

    def replace(self) -> None:
        self.replaced += 1
        self.up = False


def make(workers: list[Simulated], timeout_s: float = 5) -> WorkerPool:
    return WorkerPool(
        "generator",
        workers,
        max_attempts=3,
        timeout_s=timeout_s,
        failures=(Crash,),
        hopeless=lambda error: isinstance(error, Hopeless),
    )


def play(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work, 10)

    return asyncio.run(limited())


def crashing(times: int) -> Callable[[Simulated], Any]:
    """An item that takes its worker down `times` times and then succeeds."""
    left = [times]

    async def item(worker: Simulated) -> str:
        await asyncio.sleep(0)
        if left[0]:
            left[0] -= 1
            worker.up = False
            raise WorkerDied
        return "done"

    return item


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


def test_slow_starts_are_nobodys_failure() -> None:
    def start(number: int) -> None:
        if number < 3:
            raise Crash("not yet")

    async def work() -> Any:
        return await make([Simulated(start)]).run("x")

    assert play(work()) == ("x", 1)


def test_workers_that_never_start_fail_every_item_with_the_reason() -> None:
    def start(_number: int) -> None:
        raise Crash("no such model")

    async def work() -> list[Any]:
        pool = make([Simulated(start), Simulated(start)])
        before = await asyncio.gather(*(pool.run(i) for i in range(3)), return_exceptions=True)
        after = await asyncio.gather(pool.run(3), return_exceptions=True)
        return before + after

    for failure in play(work()):
        assert isinstance(failure, ItemFailed) and failure.attempts == 0
        assert failure.reason == "no generator could be started: Crash: no such model"


def test_a_worker_that_cannot_start_leaves_its_items_to_the_others() -> None:
    def start(_number: int) -> None:
        raise Crash("no device")

    async def work() -> list[Any]:
        pool = make([Simulated(start), Simulated()])
        return await asyncio.gather(*(pool.run(i) for i in range(5)))

    assert play(work()) == [(i, 1) for i in range(5)]


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


def test_warm_starts_every_worker_once() -> None:
    workers = [Simulated(), Simulated()]

    async def work() -> dict[str, Any]:
        pool = make(workers)
        pool.warm()
        pool.warm()
        await asyncio.sleep(0.01)
        pool.warm()
        await asyncio.sleep(0.01)
        return pool.status()

    status = play(work())
    assert [worker.starts for worker in workers] == [1, 1]
    assert [worker["pid"] for worker in status["workers"]] == [1, 1]


def test_reason_is_one_line_and_prefers_a_users_mistake() -> None:
    class TaskError(Crash):
        def __init__(self, cause: Exception) -> None:
            super().__init__("a long\ntraceback")
            self.cause = cause

    assert reason(TaskError(RaygardError("lower adapt.learning_rate"))) == "lower adapt.learning_rate"
    assert reason(TaskError(ValueError("first\nsecond"))) == "ValueError: first"
    assert reason(Crash("")) == "Crash: no message"
    assert len(reason(Crash("x" * 5000))) <= 300
