"""Tasks: one instance of a plan each, found by who asks and by stage key, and the streams of their partitions."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import pyarrow as pa
from datafusion import ExecutionPlan, RecordBatchStream, SessionContext

from worker import plan
from worker.durations import Durations, Histogram
from worker.encode import Encoder
from worker.errors import PartitionOutOfRange, StageKeyConflict, Unavailable
from worker.message import Message
from worker.partitionwise import counterparts, make_partitions_independent
from worker.plan_proto import Message as PlanMessage
from worker.stream import PartitionStream, ReadThreads, let_go
from worker.ticket import PlanTicket

T = TypeVar("T")

# Decoding holds the GIL, so that more threads make nothing faster. ``execute`` waits for a free thread of DataFusion's
# runtime; while other plans keep those busy for long, nothing that is decoded behind it could run either.
THREADS = 8

# Plans of up to so many bytes are decoded on the event loop: a thread would hold the GIL, and the loop with it, for as
# long (0.1 to 0.5 ms), and to get there and back takes longer than that.
SMALL_PLAN = 8 * 1024

# A partition that nobody will read is polled before it is dropped: only then does a RepartitionExec know that nobody
# reads it, and stops to buffer for it. The poll happens in DataFusion's runtime, at once unless that is busy.
ABANDON_SECONDS = 0.2


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


class Task:
    """One instance of a plan, in the session that decoded it."""

    def __init__(self, tasks: "Tasks", session: SessionContext, decoded: Decoded, plan_input: Input | None) -> None:
        """
        Args:
            tasks: whose it is.
            session: what the plan was decoded in.
            decoded: the plan, without rows if it has an input.
            plan_input: what is fetched when a partition is first executed.
        """
        self._tasks = tasks
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
            finding_out = self._tasks.in_thread(plan.schema_of, self._session, self._decoded.plan)
            self._schema = self._tasks.in_background(finding_out)
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
                return self._tasks.stream(await asyncio.shield(execution))
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

    def __init__(self, idle_time: float) -> None:
        """
        Args:
            idle_time: seconds after which a task that nobody uses is forgotten.
        """
        self._idle_time = idle_time
        self._closed = False
        self._entries: dict[Hashable, _Entry] = {}
        self._background: set[asyncio.Future[Any]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="worker-plan")
        self._read_threads = ReadThreads()
        self._streams: set[PartitionStream] = set()
        self._plans_decoded = 0
        self._partitions_executed = 0
        self._decoding = Durations()

    def statistics(self) -> TaskStatistics:
        """What is held now and was done so far; from any thread."""
        return TaskStatistics(
            len(self._entries),
            len(self._streams),
            self._plans_decoded,
            self._partitions_executed,
            self._decoding.histogram(),
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
        python_udf_inlining: bool,
        rewrite: Rewrite | None = None,
    ) -> AsyncIterator[Task]:
        """The task of a ticket, found or made, for as long as the block lasts.

        It is made once, however many ask at the same time, in the session of the one who came first; the sessions of
        the others are not used. A ticket without a stage key has a task of its own.

        Args:
            ticket: what is asked for.
            principal: who asks.
            session: what the plan is decoded in, if the task is to be made.
            python_udf_inlining: whether Python functions that come inside the plan are unpickled.
            rewrite: is called for plans that have nodes which only a codec knows.

        Raises:
            StageKeyConflict: the stage key stands for another plan.
            InvalidPlan, EnginePanicked: the plan does not decode; nothing is kept, the next to ask tries anew.
        """
        entry = self._enter(ticket, principal, session, python_udf_inlining, rewrite)
        try:
            yield await asyncio.shield(entry.making)
        finally:
            self._leave(entry)

    @asynccontextmanager
    async def partition(
        self,
        ticket: PlanTicket,
        principal: str,
        session: SessionContext,
        *,
        python_udf_inlining: bool,
        rewrite: Rewrite | None = None,
    ) -> AsyncIterator[tuple[Task, PartitionStream]]:
        """The task of a ticket and the stream of its partition, which is closed when the block ends.

        Raises:
            PartitionOutOfRange: the plan has no such partition.
            ExecutionFailed, EnginePanicked: DataFusion failed.
            StageKeyConflict, InvalidPlan: as ``task``.
            WorkerError: the plan's input is not to be had.
        """
        entry = self._enter(ticket, principal, session, python_udf_inlining, rewrite)
        try:
            try:
                task = await asyncio.shield(entry.making)
            except asyncio.CancelledError:
                self.in_background(self._give_up(entry, ticket.partition))
                raise
            with self.open(await task.execute(ticket.partition, alone=ticket.stage_key is None)) as stream:
                yield task, stream
        finally:
            self._leave(entry)

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

    def stream(self, executed: RecordBatchStream) -> PartitionStream:
        """What reads an executed partition.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        return PartitionStream(executed, self._read_threads)

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """What a blocking function returns.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def in_thread_if(self, takes_long: bool, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns, called here unless that would keep the event loop for long.

        Raises:
            Unavailable: the worker was closed.
        """
        return await self.in_thread(function, *arguments) if takes_long else function(*arguments)

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

    def _enter(
        self,
        ticket: PlanTicket,
        principal: str,
        session: SessionContext,
        python_udf_inlining: bool,
        rewrite: Rewrite | None,
    ) -> "_Entry":
        if self._closed:
            raise Unavailable("the worker was closed")
        key: Hashable = object() if ticket.stage_key is None else (principal, ticket.stage_key)
        entry = self._entries.get(key)
        if entry is None:
            making = self._make(session, ticket.plan, python_udf_inlining, rewrite)
            entry = self._entries[key] = _Entry(key, ticket, making)
            if not making.done():
                making.add_done_callback(lambda _: self._forget_if_failed(entry))
        elif entry.ticket.plan != ticket.plan:
            raise StageKeyConflict(f"stage key {ticket.stage_key} already stands for another plan: make a new key")
        elif (entry.ticket.task_index, entry.ticket.task_count) != (ticket.task_index, ticket.task_count):
            raise StageKeyConflict(
                f"stage key {ticket.stage_key} already stands for task {entry.ticket.task_index} of "
                f"{entry.ticket.task_count}, this is {ticket.task_index} of {ticket.task_count}: make a new key"
            )
        entry.enter()
        return entry

    def _leave(self, entry: "_Entry") -> None:
        entry.users -= 1
        if entry.users:
            return
        if entry.ended:
            self._forget(entry)
        elif self._entries.get(entry.key) is entry:
            entry.idling = asyncio.get_running_loop().call_later(self._idle_time, self._forget, entry)

    async def _give_up(self, entry: "_Entry", partition: int) -> None:
        entry.enter()
        await asyncio.wait([entry.making])
        if task := entry.task:
            task.give_up(partition)
        self._leave(entry)

    def _make(
        self, session: SessionContext, plan_bytes: bytes, python_udf_inlining: bool, rewrite: Rewrite | None
    ) -> asyncio.Future[Task]:
        self.count_decoded()
        # A function that is unpickled may do anything, and for long.
        if len(plan_bytes) <= SMALL_PLAN and not python_udf_inlining:
            made: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
            prepared = self.timed(_prepare, session, plan_bytes, python_udf_inlining, rewrite)
            made.set_result(Task(self, session, *prepared))
            return made

        async def make() -> Task:
            prepared = await self.in_thread(self.timed, _prepare, session, plan_bytes, python_udf_inlining, rewrite)
            return Task(self, session, *prepared)

        return self.in_background(make())

    def _forget(self, entry: "_Entry") -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            if (task := entry.task) is not None and task.input is not None and not self._closed:
                self.in_background(task.close())
        entry.stop_idling()

    def _forget_if_failed(self, entry: "_Entry") -> None:
        if entry.task is None:
            self._forget(entry)


@dataclass(eq=False)
class _Entry:
    """What a key stands for: a task, or one in the making, and how many use it."""

    key: Hashable
    ticket: PlanTicket
    making: asyncio.Future[Task]
    users: int = 0
    idling: asyncio.TimerHandle | None = None

    @property
    def task(self) -> Task | None:
        """The task, None while it is in the making and when that failed."""
        if not self.making.done() or self.making.cancelled() or self.making.exception() is not None:
            return None
        return self.making.result()

    @property
    def ended(self) -> bool:
        return self.ticket.stage_key is None or (self.task is not None and self.task.ended)

    def enter(self) -> None:
        self.users += 1
        self.stop_idling()

    def stop_idling(self) -> None:
        if self.idling is not None:
            self.idling.cancel()
            self.idling = None


def _prepare(
    session: SessionContext, plan_bytes: bytes, python_udf_inlining: bool, rewrite: Rewrite | None
) -> tuple[Decoded, Input | None]:
    # Dropping the pickles makes the names be looked up; the session makes sure that none is unpickled.
    if not python_udf_inlining:
        plan_bytes = plan.without_python_udfs(plan_bytes)
    parsed = plan.parse(plan_bytes)
    plan_input = rewrite(session, parsed.message) if parsed.has_extensions and rewrite else None
    if parsed.is_old:
        plan.upgrade_filters(session, parsed.message)
    if plan_input is not None and not plan_input.is_empty:
        without_rows = parsed.message.SerializeToString()
        return Decoded(without_rows, without_rows, plan.decode(session, without_rows)), plan_input
    is_changed = parsed.is_old or plan_input is not None
    return _decode(session, parsed.message, None if is_changed else plan_bytes), plan_input


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
