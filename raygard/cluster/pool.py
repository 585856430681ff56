"""Items dispatched to a fixed number of replaceable workers, with a budget of attempts for each item.

One item at a time for each worker, so that a death is charged to the item that was on it and to no other. A worker
must say that it is ready before an item is picked for it: an item never waits for one that starts while another is
idle, and the time a start takes is nobody's failure. Everything but room in the cluster is waited for with a limit.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raygard.cluster.errors import user_mistake
from raygard.redaction import redact

# Before the second start; doubled before each one after that.
START_BACKOFF_S = 0.5
# Without room for so long, a worker does not count as one that an item could wait for.
ROOM_GRACE_S = 2.0
REASON_LENGTH = 300


class ItemFailed(Exception):
    """An item that used up its attempts. cause: the last error, None if no worker could be started."""

    def __init__(self, reason: str, attempts: int, cause: BaseException | None = None) -> None:
        super().__init__(reason)
        self.reason, self.attempts, self.cause = reason, attempts, cause


class WorkerDied(Exception):
    """The process of a worker has ended."""


class Worker(Protocol):
    """Something that runs items and may die. It raises WorkerDied, or an error the pool was told to expect."""

    async def room(self) -> None:
        """Return once there is room in the cluster to start; it may take any time and is nobody's failure."""
        ...

    async def ready(self) -> dict[str, Any]:
        """Return facts about the running worker (pid, ...) once it can take an item; never empty."""
        ...

    async def run(self, item: Any) -> Any: ...

    def replace(self) -> None:
        """End the process, if there is one, and give its resources back; the next `ready` starts another."""
        ...


@dataclass(eq=False)
class _Slot:
    """facts: of the running worker, empty if none is known to be up. blocked: it waits for room in the cluster."""

    worker: Worker
    holds: str | None = None
    busy: bool = False
    blocked: bool = False
    item: _Item | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    retired: str | None = None


@dataclass(eq=False)
class _Item:
    content: Any
    affinity: str | None
    future: asyncio.Future[tuple[Any, int]]
    attempts: int = 0
    failed_on: set[_Slot] = field(default_factory=set)


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
        """name: what the workers are called in reasons. max_attempts: of one item, and starts of one worker in a row.
        timeout_s: for one item, and for one start.

        failures: errors after which an item is repeated, beside WorkerDied; any other error is a defect, passed on.
        After an error that is neither hopeless nor a user's mistake the worker is replaced: it may be what is broken.
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
        """Start the workers that are not up, also those that could not be started before."""
        for slot in self._slots:
            if not slot.busy and not slot.facts:
                slot.retired = None
                self._start(slot)

    def status(self) -> dict[str, Any]:
        """Facts of each worker, whether it is on an item, and how many items are done, repeated, failed, waiting."""
        return {
            "workers": [
                {
                    **slot.facts,
                    "working": slot.item is not None,
                    "holds": slot.holds,
                    "blocked": slot.blocked,
                    "retired": slot.retired,
                }
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
        plan = self._plan()
        more = len(plan) < len(self._queue)
        for slot in self._slots:
            if not slot.busy and slot.retired is None and (slot in plan or (more and not slot.facts)):
                self._start(slot)

    def _plan(self) -> dict[_Slot, _Item]:
        """Which items go to the workers that are up and not on an item."""
        free = [slot for slot in self._slots if slot.facts and slot.item is None]
        items = list(self._queue)
        held = {slot.holds for slot in self._slots if slot.holds is not None}
        plan: dict[_Slot, _Item] = {}
        while (match := self._match(free, items, held)) is not None:
            slot, item = match
            plan[slot] = item
            free.remove(slot)
            items.remove(item)
            held.add(item.affinity or "")
        return plan

    def _match(self, free: list[_Slot], items: list[_Item], held: set[str]) -> tuple[_Slot, _Item] | None:
        """The oldest item a free worker holds the weights for, else the oldest whose weights nobody holds."""
        if not free:
            return None
        for item in items:
            for slot in free:
                if item.affinity is not None and slot.holds == item.affinity and self._may_take(slot, item):
                    return slot, item
        empty_first = sorted(free, key=lambda slot: slot.holds is not None)
        for item in sorted(items, key=lambda item: item.affinity in held):
            for slot in empty_first:
                if self._may_take(slot, item):
                    return slot, item
        return None

    def _may_take(self, slot: _Slot, item: _Item) -> bool:
        """Whether the item has not failed there, or has failed wherever it could be tried soon.

        A broken worker is soon idle again, and would otherwise use up the attempts of every item.
        """
        if slot not in item.failed_on:
            return True
        return all(other in item.failed_on for other in self._slots if other.retired is None and not other.blocked)

    def _start(self, slot: _Slot) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            item, slot.item, slot.busy = slot.item, None, False
            if task.cancelled():
                return
            error = task.exception()
            if error is not None and item is None:
                slot.retired = reason(error)
            elif error is not None and item is not None and not item.future.done():
                item.future.set_exception(error)
            self._dispatch()

        slot.busy = True
        # Ray takes the caller of what is submitted from a context variable: work of one item must not belong to the
        # caller of another, whose end would cancel it.
        context = contextvars.Context()
        task = asyncio.get_running_loop().create_task(self._serve(slot), context=context)
        self._tasks.add(task)
        task.add_done_callback(ended, context=context)

    async def _serve(self, slot: _Slot) -> None:
        await self._make_ready(slot)
        item = self._plan().get(slot)
        if item is not None:
            self._queue.remove(item)
            slot.item = item
            await self._attempt(slot, item)

    async def _make_ready(self, slot: _Slot) -> None:
        if slot.facts:
            if await self._ask(slot) is None:
                return
            # It died while it was idle; what it was asked for need not wait for its start.
            self._dispatch()
        error = await self._ask(slot)
        for attempt in range(1, self.max_attempts):
            if error is None:
                return
            await asyncio.sleep(START_BACKOFF_S * 2 ** (attempt - 1))
            error = await self._ask(slot)
        if error is not None:
            slot.retired = self._reason(error)

    async def _ask(self, slot: _Slot) -> Exception | None:
        """Wait until the worker is up; an error leaves it replaced."""
        try:
            if not slot.facts:
                await self._room(slot)
            slot.facts = await asyncio.wait_for(slot.worker.ready(), self.timeout_s)
        except self._expected as error:
            self._replace(slot)
            return error
        return None

    async def _room(self, slot: _Slot) -> None:
        room = asyncio.ensure_future(slot.worker.room())
        await asyncio.wait({room}, timeout=ROOM_GRACE_S)
        slot.blocked = not room.done()
        if slot.blocked:
            self._dispatch()
        try:
            await room
        finally:
            slot.blocked = False

    def _replace(self, slot: _Slot) -> None:
        slot.holds, slot.facts = None, {}
        slot.worker.replace()

    async def _attempt(self, slot: _Slot, item: _Item) -> None:
        item.attempts += 1
        # While it works, a worker counts as holding what it is loading, so that no other starts loading the same.
        slot.holds = item.affinity or slot.holds
        try:
            result = await asyncio.wait_for(slot.worker.run(item.content), self.timeout_s)
        except self._expected as error:
            slot.holds = None
            item.failed_on.add(slot)
            hopeless = self.hopeless(error)
            if user_mistake(error) is None and not hopeless:
                self._replace(slot)
            if item.future.done():
                return
            if item.attempts >= self.max_attempts or hopeless:
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
    lines = [" ".join(line.split()) for line in redact(found).splitlines() if line.strip()]
    return f"{type(found).__name__}: {lines[0] if lines else 'no message'}"[:REASON_LENGTH]


class RayWorker:
    """A Ray actor with a method `ready`, as a pool's worker. Items are functions from the actor to an awaitable."""

    def __init__(self, create: Callable[[], Any], room: Callable[[], Awaitable[Any]]) -> None:
        """create(): handle of a new actor, which Ray does not restart. room(): returns once it can be placed."""
        self._create, self._has_room = create, room
        self._actor: Any = None

    async def room(self) -> None:
        await self._has_room()

    async def ready(self) -> dict[str, Any]:
        import ray

        if self._actor is None:
            self._actor = self._create()
        try:
            return await self._actor.ready.remote()
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise
            raise WorkerDied(str(error)) from None

    async def run(self, item: Callable[[Any], Awaitable[Any]]) -> Any:
        import ray

        try:
            return await item(self._actor)
        except ray.exceptions.RayActorError as error:
            raise WorkerDied(str(error)) from None

    def replace(self) -> None:
        import ray

        # A new actor rather than a restart by Ray: until the old process is gone it would answer that it is ready,
        # and take the next item down with it.
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
