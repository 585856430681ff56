"""Workers that start, die and hang as a test says, for the tests of the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from raygard.cluster.pool import WorkerDied, WorkerPool


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
