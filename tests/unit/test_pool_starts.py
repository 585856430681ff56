"""Starts of a pool's workers: what counts as a failure, what is waited for, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import ray

from raygard.cluster import pool as pool_module
from raygard.cluster.pool import ItemFailed, RayWorker, WorkerDied, WorkerPool
from tests.unit.simulated_workers import Crash, Simulated, crashing, make, play, until


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "START_BACKOFF_S", 0.01)
    monkeypatch.setattr(pool_module, "ROOM_GRACE_S", 0.01)


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
