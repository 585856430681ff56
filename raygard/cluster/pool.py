"""Items dispatched to a fixed number of replaceable workers, with a budget of attempts for each item.

One item at a time for each worker, so that a death is charged to the item that was on it and to no other. A worker
must say that it is ready before it is given an item: the time it takes to start, or to start again, is nobody's
failure. Everything waits with a limit, so nothing hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raygard.cluster.errors import user_mistake

RESTART_POLL_S = 0.1
REASON_LENGTH = 300


class ItemFailed(Exception):
    """An item that used up its attempts. cause: the last error, None if no worker could be started."""

    def __init__(self, reason: str, attempts: int, cause: BaseException | None = None) -> None:
        super().__init__(reason)
        self.reason, self.attempts, self.cause = reason, attempts, cause


class WorkerDied(Exception):
    """The process of a worker ended while it was on an item."""


class Worker(Protocol):
    """Something that runs items and may die. It raises WorkerDied, or an error the pool was told to expect."""

    async def ready(self) -> dict[str, Any]:
        """Return facts about the running worker (pid, ...) once it can take an item."""
        ...

    async def run(self, item: Any) -> Any: ...

    def replace(self) -> None:
        """Give up on the running worker, which does not answer; the next `ready` starts another."""
        ...


@dataclass(eq=False)
class _Slot:
    worker: Worker
    holds: str | None = None
    busy: bool = False
    working: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    retired: str | None = None


@dataclass(eq=False)
class _Item:
    content: Any
    affinity: str | None
    future: asyncio.Future[tuple[Any, int]]
    attempts: int = 0


class WorkerPool:
    """Runs items on workers, repeats those that fail, and reports those that keep failing."""

    def __init__(
        self,
        name: str,
        workers: Sequence[Worker],
        *,
        max_attempts: int,
        timeout_s: float,
        failures: tuple[type[Exception], ...],
        hopeless: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        """name: what the workers are called in reasons. timeout_s: for one item, and for one start.

        failures: errors after which an item is repeated, beside WorkerDied; any other error is a defect, passed on.
        hopeless(error): the item cannot succeed on any worker, and is not repeated.
        """
        self.name, self.max_attempts, self.timeout_s = name, max_attempts, timeout_s
        self.failures, self.hopeless = (*failures, WorkerDied), hopeless
        self._expected: tuple[type[Exception], ...] = (*self.failures, TimeoutError)
        self.done = self.retried = self.failed = 0
        self._slots = [_Slot(worker) for worker in workers]
        self._queue: list[_Item] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, content: Any, affinity: str | None = None) -> tuple[Any, int]:
        """Result of an item and the attempts it took; a cancelled call takes the item out of the queue.

        affinity: what a worker has loaded after the item; workers that hold it are preferred.
        Raises ItemFailed when the attempts are used up or no worker can be started.
        """
        item = _Item(content, affinity, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self._dispatch()
        try:
            return await item.future
        finally:
            if item in self._queue:
                self._queue.remove(item)

    def warm(self) -> None:
        """Start the workers that have not been started."""
        for slot in self._slots:
            if not slot.busy and not slot.facts and slot.retired is None:
                self._start(slot, None)

    def status(self) -> dict[str, Any]:
        """Facts of each worker, whether it is on an item, and how many items are done, repeated, failed, waiting."""
        return {
            "workers": [
                {**slot.facts, "working": slot.working, "holds": slot.holds, "retired": slot.retired}
                for slot in self._slots
            ],
            "done": self.done,
            "retried": self.retried,
            "failed": self.failed,
            "queued": len(self._queue),
        }

    def _dispatch(self) -> None:
        if all(slot.retired is not None for slot in self._slots):
            reason = next(slot.retired for slot in self._slots if slot.retired)
            for item in self._queue:
                self._give_up(item, ItemFailed(f"no {self.name} could be started: {reason}", item.attempts))
            self._queue.clear()
        while self._queue:
            idle = [slot for slot in self._slots if not slot.busy and slot.retired is None]
            if not idle:
                return
            slot, item = self._match(idle)
            self._queue.remove(item)
            self._start(slot, item)

    def _match(self, idle: list[_Slot]) -> tuple[_Slot, _Item]:
        """The oldest item an idle worker holds the weights for, else the oldest whose weights nobody holds."""
        for item in self._queue:
            for slot in idle:
                if item.affinity is not None and slot.holds == item.affinity:
                    return slot, item
        held = {slot.holds for slot in self._slots if slot.holds is not None}
        item = next((item for item in self._queue if item.affinity not in held), self._queue[0])
        return next((slot for slot in idle if slot.holds is None), idle[0]), item

    def _start(self, slot: _Slot, item: _Item | None) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None and item is not None and not item.future.done():
                item.future.set_exception(error)

        slot.busy = True
        task = asyncio.get_running_loop().create_task(self._serve(slot, item))
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def _serve(self, slot: _Slot, item: _Item | None) -> None:
        try:
            await self._make_ready(slot)
            if item is not None and not item.future.done():
                if slot.retired is None:
                    await self._attempt(slot, item)
                else:
                    self._queue.insert(0, item)
        finally:
            slot.busy = slot.working = False
            self._dispatch()

    async def _make_ready(self, slot: _Slot) -> None:
        for attempt in range(1, self.max_attempts + 1):
            try:
                slot.facts = await asyncio.wait_for(slot.worker.ready(), self.timeout_s)
                return
            except self._expected as error:
                slot.holds = None
                if not isinstance(error, self.failures):
                    slot.worker.replace()
                if attempt == self.max_attempts:
                    slot.retired = self._reason(error)

    async def _attempt(self, slot: _Slot, item: _Item) -> None:
        item.attempts += 1
        slot.working = True
        # While it works, a worker counts as holding what it is loading, so that no other starts loading the same.
        slot.holds = item.affinity or slot.holds
        try:
            result = await asyncio.wait_for(slot.worker.run(item.content), self.timeout_s)
        except self._expected as error:
            slot.holds = None
            if not isinstance(error, self.failures):
                slot.worker.replace()
            last = item.attempts >= self.max_attempts or self.hopeless(error)
            if item.future.done():
                return
            if last:
                self._give_up(item, ItemFailed(self._reason(error), item.attempts, error))
            else:
                self.retried += 1
                self._queue.append(item)
        else:
            self.done += 1
            if not item.future.done():
                item.future.set_result((result, item.attempts))

    def _give_up(self, item: _Item, failure: ItemFailed) -> None:
        self.failed += 1
        if not item.future.done():
            item.future.set_exception(failure)

    def _reason(self, error: BaseException) -> str:
        if not isinstance(error, self.failures):
            return f"the {self.name} did not answer within {self.timeout_s:g} s"
        return f"the {self.name}'s process died" if isinstance(error, WorkerDied) else reason(error)


def reason(error: BaseException) -> str:
    """One line that says what went wrong in another process."""
    mistake = user_mistake(error)
    if mistake is not None:
        return mistake
    cause = getattr(error, "cause", None)
    found = cause if isinstance(cause, BaseException) else error
    lines = [" ".join(line.split()) for line in str(found).splitlines() if line.strip()]
    return f"{type(found).__name__}: {lines[0] if lines else 'no message'}"[:REASON_LENGTH]


class RayWorker:
    """A Ray actor with a method `ready`, as a pool's worker. Items are functions from the actor to an awaitable."""

    def __init__(self, create: Callable[[], Any]) -> None:
        """create(): a new actor handle, of an actor that Ray restarts when its process dies."""
        self._create = create
        self._actor: Any = None

    async def ready(self) -> dict[str, Any]:
        import ray

        if self._actor is None:
            self._actor = self._create()
        while True:
            try:
                return await self._actor.ready.remote()
            except ray.exceptions.ActorUnavailableError:
                # Its process died and Ray is starting another.
                await asyncio.sleep(RESTART_POLL_S)
            except ray.exceptions.ActorDiedError:
                self._actor = None
                raise

    async def run(self, item: Callable[[Any], Awaitable[Any]]) -> Any:
        import ray

        try:
            return await item(self._actor)
        except ray.exceptions.RayActorError as error:
            raise WorkerDied(str(error)) from None

    def replace(self) -> None:
        import ray

        # A new actor rather than a restart: until the old process is gone it would answer that it is ready, and
        # take the next item down with it.
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
