"""Clients that mean no good, or are of no use. What they do is done over and over, with another plan each time."""

import asyncio
import socket
import struct
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
from datafusion import SessionConfig, SessionContext

from fuzz.building import network, node
from fuzz.cases import Case
from fuzz.target import Client
from worker import StageKey, plan_ticket
from worker.proto import Flight_pb2, Flight_pb2_grpc, worker_pb2, worker_pb2_grpc

# Nothing that one of them does may take longer, with a worker that is replaced meanwhile.
SECONDS = 60.0

# After a worker that was not there.
RETRY_SECONDS = 0.1

# A cancel that comes before there is a row.
SOON_SECONDS = 0.05

# One that comes when there is more of other workers' rows than is kept in memory.
WRITING_SECONDS = 0.5

# What a slow reader takes, in all.
SLOW_MESSAGES = 20

# What is read of an answer before the connection is dropped: less than the window that clients begin with.
DROPPED_BYTES = 16 << 10

# Beyond what the worker takes by default, with all that may stand around a ticket.
OVERSIZED = bytes(65 << 20)

# Of streams at once, so many share a connection.
STREAMS_PER_CHANNEL = 50

ROWS_OF_STREAM = 400_000

AUTHORIZATION = (("authorization", "Bearer abuser"),)

_DO_GET = "/arrow.flight.protocol.FlightService/DoGet"

_OPTIONS = (
    # A connection of its own, and small windows: what is not read is the worker's to keep.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

# Stands in the plans for a number that no other plan has, and is as long in protobuf.
_MARKER = 1 << 62


def _template(query: str, partitions: int = 1, **files: Path) -> bytes:
    session = SessionContext(SessionConfig().with_target_partitions(partitions))
    for name, file in files.items():
        session.register_parquet(name, file)
    plan = session.sql(query.replace("$number", str(_MARKER))).execution_plan().to_bytes()
    assert _varint(_MARKER) in plan
    return plan


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, number.bit_length(), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


_ENDLESS = _template("SELECT value + $number AS a, value AS b FROM range(0, 1000000000000)")
_NUMBERS = _template("SELECT value + $number AS x FROM range(0, 1000000000000)")
_SHARED = _template("SELECT value % 7 AS k, max(value + $number) AS a FROM range(0, 20000000) GROUP BY 1", 2)
# It has more to sort than its memory holds.
_SORT = _template("SELECT value + $number AS a FROM range(0, 20000000) ORDER BY value * 7919 % 1000003")

_numbers = count(1)


def _fresh(template: bytes) -> bytes:
    """The plan with a number that none had before: one that is known to have been there at a death is refused."""
    return template.replace(_varint(_MARKER), _varint(_MARKER + next(_numbers)))


async def repeated(numbers: Sequence[int], at_once: int, act: Callable[[int], Awaitable[None]]) -> None:
    """Does something for each number, so many at the same time."""
    left = iter(numbers)

    async def go_on() -> None:
        for each in left:
            await act(each)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(len(numbers), at_once)):
            group.create_task(go_on())


class Abusers:
    """What they do to one worker, and how they were answered."""

    def __init__(self, address: str, files: Path) -> None:
        """
        Args:
            address: ``host:port``.
            files: a folder that the worker may read, and is given one more file.
        """
        self._address = address
        table = files / "numbers.parquet"
        pq.write_table(pa.table({"x": pa.array(range(ROWS_OF_STREAM), pa.int64())}), table)
        self._finite = _template("SELECT x + $number AS a FROM t", t=table)
        self.done: Counter[str] = Counter()
        """What was done as often as it was to be."""
        self.statuses: Counter[tuple[str, str]] = Counter()
        """How often what was answered with which status, also where it was tried again."""
        self.problems: list[str] = []

    async def drop(self, number: int) -> None:
        """Connects and goes, every fourth time in the midst of a stream, with a reset for a farewell."""
        await self._until_done("drops", (self._say_nothing, self._say_half, self._ask, self._begin_to_read)[number % 4])

    async def cancel(self, number: int) -> None:
        """Cancels what has begun: a stream, a sort, one partition of two, a task of a cluster, what it reads."""
        ways = (self._cancel_stream, self._cancel_sort, self._cancel_shared, self._cancel_task, self._cancel_reader)
        await self._until_done("cancels", ways[number % len(ways)])

    async def read_slowly(self, seconds: float, _: int) -> None:
        """Takes a message now and then, of a stream that has many."""

        async def read() -> str:
            async with self._channel() as channel:
                call = _do_get(channel, _fresh(_ENDLESS))
                for _ in range(SLOW_MESSAGES):
                    await call.read()
                    await asyncio.sleep(seconds / SLOW_MESSAGES)
                call.cancel()
                return "read"

        await self._until_done("slow readers", read, seconds)

    async def exceed(self, _: int) -> None:
        """Sends a ticket that is larger than the worker takes."""

        async def send() -> str:
            async with self._channel() as channel:
                stub = Flight_pb2_grpc.FlightServiceStub(channel)
                try:
                    await stub.DoGet(Flight_pb2.Ticket(ticket=OVERSIZED), metadata=AUTHORIZATION).read()
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    return error.code().name
                self.problems.append(f"a ticket of {len(OVERSIZED)} bytes was taken")
                return "OK"

        await self._until_done("tickets beyond the limit", send)

    async def harm(self, cases: Iterable[Case], at_once: int) -> None:
        """Sends hostile plans."""
        client, left = Client(f"grpc://{self._address}"), iter(cases)

        async def go_on() -> None:
            for case in left:
                # What ends the worker, or runs beside that, is answered with UNAVAILABLE: it is refused the third time.
                for _ in range(3):
                    answer = await client.send(case)
                    self.statuses["hostile plans", answer.status.name] += 1
                    if answer.status is not grpc.StatusCode.UNAVAILABLE:
                        break
                    await self._until_there()
                self.done["hostile plans"] += 1

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(go_on())
        finally:
            await client.close()

    async def stream_at_once(self, number: int, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Reads so many streams to their ends, after each has begun.

        Args:
            number: of streams.
            meanwhile: called when all have begun and none has ended.
        """
        barrier = asyncio.Barrier(number + 1)

        async def read(channel: grpc.aio.Channel) -> int:
            call, size = _do_get(channel, _fresh(self._finite)), 0
            first = await call.read()
            await barrier.wait()
            await barrier.wait()
            message: Any = first
            while message is not grpc.aio.EOF:
                size += len(message.data_body)
                message = await call.read()
            return size

        async def wait() -> None:
            await barrier.wait()
            await meanwhile()
            await barrier.wait()

        channels = [
            grpc.aio.insecure_channel(self._address, _OPTIONS) for _ in range(-(-number // STREAMS_PER_CHANNEL))
        ]
        try:
            async with asyncio.timeout(2 * SECONDS), asyncio.TaskGroup() as group:
                group.create_task(wait())
                reads = [group.create_task(read(channels[each % len(channels)])) for each in range(number)]
            sizes = Counter(task.result() for task in reads)
            if min(sizes) < ROWS_OF_STREAM * 8:
                self.problems.append(f"streams without all their rows: {sizes}")
            self.statuses["streams at once", "OK"] += number
            self.done["streams at once"] += number
        except (TimeoutError, ExceptionGroup) as error:
            self.problems.append(f"{number} streams at once: {_text(error)}")
        finally:
            for channel in channels:
                await channel.close()

    async def _until_done(self, name: str, act: Callable[[], Awaitable[str]], seconds: float = 0) -> None:
        """Does something once, again where the worker was not there or ended in the midst of it."""
        try:
            async with asyncio.timeout(SECONDS + seconds):
                while True:
                    try:
                        self.statuses[name, await act()] += 1
                        self.done[name] += 1
                        return
                    except grpc.aio.AioRpcError as error:
                        self.statuses[name, error.code().name] += 1
                        # Where memory is short, some are ended for others.
                        if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}:
                            self.problems.append(f"{name}: {_text(error)}")
                            return
                    except (OSError, EOFError) as error:
                        self.statuses[name, type(error).__name__] += 1
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            self.problems.append(f"{name}: not done in {SECONDS + seconds:g} s")

    async def _until_there(self) -> None:
        async with self._channel() as channel, asyncio.timeout(SECONDS):
            await channel.channel_ready()

    async def _say_nothing(self) -> str:
        async with self._connected():
            return "silent"

    async def _say_half(self) -> str:
        async with self._connected() as (_, writer):
            writer.write(_PREFACE[: len(_PREFACE) // 2])
            await writer.drain()
            return "half a preface"

    async def _ask(self) -> str:
        """Asks for a stream, and does not wait for it."""
        async with self._connected() as (_, writer):
            writer.write(_PREFACE + _request(_fresh(_ENDLESS)))
            await writer.drain()
            return "asked"

    async def _begin_to_read(self) -> str:
        async with self._connected() as (reader, writer):
            writer.write(_PREFACE + _request(_fresh(_ENDLESS)))
            await reader.readexactly(DROPPED_BYTES)
            return "in a stream"

    async def _cancel_stream(self) -> str:
        async with self._channel() as channel:
            call = _do_get(channel, _fresh(_ENDLESS))
            await call.read()
            call.cancel()
            return "in a stream"

    async def _cancel_sort(self) -> str:
        return await self._cancel_soon(_fresh(_SORT), None, "in a sort")

    async def _cancel_shared(self) -> str:
        """Nobody asks for the other partition."""
        return await self._cancel_soon(_fresh(_SHARED), StageKey.unique(), "of a shared task")

    async def _cancel_reader(self) -> str:
        """A plan that reads from another worker, which is the same: as much as it can write into files until then."""
        query = uuid.uuid4()
        read = network("coalesce", 1, [f"http://{self._address}"], query.bytes, plan_proto=_fresh(_NUMBERS))
        plan = node("merge", read).SerializeToString()
        return await self._cancel_soon(plan, StageKey(query, 1), "of a reader of a task", WRITING_SECONDS)

    async def _cancel_soon(self, plan: bytes, key: StageKey | None, what: str, seconds: float = SOON_SECONDS) -> str:
        async with self._channel() as channel:
            call = _do_get(channel, plan, key)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await call.read()
            call.cancel()
            return what

    async def _cancel_task(self) -> str:
        """As a coordinator does it: its channel, and the output of its task."""
        async with self._channel() as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            key = worker_pb2.TaskKey(query_id=uuid.uuid4().bytes, stage_id=1, task_number=0)
            request = worker_pb2.SetPlanRequest(task_key=key, task_count=1, plan_proto=_fresh(_ENDLESS))
            coordinator = stub.CoordinatorChannel(metadata=AUTHORIZATION)
            await coordinator.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=request))
            await coordinator.read()
            output = stub.ExecuteTask(
                worker_pb2.ExecuteTaskRequest(task_key=key, target_partition_end=1, none=worker_pb2.NoneHead()),
                metadata=AUTHORIZATION,
            )
            await output.read()
            output.cancel()
            coordinator.cancel()
            return "of a cluster's task"

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.insecure_channel(self._address, _OPTIONS) as channel:
            yield channel

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection that is reset in the end, whatever is under way."""
        host, _, port = self._address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            made: socket.socket = writer.get_extra_info("socket")
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            yield reader, writer
        finally:
            writer.transport.abort()


def _do_get(channel: grpc.aio.Channel, plan: bytes, key: StageKey | None = None) -> Any:
    ticket = Flight_pb2.Ticket(ticket=plan_ticket(plan, 0, key))
    return Flight_pb2_grpc.FlightServiceStub(channel).DoGet(ticket, metadata=AUTHORIZATION)


def _text(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _text(error.exceptions[0])
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return repr(error)


# HTTP/2 by hand, for connections that break off where no library would: RFC 9113, and RFC 7541 for headers.


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _header(name: str, value: str) -> bytes:
    """A literal field that is not indexed, with a new name."""
    return b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in (name, value))


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")


def _request(plan: bytes) -> bytes:
    """The frames of a ``DoGet``."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _DO_GET,
        ":authority": "worker",
        "te": "trailers",
        "content-type": "application/grpc",
        **dict(AUTHORIZATION),
    }
    message = Flight_pb2.Ticket(ticket=plan_ticket(plan)).SerializeToString()
    return _frame(1, 4, 1, b"".join(_header(*each) for each in headers.items())) + _frame(
        0, 1, 1, b"\0" + len(message).to_bytes(4) + message
    )
