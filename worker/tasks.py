"""Tasks: one instance of a plan each, found by who asks and by stage key, and the streams of their partitions."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import pyarrow as pa
from datafusion import ExecutionPlan, RecordBatchStream, SessionContext

from worker import plan, plan_proto
from worker.admission import Admission, Claim, Demand
from worker.config import MEBIBYTE, PlanLimits
from worker.durations import Durations, Histogram
from worker.encode import Encoder
from worker.ending import end, this_request
from worker.errors import InvalidPlan, PartitionOutOfRange, StageKeyConflict, Unavailable, WorkerBusy, WorkerError
from worker.leftover import LeftoverCalls
from worker.message import Message
from worker.partitionwise import counterparts, make_partitions_independent
from worker.plan_proto import Message as PlanMessage
from worker.stream import PartitionStream, ReadThreads, let_go
from worker.supervision.journal import Journal, Noted
from worker.ticket import PlanTicket, StageKey
from worker.watchdog import Watchdog

T = TypeVar("T")

# Decoding holds the GIL, so that more threads make nothing faster. ``execute`` waits for a free thread of DataFusion's
# runtime; while other plans keep those busy for long, nothing that is decoded behind it could run either.
THREADS = 8

# Bytes of their stacks. Chains of operands are flat in a plan, and as deep as they are long in what is decoded. As much
# memory is used as there is of calls.
STACK = 512 * MEBIBYTE

# Plans of up to so many bytes are decoded on the event loop: a thread would hold the GIL, and the loop with it, for as
# long (0.1 to 0.5 ms), and to get there and back takes longer than that.
SMALL_PLAN = 8 * 1024

# A partition that nobody will read is polled before it is dropped: only then does a RepartitionExec know that nobody
# reads it, and stops to buffer for it. The poll happens in DataFusion's runtime, at once unless that is busy.
ABANDON_SECONDS = 0.2

# A function that DataFusion still calls for who went away is looked for so often, and broken off.
LEFTOVER_SECONDS = 0.1

# Tasks that nobody uses, which later requests may; beyond so many, or so much of the memory by their plans' sizes, the
# one that idles longest is forgotten before its time.
IDLE_TASKS = 1000
IDLE_PART = 8

# Tickets do not say when their query began: those of coordinators count as younger than all others.
LAST_AGE = 1 << 64

# Nodes that pass on what they read and take nothing from the memory pool. A plan of these alone needs no place in
# memory, so that readers that are slow keep no others away.
STREAMING_NODES = frozenset(
    {
        "arrow_scan",
        "avro_scan",
        "coalesce_batches",
        "cooperative",
        "csv_scan",
        "empty",
        "filter",
        "generate_series",
        "global_limit",
        "json_scan",
        "local_limit",
        "memory_scan",
        "merge",
        "parquet_scan",
        "placeholder_row",
        "projection",
        "union",
    }
)


class Input(Protocol):
    """What a plan has to be given before it can be executed."""

    @property
    def is_empty(self) -> bool:
        """Whether it needs none."""
        ...

    async def fetch(self) -> PlanMessage:
        """The plan with everything that it reads; called again after it has failed or was cancelled.

        Raises:
            WorkerError: it is not to be had.
        """
        ...

    async def close(self) -> None:
        """Deletes what is kept for it."""
        ...


# Rewrites a plan with nodes that DataFusion does not know, for some milliseconds at most. The message is changed; until
# the input has come, it has the plan's partitions and schema, and no rows.
Rewrite: TypeAlias = Callable[[SessionContext, PlanMessage], Input]


@dataclass(frozen=True, slots=True)
class Decoded:
    """A plan and a first instance of it."""

    before: bytes
    """The plan before its partitions were made independent of each other."""
    plan: bytes
    instance: ExecutionPlan


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """What the tasks hold now, and what they have done since the start."""

    tasks: int
    streams: int
    plans_decoded: int
    partitions_executed: int
    decoding: Histogram
    waiting: int
    memory_claimed: int


class Task:
    """One instance of a plan, in the session that decoded it."""

    def __init__(
        self, tasks: "Tasks", noted: Noted, session: SessionContext, decoded: Decoded, plan_input: Input | None
    ) -> None:
        """
        Args:
            tasks: whose it is.
            noted: the plan as it was received.
            session: what the plan was decoded in.
            decoded: the plan, without rows if it has an input.
            plan_input: what is fetched when a partition is first executed.
        """
        self._tasks = tasks
        self.noted = noted
        self._session = session
        self._decoded = decoded
        self.input = plan_input
        self.partition_count: int = decoded.instance.partition_count
        self._unasked = set(range(self.partition_count))
        self._unread = set(range(self.partition_count))
        self._executed: set[int] = set()
        self._schema: asyncio.Future[pa.Schema] | None = None
        self._missing = None if plan_input is None or plan_input.is_empty else plan_input
        self._completing: asyncio.Future[None] | None = None
        self._waiting = 0
        self._given_up: set[int] = set()

    @property
    def ended(self) -> bool:
        """Whether every partition was asked for, to be read or in vain."""
        return not self._unasked

    async def schema(self) -> pa.Schema:
        """The exact schema of the plan's batches, also when there are none; found out once.

        Raises:
            InvalidPlan, ExecutionFailed, EnginePanicked: as ``plan.schema_of``.
        """
        if self._schema is None or _has_failed(self._schema):
            self._schema = self._tasks.in_background(self._tasks.in_thread(self._find_schema))
        return await asyncio.shield(self._schema)

    async def execute(self, partition: int, *, alone: bool) -> PartitionStream:
        """Executes one partition: of the task's instance the first time, of a fresh one when it is asked for again.

        Args:
            partition: which one.
            alone: nobody will ask this task for another.

        Raises:
            PartitionOutOfRange: the plan has no such partition.
            ExecutionFailed, EnginePanicked: DataFusion failed.
            Unavailable: the worker was closed.
            WorkerError: the plan's input is not to be had.
        """
        if partition >= self.partition_count:
            raise PartitionOutOfRange(f"partition {partition} not available: the plan has {self.partition_count}")
        self._unasked.discard(partition)
        self._given_up.discard(partition)
        if self._missing is not None:
            await self._complete(self._missing, partition)
        instance = self._decoded.instance
        if partition in self._executed:
            instance, alone = await self._tasks.decode(self._session, self._decoded.plan), True
        self._executed.add(partition)
        if alone and self.partition_count > 1:
            self._abandon(instance, set(range(self.partition_count)) - {partition})
        execution = self._tasks.in_thread(self._session.execute, instance, partition)
        try:
            with plan.execution_errors():
                return self._tasks.stream(await asyncio.shield(execution), instance)
        except asyncio.CancelledError:
            self._tasks.in_background(_drop_unread([execution]))
            raise

    def give_up(self, partition: int) -> None:
        """Says that who asked for this partition went away before it was executed."""
        if partition in self._unasked:
            self._unasked.discard(partition)
            self._given_up.add(partition)
            if self._missing is None:
                self._abandon_given_up()

    def end(self, partition: int) -> bool:
        """Says that this partition was read to its end; returns whether now all have been."""
        self._unread.discard(partition)
        return not self._unread

    def executed(self) -> list[ExecutionPlan | None]:
        """What is executed for each node of the plan, parents first. Blocks for as long as it takes to decode it."""
        decoded = self._decoded
        if decoded.before == decoded.plan:
            return list(plan.walk(decoded.instance))
        return list(counterparts(plan.decode(self._session, decoded.before), decoded.instance))

    async def close(self) -> None:
        """Ends a task with an input, and lets go of everything: errors keep frames that have this."""
        if self.input is not None:
            self._unasked.clear()
            plan_input, self.input = self.input, None
            del self._session, self._decoded
            await plan_input.close()

    async def _complete(self, missing: Input, partition: int) -> None:
        """Waits for the input, which is fetched for as long as somebody waits for it."""
        if self._completing is None:
            self._completing = self._tasks.in_background(self._fetch(missing))
        completing = self._completing
        self._waiting += 1
        try:
            await asyncio.shield(completing)
        except asyncio.CancelledError:
            self._given_up.add(partition)
            raise
        finally:
            self._waiting -= 1
            if not self._waiting:
                completing.cancel()
            # Also when it has failed: its traceback has frames with this task, a circle that would keep the session.
            if self._completing is completing and (completing.done() or not self._waiting):
                self._completing = None

    async def _fetch(self, missing: Input) -> None:
        message = await missing.fetch()
        self._tasks.count_decoded()
        self._decoded = await self._tasks.in_thread(self._tasks.timed, _decode, self._session, message)
        self._missing = None
        self._abandon_given_up()

    def _find_schema(self) -> pa.Schema:
        with self._tasks.journal.decoding(self.noted):
            return plan.schema_of(self._session, self._decoded.plan)

    def _abandon_given_up(self) -> None:
        self._executed |= self._given_up
        self._abandon(self._decoded.instance, self._given_up)
        self._given_up = set()

    def _abandon(self, instance: ExecutionPlan, partitions: set[int]) -> None:
        executions = [
            self._tasks.in_thread(self._session.execute, exchange, partition - first)
            for exchange, first in _repartitions(instance)
            for partition in partitions
            if 0 <= partition - first < exchange.partition_count
        ]
        if executions:
            self._tasks.in_background(_drop_unread(executions))


class Tasks:
    """The tasks of a worker. Each ends when all its partitions were asked for, or when it has been idle for a while."""

    def __init__(
        self,
        idle_time: float,
        limits: PlanLimits,
        admission: Admission,
        *,
        max_streams: int,
        journal: Journal | None = None,
    ) -> None:
        """
        Args:
            idle_time: seconds after which a task that nobody uses is forgotten.
            limits: what a plan may hold.
            admission: says which tasks run at the same time.
            max_streams: how many partitions are executed and read at the same time.
            journal: where it is noted which plans run.
        """
        self.journal = journal or Journal()
        self._idle_time = idle_time
        self.limits = limits
        self._admission = admission
        self._max_streams = max_streams
        self._places_taken = 0
        self._watchdog = Watchdog(admission.memory)
        self._watching: asyncio.Future[None] | None = None
        self._closed = False
        self._entries: dict[Hashable, _Entry] = {}
        self._idle: dict[_Entry, asyncio.TimerHandle] = {}
        self._idle_bytes = 0
        self._background: set[asyncio.Future[Any]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="worker-plan")
        self._read_threads = ReadThreads()
        self._streams: set[PartitionStream] = set()
        self.others: set[object] = set()
        """Other tasks, whose streams are opened here."""
        self._leftover = LeftoverCalls()
        self._looking: asyncio.TimerHandle | None = None
        self._plans_decoded = 0
        self._partitions_executed = 0
        self._decoding = Durations()

    def statistics(self) -> TaskStatistics:
        """What is held now and was done so far; from any thread."""
        return TaskStatistics(
            tasks=len(self._entries),
            streams=len(self._streams),
            plans_decoded=self._plans_decoded,
            partitions_executed=self._partitions_executed,
            decoding=self._decoding.histogram(),
            waiting=self._admission.waiting,
            memory_claimed=self._admission.claimed,
        )

    def knows(self, ticket: PlanTicket, principal: str) -> bool:
        """Whether there is a task that stands for this very plan, since its principal has asked for it before."""
        entry = None if ticket.stage_key is None else self._entries.get((principal, ticket.stage_key))
        return entry is not None and entry.ticket.plan == ticket.plan

    @asynccontextmanager
    async def task(
        self,
        ticket: PlanTicket,
        principal: str,
        session: SessionContext,
        *,
        memory: int | None,
        python_udf_inlining: bool,
        rewrite: Rewrite | None = None,
    ) -> AsyncIterator[Task]:
        """The task of a ticket, found or made, for as long as the block lasts.

        It is made once, however many ask at the same time, in the session of the one who came first; the sessions of
        the others are not used. A ticket without a stage key has a task of its own. While requests are at it, it holds
        its memory; it waits for that before its plan is decoded, and again after it has been idle.

        Args:
            ticket: what is asked for.
            principal: who asks.
            session: what the plan is decoded in, if the task is to be made.
            memory: bytes of the session's memory pool; None if it has no limit.
            python_udf_inlining: whether Python functions that come inside the plan are unpickled.
            rewrite: is called for plans that have nodes which only a codec knows.

        Raises:
            StageKeyConflict: the stage key stands for another plan.
            WorkerBusy: there is no place for the task.
            InvalidPlan, EnginePanicked: the plan does not decode; nothing is kept, the next to ask tries anew.
        """
        make = partial(self._make, session, ticket, python_udf_inlining, rewrite)
        with self._entered(ticket, principal, memory, make) as entry:
            yield await self._task_of(entry)

    @asynccontextmanager
    async def partition(
        self,
        ticket: PlanTicket,
        principal: str,
        session: SessionContext,
        *,
        memory: int | None,
        python_udf_inlining: bool,
        rewrite: Rewrite | None = None,
    ) -> AsyncIterator[tuple[Task, PartitionStream]]:
        """The task of a ticket and the stream of its partition, which is closed when the block ends.

        Raises:
            PartitionOutOfRange: the plan has no such partition.
            ExecutionFailed, EnginePanicked: DataFusion failed.
            StageKeyConflict, InvalidPlan: as ``task``.
            WorkerBusy: there is no place for the task, or for one more stream.
            WorkerError: the plan's input is not to be had.
        """
        make = partial(self._make, session, ticket, python_udf_inlining, rewrite)
        with self._entered(ticket, principal, memory, make) as entry:
            try:
                task = await self._task_of(entry)
            except asyncio.CancelledError:
                self._give_up(entry, ticket.partition)
                raise
            with (
                self.places(1),
                self.journal.executing(task.noted, ticket.partition),
                self.open(await task.execute(ticket.partition, alone=ticket.stage_key is None)) as stream,
            ):
                yield task, stream
                ended_well = stream.ended_well
            if ended_well:
                self.journal.read_to_the_end(task.noted, ticket.partition, task.partition_count)

    def demand(
        self, principal: str, key: StageKey | None, plan_bytes: bytes, memory: int | None, age: int | None
    ) -> Demand:
        """What a task needs to be admitted.

        Args:
            principal: who asks.
            key: which task of which query it is; without one, it is of none.
            plan_bytes: its plan.
            memory: bytes of its pool; None for one without a limit, which then runs alone.
            age: when its query began, the less the longer ago, if tasks on other workers depend on it.
        """
        if len(plan_bytes) <= SMALL_PLAN and _is_streaming(plan_bytes):
            return Demand(principal, object(), 0, len(plan_bytes))
        if key is None:
            return Demand(principal, object(), self._pool(memory), len(plan_bytes))
        return Demand(
            principal,
            (principal, key.query_id),
            self._pool(memory),
            len(plan_bytes),
            None if age is None else (age, key.query_id.int),
        )

    def _pool(self, memory: int | None) -> int:
        return self._admission.memory if memory is None else memory

    async def admit(self, demand: Demand) -> Claim:
        """The place of a task, waited for if need be, while memory is watched.

        Raises:
            WorkerBusy: there is none.
        """
        claim = await self._admission.admit(demand)
        self._watch()
        return claim

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """So many partitions are executed and read while the block lasts.

        Raises:
            WorkerBusy: that would be too many.
        """
        if self._places_taken + count > self._max_streams:
            raise WorkerBusy(
                f"the worker is busy: {self._places_taken} partitions are being read, and {count} more would be over "
                f"max_streams ({self._max_streams}): try again later"
            )
        self._places_taken += count
        try:
            yield
        finally:
            self._places_taken -= count

    @contextmanager
    def open(self, stream: PartitionStream) -> Iterator[PartitionStream]:
        """Counts a stream for as long as the block lasts, and closes it."""
        self._streams.add(stream)
        self._partitions_executed += 1
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.close()
            if stream.is_broken_off and self._looking is None:
                self._look_for_leftovers()

    async def messages(self, encoder: Encoder, batches: Sequence[pa.RecordBatch]) -> AsyncGenerator[Message, None]:
        """The messages of batches, encoded in a thread where that takes long."""
        messages = encoder.encode(batches)
        if encoder.takes_long(batches):
            while message := await self.in_thread(next, messages, None):
                yield message
        else:
            for message in messages:
                yield message

    async def decode(self, session: SessionContext, plan_bytes: bytes) -> ExecutionPlan:
        """A fresh instance of a plan, decoded in a thread if it is large."""
        self.count_decoded()
        return await self.in_thread_if(len(plan_bytes) > SMALL_PLAN, self.timed, plan.decode, session, plan_bytes)

    def count_decoded(self) -> None:
        """Counts a plan that is about to be decoded."""
        self._plans_decoded += 1

    def timed(self, decode: Callable[..., T], *arguments: Any) -> T:
        """What a function that decodes a plan returns; how long that takes is in the statistics. In any thread."""
        start = time.perf_counter()
        try:
            return decode(*arguments)
        finally:
            self._decoding.add(time.perf_counter() - start)

    def stream(self, executed: RecordBatchStream, instance: ExecutionPlan) -> PartitionStream:
        """What reads an executed partition of an instance.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        return PartitionStream(executed, instance, self._read_threads)

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """What a blocking function returns.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        loop = asyncio.get_running_loop()
        # A thread is started in here, if it is.
        usual = threading.stack_size(STACK)
        try:
            return loop.run_in_executor(self._threads, function, *arguments)
        finally:
            threading.stack_size(usual)

    async def in_thread_if(self, takes_long: bool, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns, called here unless that would keep the event loop for long.

        Raises:
            Unavailable: the worker was closed.
        """
        return await self.in_thread(function, *arguments) if takes_long else function(*arguments)

    def _look_for_leftovers(self) -> None:
        self._looking = None
        if self._leftover.look({*self._entries.values(), *self.others}) and not self._closed:
            self._looking = asyncio.get_running_loop().call_later(LEFTOVER_SECONDS, self._look_for_leftovers)

    def in_background(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Runs what may outlive the request that caused it; ``close`` ends it."""
        running = asyncio.ensure_future(work)
        self._background.add(running)
        running.add_done_callback(self._background.discard)
        return running

    async def close(self) -> None:
        """Ends everything. Streams that are still open, and requests that come now, end with ``Unavailable``."""
        self._closed = True
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in list(self._entries.values()):
            self._forget(entry)
        for stream in self._streams:
            stream.close()
        while self._background:
            for running in self._background:
                running.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
        for task in tasks:
            await task.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._read_threads.close()

    @contextmanager
    def _entered(
        self, ticket: PlanTicket, principal: str, memory: int | None, make: Callable[[], asyncio.Future[Task]]
    ) -> "Iterator[_Entry]":
        """The entry of a ticket, which the running request uses for as long as the block lasts."""
        entry, request = self._entry(ticket, principal, memory, make), this_request()
        self._enter(entry, request)
        try:
            yield entry
        finally:
            self._leave(entry, request)

    def _entry(
        self, ticket: PlanTicket, principal: str, memory: int | None, make: Callable[[], asyncio.Future[Task]]
    ) -> "_Entry":
        if self._closed:
            raise Unavailable("the worker was closed")
        key: Hashable = object() if ticket.stage_key is None else (principal, ticket.stage_key)
        entry = self._entries.get(key)
        if entry is None:
            age = None if ticket.task_count == 0 else LAST_AGE
            demand = self.demand(principal, ticket.stage_key, ticket.plan, memory, age)
            entry = self._entries[key] = _Entry(key, ticket, demand, make)
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
            entry.admitting = self.in_background(self._wait(entry))
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
            self._watching = self.in_background(self._watchdog.watch(self._admission.claims))

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
            self.in_background(self._give_up_made(entry, entry.making, partition))

    async def _give_up_made(self, entry: "_Entry", making: asyncio.Future[Task], partition: int) -> None:
        this = this_request()
        self._enter(entry, this)
        try:
            await asyncio.wait([making])
            if task := entry.task:
                task.give_up(partition)
        finally:
            self._leave(entry, this)

    def _make(
        self, session: SessionContext, ticket: PlanTicket, python_udf_inlining: bool, rewrite: Rewrite | None
    ) -> asyncio.Future[Task]:
        self.count_decoded()

        def prepare() -> Task:
            noted = self.journal.admit(ticket.plan, ticket.stage_key)
            with self.journal.decoding(noted):
                prepared = self.timed(_prepare, session, ticket.plan, self.limits, python_udf_inlining, rewrite)
                return Task(self, noted, session, *prepared)

        # A function that is unpickled may do anything, and for long.
        if len(ticket.plan) <= SMALL_PLAN and not python_udf_inlining:
            made: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
            made.set_result(prepare())
            return made
        return self.in_background(self.in_thread(prepare))

    def _forget(self, entry: "_Entry") -> None:
        """Lets nobody find it any more, and ends it if nobody uses it."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        self._stop_idling(entry)
        task = entry.task
        if task is not None and task.input is not None and not entry.is_in_use and not self._closed:
            self.in_background(task.close())


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
        if self.making is None or not self.making.done() or _has_failed(self.making):
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


def _prepare(
    session: SessionContext,
    plan_bytes: bytes,
    limits: PlanLimits,
    python_udf_inlining: bool,
    rewrite: Rewrite | None,
) -> tuple[Decoded, Input | None]:
    # Dropping the pickles makes the names be looked up; the session makes sure that none is unpickled.
    if not python_udf_inlining:
        plan_bytes = plan.without_python_udfs(plan_bytes)
    parsed = plan.parse(plan_bytes, limits)
    plan_input = rewrite(session, parsed.message) if parsed.has_extensions and rewrite else None
    if parsed.is_old:
        plan.upgrade_filters(session, parsed.message)
    if plan_input is not None and not plan_input.is_empty:
        without_rows = parsed.message.SerializeToString()
        return Decoded(without_rows, without_rows, plan.decode(session, without_rows)), plan_input
    is_changed = parsed.is_old or plan_input is not None
    return _decode(session, parsed.message, None if is_changed else parsed.data), plan_input


def _is_streaming(plan_bytes: bytes) -> bool:
    try:
        message = plan_proto.parse(plan_bytes)
    except InvalidPlan:
        # Whoever is to decode it says so.
        return False
    return all(plan_proto.kind(node) in STREAMING_NODES for node in plan_proto.nodes(message))


def _decode(session: SessionContext, message: PlanMessage, plan_bytes: bytes | None = None) -> Decoded:
    """The plan as it is executed here, and an instance of it; ``plan_bytes`` are the message's, if they are there."""
    before = message.SerializeToString() if plan_bytes is None else plan_bytes
    after = message.SerializeToString() if make_partitions_independent(session, message) else before
    return Decoded(before, after, plan.decode(session, after))


def _has_failed(future: asyncio.Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _repartitions(node: ExecutionPlan, first: int = 0) -> Iterator[tuple[ExecutionPlan, int]]:
    """The nodes whose partitions go through to those of the root, and which of those their partition 0 goes to.

    Only those that buffer: a ``RepartitionExec`` sends to all its partitions, read or not. A ``ScalarSubqueryExec``
    stands for those below it, which fail when they are executed before its subqueries are.
    """
    name = node.display().partition(":")[0]
    if name in {"RepartitionExec", "ScalarSubqueryExec"}:
        yield node, first
    elif name == "UnionExec":
        for child in node.children():
            yield from _repartitions(child, first)
            first += child.partition_count
    elif name not in {"CoalescePartitionsExec", "SortPreservingMergeExec"}:
        for child in node.children():
            # An input with another number of partitions is one that the node collects.
            if child.partition_count == node.partition_count:
                yield from _repartitions(child, first)


async def _drop_unread(executions: "Sequence[asyncio.Future[RecordBatchStream]]") -> None:
    """Drops streams that nobody will read, so that nothing is kept for them."""
    await asyncio.wait(executions)
    reads: list[asyncio.Future[Any]] = [
        execution.result().rbs.__anext__()
        for execution in executions
        if not execution.cancelled() and execution.exception() is None
    ]
    try:
        if reads:
            await asyncio.wait(reads, timeout=ABANDON_SECONDS)
    finally:
        for read in reads:
            let_go(read)
