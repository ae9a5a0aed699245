"""What a task reads of others, fetched: in parallel, as it comes, undecoded."""

import asyncio
import struct
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import pyarrow as pa
from google.protobuf.message import DecodeError

from worker import ipc
from worker.cluster.channels import Channels
from worker.cluster.intake import Intake
from worker.cluster.merge import together
from worker.cluster.metrics import NetworkFigures
from worker.cluster.nodes import Head, Leaf, Read
from worker.config import MEBIBYTE, usable_memory
from worker.encoding import flight_data
from worker.errors import ExecutionFailed, InvalidRequest, UpstreamFailed
from worker.message import Message, row_count
from worker.proto import worker_pb2
from worker.servicer import STATUS_DETAILS
from worker.ticket import StageKey

EXECUTE_TASK = "/worker.WorkerService/ExecuteTask"

# The most that a message of another worker may take, once it is decompressed: DataFusion takes its word for it, and the
# process ends where there is less memory.
MAX_RECEIVED = min(2047 * MEBIBYTE, usable_memory() // 4)

# Partitions of a task of this worker itself, as they are sent to others: each message with its partition.
Output: TypeAlias = AsyncGenerator[tuple[int, Message], None]

# What a request, as bytes, is answered with messages by.
Answering: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[bytes, bytes]"


@dataclass(frozen=True, slots=True)
class Source:
    """How a task reads from others."""

    channels: Channels
    own_url: str
    own_output: Callable[[StageKey, range, Head], Output]
    """What this worker's own tasks make, for reads that need no network."""
    headers: Sequence[tuple[str, str | bytes]]
    """What goes on to other workers: the coordinator's settings, and the headers that it passes through."""


async def fetch(leaf: Leaf, source: Source, intake: Intake, figures: NetworkFigures) -> None:
    """Fetches everything that a leaf reads.

    Raises:
        WorkerError: a worker that it reads from failed; nothing more is fetched then.
    """
    fetching = _Fetching(leaf, source, intake, figures)
    await together(fetching.read(index, read) for index, read in enumerate(leaf.reads))


@dataclass(frozen=True, slots=True)
class _Fetching:
    leaf: Leaf
    source: Source
    intake: Intake
    figures: NetworkFigures

    async def read(self, index: int, read: Read) -> None:
        """Reads from one task."""
        if read.url == self.source.own_url:
            await self._read_own(index, read)
        else:
            await self._read_remote(index, read)

    async def _read_own(self, index: int, read: Read) -> None:
        self.figures.local_connections += 1
        partitions = range(read.first, read.first + len(read.slots))
        async with aclosing(self.source.own_output(read.key, partitions, self.leaf.head)) as output:
            async for partition, (header, body) in output:
                slot = read.slots[partition - read.first]
                self.figures.batch_read(slot, row_count(header), len(header) + sum(map(len, body)))
                await self.intake.add(slot, index, header, body)

    async def _read_remote(self, index: int, read: Read) -> None:
        async def take(data: bytes) -> None:
            start = time.perf_counter_ns()
            header, metadata, body = flight_data.parse(data)
            about = worker_pb2.FlightAppMetadata.FromString(bytes(metadata))
            offset = about.partition - read.first
            if not 0 <= offset < len(read.slots):
                raise InvalidRequest(f"it sent partition {about.partition} without having been asked for it")
            slot = read.slots[offset]
            message = received(header, body)
            created = about.created_timestamp_unix_nanos
            rows = row_count(message.header)
            self.figures.message_received(slot, rows, len(data), created, time.time_ns())
            self.figures.max_memory = max(self.figures.max_memory, self.intake.held + len(data))
            self.figures.elapsed_compute += time.perf_counter_ns() - start
            await self.intake.add(slot, index, *message)

        self.figures.remote_connections += 1
        request = _request(read, self.leaf.head)
        async with self.source.channels.to(read.url) as channel:
            execute_task: Answering = channel.unary_stream(EXECUTE_TASK)
            await read_answer(read.url, execute_task(request, metadata=self.source.headers), take)


def received(header: memoryview, body: memoryview) -> Message:
    """The message that another worker has sent, whose sizes are right.

    Raises:
        InvalidRequest: they are not.
    """
    message = Message(bytes(header), [body])
    try:
        ipc.check_message(message.header, body, max_bytes=MAX_RECEIVED)
    except ValueError as error:
        raise InvalidRequest(f"it sent a message that is not right: {error}") from error
    return message


async def read_answer(
    url: str, call: "grpc.aio.UnaryStreamCall[bytes, bytes]", take: Callable[[bytes], Awaitable[None]]
) -> None:
    """Calls ``take`` with each message of another worker's answer, which is cancelled if that has not ended.

    Raises:
        UpstreamFailed: the worker has failed, or has not answered rightly.
    """
    # A read that is cancelled by itself loses its message for good: gRPC does not free it. (Seen with 1.85.)
    reading = asyncio.ensure_future(_read(call, take))
    try:
        await asyncio.shield(reading)
    except grpc.aio.AioRpcError as error:
        raise _upstream_failed(url, error) from error
    except (InvalidRequest, ExecutionFailed, DecodeError, struct.error, pa.ArrowInvalid) as error:
        raise UpstreamFailed(f"worker {url} does not answer rightly: {error}", grpc.StatusCode.INTERNAL) from error
    finally:
        call.cancel()
        await asyncio.wait((reading,))


async def _read(call: "grpc.aio.UnaryStreamCall[bytes, bytes]", take: Callable[[bytes], Awaitable[None]]) -> None:
    async for data in call:
        await take(data)


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
