"""Dispatch with simulated workers: retry budget, replacement, affinity, and that nothing ever hangs."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from raygard.cluster import pool as pool_module
from raygard.cluster.pool import ItemFailed, RayWorker, WorkerDied, WorkerPool, reason
from raygard.errors import RaygardError

CALLER: contextvars.ContextVar[int | None] = contextvars.ContextVar("CALLER", default=None)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "START_BACKOFF_S", 0.01)
    monkeypatch.setattr(pool_module, "ROOM_GRACE_S", 0.01)


class Crash(Exception):
    """Stands for an error of Ray."""


class Hopeless(Crash):
    pass


class Simulated:
    """Runs functions of the worker; counts starts. start: what `ready` does each time. full: the cluster has no room.

    A worker that does not start stays as it is until it is replaced, as an actor does.
    """

    def __init__(self, start: Callable[[int], Any] = lambda number: None, full: asyncio.Event | None = None) -> None:
        self.start, self.starts, self.replaced, self.log = start, 0, 0, []
        self.up, self.broken, self.free = False, None, full

    async def room(self) -> None:
        if self.free is not None:
            await self.free.wait()

    async def ready(self) -> dict[str, Any]:
        if self.broken is not None:
            raise self.broken
        if not self.up:
            self.starts += 1
            try:
                started = self.start(self.starts)
            except Crash as error:
                self.broken = error
                raise
            if started is not None:
                await started
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
        self.up, self.broken = False, None


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


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.001)


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


def test_waiting_for_room_is_not_a_failed_start() -> None:
    async def work() -> tuple[Any, Any, dict[str, Any]]:
        free = asyncio.Event()
        worker = Simulated(full=free)
        pool = make([worker], timeout_s=0.02)
        call = asyncio.ensure_future(pool.run("x"))
        await asyncio.sleep(0.2)
        waiting = pool.status()["workers"][0]
        free.set()
        return await call, worker.starts, waiting

    result, starts, waiting = play(work())
    assert (result, starts) == (("x", 1), 1)
    assert waiting["blocked"] and waiting["retired"] is None


def test_a_retry_does_not_wait_for_a_worker_without_room() -> None:
    async def work() -> Any:
        return await make([Simulated(), Simulated(full=asyncio.Event())]).run(crashing(2))

    assert play(work()) == ("done", 3)


def test_a_retired_worker_gets_another_chance_when_warmed() -> None:
    down = [True]

    def start(_number: int) -> None:
        if down[0]:
            raise Crash("no device")

    async def work() -> tuple[Any, Any]:
        pool = make([Simulated(start)])
        with pytest.raises(ItemFailed):
            await pool.run("x")
        down[0] = False
        pool.warm()
        return await pool.run("y"), pool.status()["workers"][0]["retired"]

    assert play(work()) == (("y", 1), None)


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


def test_an_item_does_not_wait_for_a_worker_that_starts_while_another_is_idle() -> None:
    never = asyncio.Event()
    first, second = Simulated(lambda number: never.wait() if number > 1 else None), Simulated()

    async def work() -> Any:
        pool = make([first, second], timeout_s=60)
        pool.warm()
        await until(lambda: first.up and second.up)
        await pool.run("x", affinity="a")
        assert first.log == ["x"]
        await asyncio.sleep(0.01)
        first.broken = WorkerDied()
        return await pool.run("y", affinity="a")

    assert play(work()) == ("y", 1)
    assert second.log == ["y"]


def test_an_item_goes_to_the_worker_that_is_up_first() -> None:
    never = asyncio.Event()
    slow, quick = Simulated(lambda number: never.wait()), Simulated()

    async def work() -> list[Any]:
        pool = make([slow, quick], timeout_s=60)
        return await asyncio.gather(*(pool.run(i) for i in range(3)))

    assert play(work()) == [(0, 1), (1, 1), (2, 1)]


def test_starts_are_counted_spaced_and_leave_no_process_behind(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "START_BACKOFF_S", 0.05)
    times: list[float] = []

    def start(_number: int) -> None:
        times.append(asyncio.get_running_loop().time())
        raise Crash("no device")

    worker = Simulated(start)

    async def work() -> None:
        await make([worker]).run("x")

    with pytest.raises(ItemFailed, match="no generator could be started: Crash: no device"):
        play(work())
    assert worker.starts == worker.replaced == 3
    first, second = (after - before for before, after in pairwise(times))
    assert first >= 0.99 * pool_module.START_BACKOFF_S and second >= 1.99 * pool_module.START_BACKOFF_S


def test_a_process_that_dies_while_it_starts_says_so() -> None:
    def start(_number: int) -> None:
        raise WorkerDied

    async def work() -> None:
        await make([Simulated(start)]).run("x")

    with pytest.raises(ItemFailed, match="no generator could be started: the generator's process died"):
        play(work())


def test_a_defect_in_a_start_is_reported_and_does_not_hang() -> None:
    def start(_number: int) -> None:
        raise ZeroDivisionError("a defect")

    async def work() -> None:
        await make([Simulated(start)]).run("x")

    with pytest.raises(ItemFailed, match="no generator could be started: ZeroDivisionError: a defect"):
        play(work())


class Handle:
    """A simulated actor handle. answers: what its calls return or raise, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.killed = list(answers), False
        self.ready = self

    async def remote(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def handles(monkeypatch) -> Callable[..., tuple[RayWorker, list[Handle]]]:
    """A worker whose actors answer as told, one after the other, and all handles it was given."""

    def made(*answers: tuple[Any, ...]) -> tuple[RayWorker, list[Handle]]:
        given, waiting = [], [Handle(*each) for each in answers]

        def create() -> Handle:
            given.append(waiting.pop(0))
            return given[-1]

        async def room() -> None:
            return None

        return RayWorker(create, room), given

    monkeypatch.setattr(ray, "kill", lambda handle: setattr(handle, "killed", True))
    return made


def test_a_ray_worker_keeps_its_actor_until_it_is_replaced(handles) -> None:
    worker, given = handles(({"pid": 1}, {"pid": 1}), ({"pid": 2},))

    async def work() -> list[Any]:
        return [await worker.ready(), await worker.ready(), worker.replace(), await worker.ready()]

    assert play(work()) == [{"pid": 1}, {"pid": 1}, None, {"pid": 2}]
    assert [handle.killed for handle in given] == [True, False]
    worker.replace()
    worker.replace()
    assert [handle.killed for handle in given] == [True, True]


@pytest.mark.parametrize(
    "error", [ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("", b"0" * 16)]
)
def test_deaths_of_actors_are_deaths_of_workers(handles, error) -> None:
    worker, _ = handles((error,))
    with pytest.raises(WorkerDied):
        play(worker.ready())

    async def item(_actor: Handle) -> None:
        raise error

    with pytest.raises(WorkerDied):
        play(worker.run(item))


def test_actors_that_die_at_their_start_are_retired_and_killed(handles) -> None:
    died = (ray.exceptions.ActorDiedError(),)
    worker, given = handles(died, died, died)

    async def work() -> None:
        pool = WorkerPool("scorer", [worker], max_attempts=3, timeout_s=5, failures=(ray.exceptions.RayError,))
        await pool.run("x")

    with pytest.raises(ItemFailed, match="no scorer could be started: the scorer's process died"):
        play(work())
    assert [handle.killed for handle in given] == [True, True, True]


def test_reason_is_one_line_and_prefers_a_users_mistake() -> None:
    class TaskError(Crash):
        def __init__(self, cause: Exception) -> None:
            super().__init__("a long\ntraceback")
            self.cause = cause

    assert reason(TaskError(RaygardError("lower adapt.learning_rate"))) == "lower adapt.learning_rate"
    assert reason(TaskError(ValueError("first\nsecond"))) == "ValueError: first"
    assert reason(Crash("")) == "Crash: no message"
    assert len(reason(Crash("x" * 5000))) <= 300
