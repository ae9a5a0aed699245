"""Tasks, each found by who asks and by stage key, made once there is a place for it, and kept while they are used."""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datafusion import SessionContext

from worker.ending import end, this_request
from worker.errors import StageKeyConflict, Unavailable, WorkerError
from worker.execution.admission import Admission, Claim, Demand
from worker.execution.executor import SMALL_PLAN, Executor
from worker.execution.prepare import Rewrite, prepare
from worker.execution.stream import PartitionStream
from worker.execution.task import Task, has_failed
from worker.execution.watchdog import Watchdog
from worker.ticket import PlanTicket

# Tasks that nobody uses, which later requests may; beyond so many, or so much of the memory by their plans' sizes, the
# one that idles longest is forgotten before its time.
IDLE_TASKS = 1000
IDLE_PART = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of a task, and what that is made of if it is the first to ask."""

    ticket: PlanTicket
    principal: str
    """Who asks."""
    session: SessionContext
    """What the plan is decoded in."""
    demand: Demand
    python_udf_inlining: bool
    """Whether Python functions that come inside the plan are unpickled."""
    rewrite: Rewrite | None = None
    """Is called for plans that have nodes which only a codec knows."""


class Tasks:
    """The tasks of a worker. Each ends when all its partitions were asked for, or when it has been idle for a while."""

    def __init__(self, idle_time: float, admission: Admission, executor: Executor) -> None:
        """
        Args:
            idle_time: seconds after which a task that nobody uses is forgotten.
            admission: says which tasks run at the same time.
            executor: where they run; closed with the tasks.
        """
        self._idle_time = idle_time
        self._admission = admission
        self._executor = executor
        self._watchdog = Watchdog(admission.memory, executor.journal.give_up)
        self._watching: asyncio.Future[None] | None = None
        self._closed = False
        self._entries: dict[Hashable, _Entry] = {}
        self._idle: dict[_Entry, asyncio.TimerHandle] = {}
        self._idle_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, ticket: PlanTicket, principal: str) -> bool:
        """Whether there is a task that stands for this very plan, since its principal has asked for it before."""
        entry = None if ticket.stage_key is None else self._entries.get((principal, ticket.stage_key))
        return entry is not None and entry.ticket.plan == ticket.plan

    @asynccontextmanager
    async def task(self, wanted: Wanted) -> AsyncIterator[Task]:
        """The task of a ticket, found or made, for as long as the block lasts.

        It is made once, however many ask at the same time, in the session of the one who came first; the sessions of
        the others are not used. A ticket without a stage key has a task of its own. While requests are at it, it holds
        its memory; it waits for that before its plan is decoded, and again after it has been idle.

        Raises:
            StageKeyConflict: the stage key stands for another plan.
            WorkerBusy: there is no place for the task.
            InvalidPlan, EnginePanicked: the plan does not decode; nothing is kept, the next to ask tries anew.
        """
        with self._entered(wanted) as entry:
            yield await self._task_of(entry)

    @asynccontextmanager
    async def partition(self, wanted: Wanted) -> AsyncIterator[tuple[Task, PartitionStream]]:
        """The task of a ticket and the stream of its partition, which is closed when the block ends.

        Raises:
            PartitionOutOfRange: the plan has no such partition.
            ExecutionFailed, EnginePanicked: DataFusion failed.
            StageKeyConflict, InvalidPlan: as ``task``.
            WorkerBusy: there is no place for the task, or for one more stream.
            WorkerError: the plan's input is not to be had.
        """
        ticket = wanted.ticket
        with self._entered(wanted) as entry:
            try:
                task = await self._task_of(entry)
            except asyncio.CancelledError:
                self._give_up(entry, ticket.partition)
                raise
            with (
                self._executor.places(1),
                self._executor.journal.executing(task.noted, ticket.partition),
                self._executor.open(await task.execute(ticket.partition, alone=ticket.stage_key is None)) as stream,
            ):
                yield task, stream
                ended_well = stream.ended_well
            if ended_well:
                self._executor.journal.read_to_the_end(task.noted, ticket.partition, task.partition_count)

    async def admit(self, demand: Demand) -> Claim:
        """The place of a task, waited for if need be, while memory is watched.

        Raises:
            WorkerBusy: there is none.
        """
        claim = await self._admission.admit(demand)
        self._watch()
        return claim

    async def close(self) -> None:
        """Ends all tasks, and the executor with them."""
        self._closed = True
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in list(self._entries.values()):
            self._forget(entry)
        await self._executor.close()
        for task in tasks:
            await task.close()

    @contextmanager
    def _entered(self, wanted: Wanted) -> "Iterator[_Entry]":
        """The entry of a ticket, which the running request uses for as long as the block lasts."""
        entry, request = self._entry(wanted), this_request()
        self._enter(entry, request)
        try:
            yield entry
        finally:
            self._leave(entry, request)

    def _entry(self, wanted: Wanted) -> "_Entry":
        if self._closed:
            raise Unavailable("the worker was closed")
        ticket = wanted.ticket
        key: Hashable = object() if ticket.stage_key is None else (wanted.principal, ticket.stage_key)
        entry = self._entries.get(key)
        if entry is None:
            make = partial(self._make, wanted)
            entry = self._entries[key] = _Entry(key, ticket, wanted.demand, make)
            self._executor.users.add(entry)
        elif entry.ticket.plan != ticket.plan:
            raise StageKeyConflict(f"stage key {ticket.stage_key} already stands for another plan: make a new key")
        elif (entry.ticket.task_index, entry.ticket.task_count) != (ticket.task_index, ticket.task_count):
            raise StageKeyConflict(
                f"stage key {ticket.stage_key} already stands for task {entry.ticket.task_index} of "
                f"{entry.ticket.task_count}, this is {ticket.task_index} of {ticket.task_count}: make a new key"
            )
        return entry

    async def _task_of(self, entry: "_Entry") -> Task:
        """The entry's task, made once it has its place."""
        if entry.claim is None:
            await self._admit(entry)
        return await asyncio.shield(self._start(entry))

    async def _admit(self, entry: "_Entry") -> None:
        """Gets the entry its place, which all who need it wait for together."""
        if entry.admitting is None:
            if claim := self._admission.try_admit(entry.demand):
                self._hold(entry, claim)
                return
            entry.admitting = self._executor.in_background(self._wait(entry))
        await asyncio.shield(entry.admitting)

    async def _wait(self, entry: "_Entry") -> None:
        try:
            self._hold(entry, await self._admission.admit(entry.demand))
        finally:
            # Unless it is another already. In no variable: an error would be in a circle with this frame.
            if entry.admitting is this_request():
                entry.admitting = None

    def _hold(self, entry: "_Entry", claim: Claim) -> None:
        claim.end = partial(self._end, entry)
        entry.claim = claim
        self._watch()

    def _start(self, entry: "_Entry") -> asyncio.Future[Task]:
        """The task, or one in the making; the first who comes here, with the place there is, has it made."""
        making = entry.making
        if making is None:
            making = entry.making = entry.make()
            # It holds the session.
            entry.make = _made_already
            if not making.done():
                making.add_done_callback(lambda _: self._made(entry))
            for partition in entry.given_up:
                self._give_up(entry, partition)
        return making

    def _made(self, entry: "_Entry") -> None:
        if entry.task is None:
            self._forget(entry)
        # It may be that all who wanted it have gone.
        self._settle(entry)

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = self._executor.in_background(self._watchdog.watch(self._admission.claims))

    def _end(self, entry: "_Entry", error: WorkerError) -> None:
        """Ends a task and all requests that are at it."""
        self._forget(entry)
        for request in list(entry.requests):
            end(request, error)

    def _enter(self, entry: "_Entry", request: asyncio.Task[Any]) -> None:
        entry.requests.add(request)
        self._stop_idling(entry)

    def _leave(self, entry: "_Entry", request: asyncio.Task[Any]) -> None:
        entry.requests.discard(request)
        self._settle(entry)

    def _settle(self, entry: "_Entry") -> None:
        """Gives back the place of an entry that nobody uses, and has it idle or forgets it."""
        if entry.is_in_use:
            return
        if entry.admitting is not None:
            entry.admitting.cancel()
            entry.admitting = None
        if entry.claim is not None:
            entry.claim.release()
            entry.claim = None
        if entry.task is None or entry.ended or self._entries.get(entry.key) is not entry:
            self._forget(entry)
        elif entry not in self._idle:
            self._idle[entry] = asyncio.get_running_loop().call_later(self._idle_time, self._forget, entry)
            self._idle_bytes += len(entry.ticket.plan)
            while len(self._idle) > IDLE_TASKS or self._idle_bytes > self._admission.memory // IDLE_PART:
                self._forget(next(iter(self._idle)))

    def _stop_idling(self, entry: "_Entry") -> None:
        if timer := self._idle.pop(entry, None):
            timer.cancel()
            self._idle_bytes -= len(entry.ticket.plan)

    def _give_up(self, entry: "_Entry", partition: int) -> None:
        """Says that a caller went away before the partition was executed."""
        if entry.making is None:
            entry.given_up.add(partition)
        else:
            self._executor.in_background(self._give_up_made(entry, entry.making, partition))

    async def _give_up_made(self, entry: "_Entry", making: asyncio.Future[Task], partition: int) -> None:
        this = this_request()
        self._enter(entry, this)
        try:
            await asyncio.wait([making])
            if task := entry.task:
                task.give_up(partition)
        finally:
            self._leave(entry, this)

    def _make(self, wanted: Wanted) -> asyncio.Future[Task]:
        executor, session, ticket = self._executor, wanted.session, wanted.ticket
        executor.count_decoded()

        def make() -> Task:
            noted = executor.journal.admit(ticket.plan, ticket.stage_key)
            with executor.journal.decoding(noted):
                prepared = executor.timed(
                    prepare, session, ticket.plan, executor.limits, wanted.python_udf_inlining, wanted.rewrite
                )
                return Task(executor, noted, session, *prepared)

        # A function that is unpickled may do anything, and for long.
        if len(ticket.plan) <= SMALL_PLAN and not wanted.python_udf_inlining:
            made: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
            made.set_result(make())
            return made
        return executor.in_background(executor.in_thread(make))

    def _forget(self, entry: "_Entry") -> None:
        """Lets nobody find it any more, and ends it if nobody uses it."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._executor.users.discard(entry)
        self._stop_idling(entry)
        task = entry.task
        if task is not None and task.input is not None and not entry.is_in_use and not self._closed:
            self._executor.in_background(task.close())


@dataclass(eq=False)
class _Entry:
    """What a key stands for: a task, one in the making, or one that waits for its place; and who uses it."""

    key: Hashable
    ticket: PlanTicket
    demand: Demand
    make: Callable[[], asyncio.Future[Task]]
    making: asyncio.Future[Task] | None = None
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    claim: Claim | None = None
    admitting: asyncio.Future[None] | None = None
    given_up: set[int] = field(default_factory=set)
    """Partitions whose callers went away before it was made."""

    @property
    def task(self) -> Task | None:
        """The task, None until it is made and when that failed."""
        if self.making is None or not self.making.done() or has_failed(self.making):
            return None
        return self.making.result()

    @property
    def is_in_use(self) -> bool:
        return bool(self.requests) or (self.making is not None and not self.making.done())

    @property
    def ended(self) -> bool:
        return self.ticket.stage_key is None or (self.task is not None and self.task.ended)


def _made_already() -> asyncio.Future[Task]:
    raise RuntimeError("a task is made once")
