"""What a task reads of others, fetched: in parallel, as it comes, undecoded."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from worker import flight_data
from worker.cluster.channels import Channels
from worker.cluster.metrics import NetworkFigures
from worker.cluster.nodes import Head, Leaf, Read
from worker.cluster.received import Received
from worker.errors import InvalidRequest, UpstreamFailed
from worker.message import Bytes, Message, row_count
from worker.proto import worker_pb2
from worker.servicer import STATUS_DETAILS
from worker.tasks import Tasks
from worker.ticket import StageKey

EXECUTE_TASK = "/worker.WorkerService/ExecuteTask"

# So much of a leaf's input is held in memory, before it is written to files; less where the cluster's budget is less.
HELD_BYTES = 4 << 20

# Partitions of a task of this worker itself, as they are sent to others: each message with its partition.
Output: TypeAlias = AsyncIterator[tuple[int, Message]]


@dataclass(frozen=True, slots=True)
class Source:
    """How a task reads from others."""

    channels: Channels
    own_url: str
    own_output: Callable[[StageKey, range, Head], Output]
    """What this worker's own tasks make, for reads that need no network."""
    headers: Sequence[tuple[str, str | bytes]]
    """What goes on to other workers: the coordinator's settings, and the headers that it passes through."""
    budget: int
    """Bytes that a connection may hold back."""


async def fetch(leaf: Leaf, source: Source, received: Received, figures: NetworkFigures, tasks: Tasks) -> None:
    """Fetches everything that a leaf reads.

    Raises:
        WorkerError: a worker that it reads from failed; nothing more is fetched then.
    """
    fetching = _Fetching(leaf, source, received, figures, tasks)
    try:
        async with asyncio.TaskGroup() as group:
            for index, read in enumerate(leaf.reads):
                group.create_task(fetching.read(index, read))
    except BaseExceptionGroup as errors:
        # The others were cancelled because of the first.
        raise errors.exceptions[0] from None
    await tasks.in_thread(received.finish)


class _Fetching:
    def __init__(self, leaf: Leaf, source: Source, received: Received, figures: NetworkFigures, tasks: Tasks) -> None:
        self._leaf = leaf
        self._source = source
        self._received = received
        self._figures = figures
        self._tasks = tasks
        self._flushing = asyncio.Lock()
        self._limit = min(HELD_BYTES, source.budget)

    async def read(self, index: int, read: Read) -> None:
        """Reads from one task."""
        if read.url == self._source.own_url:
            await self._read_own(index, read)
        else:
            await self._read_remote(index, read)

    async def _read_own(self, index: int, read: Read) -> None:
        self._figures.local_connections += 1
        partitions = range(read.first, read.first + len(read.slots))
        async with aclosing(self._source.own_output(read.key, partitions, self._leaf.head)) as output:  # type: ignore[type-var]
            async for partition, (header, body) in output:
                now = time.time_ns()
                await self._add(index, read, partition, header, body, now, now)

    async def _read_remote(self, index: int, read: Read) -> None:
        request = _request(read, self._leaf.head)
        execute_task: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._source.channels.to(read.url).unary_stream(
            EXECUTE_TASK
        )
        call = execute_task(request, metadata=self._source.headers)
        try:
            async for data in call:
                header, metadata, body = flight_data.parse(data)
                about = worker_pb2.FlightAppMetadata.FromString(bytes(metadata))
                created = about.created_timestamp_unix_nanos
                await self._add(index, read, about.partition, header, [body], created, time.time_ns())
        except grpc.aio.AioRpcError as error:
            raise _upstream_failed(read.url, error) from error
        except InvalidRequest as error:
            raise UpstreamFailed(f"worker {read.url}: {error}", grpc.StatusCode.INTERNAL) from error
        finally:
            call.cancel()

    async def _add(
        self, index: int, read: Read, partition: int, header: Bytes, body: list[Bytes], created: int, received: int
    ) -> None:
        offset = partition - read.first
        if not 0 <= offset < len(read.slots):
            raise UpstreamFailed(
                f"worker {read.url} sent partition {partition}, and was asked for {len(read.slots)} from {read.first}",
                grpc.StatusCode.INTERNAL,
            )
        slot = read.slots[offset]
        size = len(header) + sum(map(len, body))
        self._figures.message_received(slot, row_count(header), size, created, received)
        self._received.add(slot, index, header, body)
        while self._received.held > self._limit:
            async with self._flushing:
                if self._received.held > self._limit:
                    await self._tasks.in_thread(self._received.flush)


def _request(read: Read, head: Head) -> bytes:
    request = worker_pb2.ExecuteTaskRequest(
        task_key=worker_pb2.TaskKey(
            query_id=read.key.query_id.bytes, stage_id=read.key.stage_id, task_number=read.key.task_number
        ),
        target_partition_start=read.first,
        target_partition_end=read.first + len(read.slots),
    )
    match head:
        case worker_pb2.RepartitionExecHead():
            request.repartition.CopyFrom(head)
        case worker_pb2.BroadcastExecHead():
            request.broadcast.CopyFrom(head)
        case _:
            request.none.SetInParent()
    return request.SerializeToString()


def _upstream_failed(url: str, error: grpc.aio.AioRpcError) -> UpstreamFailed:
    """The upstream's own error; where the upstream is not there, which one that is."""
    text = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and not text.startswith("worker "):
        text = f"worker {url} is not available: {text}"
    trailing = dict(error.trailing_metadata() or ())
    details = trailing.get(STATUS_DETAILS, b"")
    return UpstreamFailed(text, error.code(), details if isinstance(details, bytes) else b"")
