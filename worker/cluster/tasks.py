"""The tasks of a worker in a cluster, each found by its key, also before its coordinator has set it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from worker.cluster.task import ClusterTask, query_ended
from worker.ending import ended_with, this_request
from worker.errors import PlanNotSet, StageKeyConflict, UpstreamFailed, WorkerError
from worker.ticket import StageKey

# Upstream's workers wait as long (src/worker/impl_execute_task.rs), and so they do for a task that ours reads from.
PLAN_SECONDS = 10.0

# Whoever asks for a task that could not be made is told why, so long after.
FAILURE_SECONDS = 10.0


@dataclass(eq=False)
class _Entry:
    set: asyncio.Future[ClusterTask] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    principal: str | None = None
    has_failed: bool = False
    waiting: int = 0


class ClusterTasks:
    """Tasks by their keys."""

    def __init__(self) -> None:
        self._entries: dict[StageKey, _Entry] = {}

    def __len__(self) -> int:
        # A copy, because metrics are read in another thread.
        return sum(entry.taken.is_set() and not entry.has_failed for entry in list(self._entries.values()))

    @asynccontextmanager
    async def task(
        self, key: StageKey, make: Callable[[], Awaitable[tuple[str, ClusterTask]]]
    ) -> AsyncIterator[ClusterTask]:
        """Makes a task, which is there for others to find for as long as the block lasts, and then closed.

        ``make`` gives its principal too, whom the session builder may name.

        Raises:
            StageKeyConflict: there is one already.
            WorkerError: what ``make`` raised; whoever waits for the task, or asks soon after, gets it too.
        """
        entry = self._entries.setdefault(key, _Entry())
        if entry.taken.is_set():
            raise StageKeyConflict(f"task {key} has been set already")
        entry.taken.set()
        try:
            entry.principal, task = await make()
        except BaseException as error:
            entry.has_failed = True
            # Not the error itself: the session is in the frames that its traceback names.
            told: WorkerError = WorkerError("internal error: the worker's log says why")
            if isinstance(error, asyncio.CancelledError):
                told = ended_with(this_request()) or query_ended()
            elif isinstance(error, WorkerError):
                told = error
            entry.set.set_exception(UpstreamFailed(str(told), told.status))
            entry.set.exception()
            del told
            asyncio.get_running_loop().call_later(FAILURE_SECONDS, self._entries.pop, key, None)
            raise
        entry.set.set_result(task)
        try:
            yield task
        finally:
            del self._entries[key]
            await task.close(ended_with(this_request()))

    def of(self, principal: str) -> list[ClusterTask]:
        """The tasks of a principal that have their plans."""
        return [entry.set.result() for entry in self._entries.values() if entry.principal == principal]

    async def find(self, key: StageKey, principal: str | None) -> ClusterTask:
        """The task of a key, which is waited for if need be.

        Args:
            key: the task's.
            principal: who asks; None for one who knows the key and shows nothing else.

        Raises:
            PlanNotSet: no coordinator has set it, or it is another principal's.
            WorkerError: it could not be made.
        """
        entry = self._entries.setdefault(key, _Entry())
        entry.waiting += 1
        try:
            async with asyncio.timeout(PLAN_SECONDS):
                await entry.taken.wait()
            # It may wait for memory, and not for ever.
            task = await asyncio.shield(entry.set)
        except TimeoutError:
            raise _not_set(key) from None
        finally:
            entry.waiting -= 1
            if not entry.waiting and not entry.taken.is_set() and self._entries.get(key) is entry:
                del self._entries[key]
        if principal is not None and entry.principal != principal:
            raise _not_set(key)
        return task


def _not_set(key: StageKey) -> PlanNotSet:
    return PlanNotSet(f"no plan has been set for task {key} within {PLAN_SECONDS:g} s: a CoordinatorChannel sets it")
