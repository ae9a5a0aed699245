"""A task of a distributed query: the plan that its coordinator has set, its input, its output, and its figures."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass
from typing import Any, TypeVar

from datafusion import ExecutionPlan, SessionContext

from worker import plan
from worker.cluster import metrics
from worker.cluster.fetch import Source, fetch
from worker.cluster.intake import Intake, Store
from worker.cluster.load import Load
from worker.cluster.merge import Replay, interleaved, together
from worker.cluster.metrics import NetworkFigures
from worker.cluster.nodes import Head, Leaf, check_head
from worker.cluster.rewrite import Origin, Origins, Rewritten, executed, with_head
from worker.cluster.settings import ClusterSettings
from worker.config import MEBIBYTE, Compression
from worker.encoding.encode import Encoder
from worker.errors import FailedPrecondition, PartitionOutOfRange, QueryEnded, Unavailable, WorkerError
from worker.execution.executor import Executor
from worker.execution.stream import PartitionStream
from worker.message import Message
from worker.proto import worker_pb2
from worker.session import is_cancellation
from worker.supervision.journal import Noted
from worker.ticket import StageKey

T = TypeVar("T")

# So much of a leaf's input is held in memory, if the coordinator's budget is not less.
HELD_BYTES = 4 * MEBIBYTE

# What workers send each other may be as large as gRPC allows.
MAX_MESSAGE_SIZE = 2047 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class Orders:
    """What the coordinator wants of a task, beside its plan."""

    key: StageKey
    task_count: int
    settings: ClusterSettings
    query_start: int
    """In nanoseconds since 1970."""


class ClusterTask:
    """Fetches its input from when it is made, and is executed when its output is first asked for."""

    def __init__(
        self,
        orders: Orders,
        executor: Executor,
        session: SessionContext,
        noted: Noted,
        rewritten: Rewritten,
        source: Source,
        store: Store,
    ) -> None:
        """
        Args:
            orders: what the coordinator wants.
            executor: the worker's.
            session: what the plan is decoded and executed in, by this task alone.
            noted: the plan as it was received.
            rewritten: the plan.
            source: how other tasks are read.
            store: for input that is kept in files; closed by the task.
        """
        self.orders = orders
        self._executor = executor
        executor.users.add(self)
        self._session = session
        self._noted = noted
        self._rewritten = rewritten
        self._source = source
        self._store = store
        self._added = time.time_ns()
        self._executed_at: int | None = None
        self._figures = {leaf: NetworkFigures() for leaf in rewritten.leaves}
        self._loads: asyncio.Queue[worker_pb2.LoadInfo | None] = asyncio.Queue()
        self._plan_bytes = b""
        self._asked: set[int] = set()
        self._head: Head | None = None
        self._closed = False
        self._end: WorkerError = query_ended()
        self._segments: list[tuple[ExecutionPlan, Origins]] = []
        self._replays: dict[int, Replay] = {}
        self._running: list[asyncio.Future[Any]] = []
        self._streams: set[PartitionStream] = set()
        self._input: asyncio.Future[None] | None = self._own(self._fetch_all())
        self._sampling = self._own(self._sample()) if rewritten.is_sampled else None
        self._output: asyncio.Future[tuple[ExecutionPlan, int]] | None = None

    async def output(
        self, partitions: range, head: Head, compression: Compression
    ) -> AsyncGenerator[tuple[int, Message], None]:
        """The messages of partitions as they come, each with its partition; the first of each is its schema.

        A partition without rows has none.

        Args:
            partitions: of the plan under its head; each is given once.
            head: what stands above the plan, which the first call decides.
            compression: what bodies are compressed with.

        Raises:
            InvalidRequest, InvalidPlan, PlanTooLarge: the head makes no sense, or is too large for the plan.
            PartitionOutOfRange: the plan has no such partition.
            FailedPrecondition: one of them was asked for before.
            QueryEnded: the coordinator ended the query.
            WorkerError: the input could not be fetched, or DataFusion failed.
        """
        try:
            if self._output is None and not self._closed:
                check_head(head, self._rewritten.partitions, self._executor.limits)
                self._head = head
                self._output = self._own(self._prepare(head))
            instance, count = await self._has(self._output)
            self._take(partitions, count)
            with ExitStack() as opened:
                if isinstance(self._head, worker_pb2.BroadcastExecHead):
                    inputs = instance.partition_count
                    sources = {p: self._replay(instance, p % inputs, compression).messages() for p in partitions}
                else:
                    streams = await self._execute(instance, partitions, opened)
                    sources = {
                        p: self._encoded(stream, compression) for p, stream in zip(partitions, streams, strict=True)
                    }
                async with aclosing(interleaved(sources)) as messages:
                    async for partition, message in messages:
                        yield partition, message
        except (asyncio.CancelledError, Unavailable) as error:
            if not self._closed or is_cancellation(error):
                raise
            raise self._ended() from None

    async def schema(self) -> Message:
        """The schema's message, of a task without rows.

        Raises:
            QueryEnded: the coordinator ended the query.
            WorkerError: as ``plan.schema_of``.
        """
        if self._closed:
            raise self._ended()
        with self._executor.journal.decoding(self._noted):
            schema = await self._executor.in_thread(plan.schema_of, self._session, self._plan_bytes)
        return Encoder(schema, MAX_MESSAGE_SIZE).schema()

    async def load_infos(self) -> AsyncIterator[worker_pb2.LoadInfo]:
        """What there is of each partition of a plan that is sampled, as it gets known; of other plans nothing."""
        if self._sampling is None:
            return
        self._sampling.add_done_callback(lambda _: self._loads.put_nowait(None))
        while (load := await self._loads.get()) is not None:
            yield load

    def figures(self) -> worker_pb2.TaskMetrics:
        """The metrics of the coordinator's nodes, parents first, and of the whole. Blocks for some ms."""
        sets = []
        for instance, origins in self._segments:
            for node, origin in executed(list(plan.walk(instance)), origins):
                if isinstance(origin, Leaf):
                    sets.append(self._figures[origin].to_proto(origin.partitions))
                else:
                    of_node = metrics.of_node(node.metrics() if node is not None else None)
                    sets.append(metrics.of_output(of_node) if origin is Origin.PASSED else of_node)
        of_task = metrics.of_task(self.orders.query_start, self._added, self._executed_at, time.time_ns())
        return worker_pb2.TaskMetrics(pre_order_plan_metrics=sets, task_metrics=of_task)

    def output_rows(self) -> int:
        """How many rows the plan has made so far, by its topmost node that counts them."""
        for instance, origins in self._segments[-1:]:
            for node, _ in executed(list(plan.walk(instance)), origins):
                found = node.metrics() if node is not None else None
                if found is not None and found.output_rows is not None:
                    return found.output_rows
        return 0

    async def close(self, error: WorkerError | None = None) -> None:
        """Ends whatever goes on for the task, and deletes what is kept for it; who reads it is told of ``error``."""
        self._closed = True
        self._end = error or self._end
        self._executor.users.discard(self)
        for running in self._running:
            running.cancel()
        for stream in self._streams:
            stream.close()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._segments.clear()
        for replay in self._replays.values():
            replay.close()
        self._replays.clear()
        self._running.clear()
        # What failed has a traceback, in whose frames is this task: a circle, which would keep the session for long.
        self._input = self._sampling = self._output = None
        # Errors are easily in circles with the frames of their tracebacks, to which Python 3.11's TaskGroup adds: what
        # is large must not hang on them.
        await self._store.close()
        del self._session, self._rewritten

    async def _fetch_all(self) -> None:
        """Puts everything that the plan reads of other tasks into its place."""
        await together(self._fetch(leaf, str(number)) for number, leaf in enumerate(self._rewritten.leaves))

    async def _fetch(self, leaf: Leaf, name: str) -> None:
        with closing(self._intake(leaf.schema, leaf.partitions, name)) as intake:
            await fetch(leaf, self._source, intake, self._figures[leaf])
            leaf.node.CopyFrom(await intake.scan(leaf.partitioning if leaf.shows_partitioning else None))

    async def _prepare(self, head: Head) -> tuple[ExecutionPlan, int]:
        """The instance that is read, and how many partitions it has for those who read it."""
        await self._has(self._input)
        self._executed_at = time.time_ns()
        below = self._rewritten.plan if self._sampling is None else await self._has(self._sampling)
        headed, origins = with_head(below, head)
        self._plan_bytes = headed.SerializeToString()
        with self._executor.journal.decoding(self._noted):
            instance = await self._executor.decode(self._session, self._plan_bytes)
        if self._sampling is None:
            self._segments.append((instance, origins + self._rewritten.origins))
        else:
            self._segments.insert(0, (instance, origins))
        if isinstance(head, worker_pb2.BroadcastExecHead):
            return instance, head.output_partitions
        return instance, instance.partition_count

    async def _sample(self) -> Any:
        """Executes the plan without its head, tells what there is of each partition, and makes a scan of it."""
        await self._has(self._input)
        plan_bytes = self._rewritten.plan.SerializeToString()
        with self._executor.journal.decoding(self._noted):
            instance = await self._executor.decode(self._session, plan_bytes)
            schema = await self._executor.in_thread(plan.schema_of, self._session, plan_bytes)
        self._segments.append((instance, self._rewritten.origins))
        partitions = range(instance.partition_count)
        with closing(self._intake(plan.schema_message(schema), len(partitions), "sampled")) as intake:
            with ExitStack() as opened:
                streams = await self._execute(instance, partitions, opened)
                await together(
                    self._sample_partition(partition, stream, intake, Load(schema))
                    for partition, stream in zip(partitions, streams, strict=True)
                )
            return await intake.scan(None)

    async def _sample_partition(self, partition: int, stream: PartitionStream, intake: Intake, load: Load) -> None:
        async with aclosing(self._encoded(stream, "none", load)) as messages:
            async for header, body in messages:
                await intake.add(partition, 0, header, body)
        self._loads.put_nowait(load.to_proto(partition))

    def _intake(self, schema: Any, partitions: int, name: str) -> Intake:
        return Intake(
            schema, partitions, self._store, name, self._executor, min(HELD_BYTES, self.orders.settings.buffer_budget)
        )

    def _take(self, partitions: range, count: int) -> None:
        if partitions.stop > count or not partitions:
            raise PartitionOutOfRange(
                f"partitions {partitions.start} to {partitions.stop} were asked for of a task that has {count}"
            )
        if again := self._asked.intersection(partitions):
            raise FailedPrecondition(f"partition {min(again)} was asked for before: each can be read once")
        self._asked.update(partitions)

    async def _execute(self, instance: ExecutionPlan, partitions: range, opened: ExitStack) -> list[PartitionStream]:
        def execute() -> list[Any]:
            return [self._session.execute(instance, partition) for partition in partitions]

        opened.enter_context(self._executor.places(len(partitions)))
        opened.enter_context(self._executor.journal.executing(self._noted, partitions.start))
        with plan.execution_errors():
            streams = await asyncio.shield(self._own(self._executor.in_thread(execute)))
        if self._closed:
            raise self._ended()
        return [self._open(executed, instance, p, opened) for executed, p in zip(streams, partitions, strict=True)]

    def _open(self, executed: Any, instance: ExecutionPlan, partition: int, opened: ExitStack) -> PartitionStream:
        stream = opened.enter_context(self._executor.open(self._executor.stream(executed, instance)))
        count = instance.partition_count
        self._streams.add(stream)

        def forget() -> None:
            self._streams.discard(stream)
            if stream.ended_well:
                self._executor.journal.read_to_the_end(self._noted, partition, count)

        opened.callback(forget)
        return stream

    async def _encoded(
        self, stream: PartitionStream, compression: Compression, load: Load | None = None
    ) -> AsyncGenerator[Message, None]:
        encoder = None
        while group := await stream.read():
            if encoder is None:
                encoder = Encoder(group[0].schema, MAX_MESSAGE_SIZE, compression=compression)
                yield encoder.schema()
            if load is not None:
                await self._executor.in_thread(load.add, group)
            async with aclosing(self._executor.messages(encoder, group)) as messages:
                async for message in messages:
                    yield message

    def _replay(self, instance: ExecutionPlan, partition: int, compression: Compression) -> Replay:
        """The messages of a partition that is read more than once, and computed once."""
        replay = self._replays.get(partition)
        if replay is None:
            replay = self._replays[partition] = Replay(self._once(instance, partition, compression))
            self._own(replay.run())
        return replay

    async def _once(
        self, instance: ExecutionPlan, partition: int, compression: Compression
    ) -> AsyncGenerator[Message, None]:
        with ExitStack() as opened:
            (stream,) = await self._execute(instance, range(partition, partition + 1), opened)
            async with aclosing(self._encoded(stream, compression)) as messages:
                async for message in messages:
                    yield message

    def _ended(self) -> WorkerError:
        """What those are told who still read; anew, since errors keep the frames that they are raised in."""
        return type(self._end)(str(self._end))

    async def _has(self, running: "asyncio.Future[T] | None") -> T:
        """What comes of something that the task does, which goes on if who waits for it goes away."""
        if running is None:
            raise self._ended()
        try:
            result = await asyncio.shield(running)
        finally:
            # Its error has this frame in its traceback.
            del running
        if self._closed:
            raise self._ended()
        return result

    def _own(self, work: "Coroutine[Any, Any, T] | asyncio.Future[T]") -> "asyncio.Future[T]":
        """Runs what ends with the task."""
        running = self._executor.in_background(work)
        # Whoever needs it hears of its error, and nobody may.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._running.append(running)
        return running


def query_ended() -> QueryEnded:
    """What those are told who wait for a task whose coordinator needs it no more."""
    return QueryEnded("the coordinator ended the query")
