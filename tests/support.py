"""What many tests need of a client: tickets made by hand, partitions fetched by pyarrow, the status of an error."""

import asyncio
import re
import signal
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pyarrow as pa
import pyarrow.compute as pc
from datafusion import SessionContext
from datafusion.user_defined import Accumulator, WindowEvaluator
from pyarrow import flight

from worker import plan, plan_proto
from worker.message import Message
from worker.proto import Flight_pb2, Flight_pb2_grpc, plan_pb2
from worker.testing import RunningWorker

T = TypeVar("T")

Header = tuple[bytes, bytes]

EXAMPLES = Path(__file__).parent.parent / "examples"


def stage_key() -> plan_pb2.StageKey:
    """A key that no other test has."""
    return plan_pb2.StageKey(query_id=uuid.uuid4().bytes, stage_id=1, task_number=2)


def do_get(plan: bytes, partition: int = 0, key: plan_pb2.StageKey | None = None) -> bytes:
    """A ticket, without the worker's own code for tickets."""
    return plan_pb2.DoGet(plan_proto=plan, target_partition=partition, stage_key=key).SerializeToString()


async def in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What blocking calls return that are made at the same time, each in a thread of its own.

    All have ended when the first of their errors is raised: the loop that the worker needs never waits for a thread.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(calls)) as threads:
        ended = await asyncio.gather(*(loop.run_in_executor(threads, call) for call in calls), return_exceptions=True)
    results = []
    for result in ended:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


async def fetch(worker: RunningWorker, tickets: Iterable[bytes], headers: Sequence[Header] = ()) -> list[pa.Table]:
    """The tables of tickets, all fetched at the same time."""
    options = flight.FlightCallOptions(headers=list(headers))
    with flight.connect(worker.url) as client:

        def read(ticket: bytes) -> pa.Table:
            return client.do_get(flight.Ticket(ticket), options).read_all()

        return await in_threads([partial(read, ticket) for ticket in tickets])


async def fetch_one(worker: RunningWorker, ticket: bytes, headers: Sequence[Header] = ()) -> pa.Table:
    """The table of a ticket."""
    (table,) = await fetch(worker, [ticket], headers)
    return table


async def metadata_of(worker: RunningWorker, ticket: bytes, headers: Iterable[Header]) -> list[bytes]:
    """The ``app_metadata`` of the messages of a ticket."""
    metadata = [(name.decode(), value.decode()) for name, value in headers]
    async with stub(worker.address) as service:
        return [data.app_metadata async for data in service.DoGet(Flight_pb2.Ticket(ticket=ticket), metadata=metadata)]


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[Flight_pb2_grpc.FlightServiceStub]:
    """The generated client of a server."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Flight_pb2_grpc.FlightServiceStub(channel)


async def status(answer: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the details of an RPC that the stub has started; OK when it ended well."""
    try:
        if hasattr(answer, "__aiter__"):
            async for _ in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def status_of(worker: RunningWorker, ticket: bytes) -> tuple[grpc.StatusCode, str]:
    """The status that a ticket is answered with."""
    async with stub(worker.address) as flight_service:
        return await status(flight_service.DoGet(Flight_pb2.Ticket(ticket=ticket)))


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Waits for what no event tells of, such as a worker's statistics."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def read_messages(messages: Iterable[Message]) -> pa.Table:
    """What Arrow reads from IPC messages, that of the schema first, once they are framed as in a stream."""
    framed = b"".join(
        b"\xff\xff\xff\xff" + len(header).to_bytes(4, "little") + header + b"".join(body) for header, body in messages
    )
    with pa.ipc.open_stream(framed) as reader:
        table = reader.read_all()
    table.validate(full=True)
    return table


def as_of_51(session: SessionContext, plan_bytes: bytes) -> plan_proto.Message:
    """A plan as DataFusion 51 writes it: scans read columns by number, and a filter without projection keeps all."""
    message = plan_proto.parse(plan_bytes)
    for node in plan_proto.nodes(message):
        if plan_proto.kind(node) == "parquet_scan":
            scan = node.parquet_scan.base_conf
            scan.projection.extend(each.expr.column.index for each in scan.projection_exprs.projections)
            assert all(each.expr.HasField("column") for each in scan.projection_exprs.projections)
            scan.ClearField("projection_exprs")
        elif plan_proto.kind(node) == "filter":
            node.filter.ClearField("batch_size")
            columns = len(plan.schema_of(session, node.filter.input.SerializeToString()))
            if list(node.filter.projection) == list(range(columns)):
                node.filter.ClearField("projection")
        elif plan_proto.kind(node) == "aggregate":
            node.aggregate.ClearField("has_grouping_set")
    return message


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


@asynccontextmanager
async def listening(*command: str, folder: Path | None = None) -> AsyncIterator[tuple[Process, str]]:
    """A process that serves, and the URL that it says it serves at."""
    running = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, stderr=PIPE, cwd=folder)
    assert running.stdout is not None
    try:
        line = (await running.stdout.readline()).decode()
        assert re.match(r"listening on grpc(\+tls)?://127\.0\.0\.1:", line), line
        yield running, line.removeprefix("listening on ").strip()
    finally:
        if running.returncode is None:
            # Two signals end a worker at once, and one of another program does.
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(running.communicate(), 10)
        except TimeoutError:
            running.kill()
            await running.communicate()


class Sum(Accumulator):
    """Adds up, and creates a file when its class is unpickled."""

    def __init__(self, trap: object = None) -> None:
        self.trap = trap
        self.sum = 0

    def update(self, *values: pa.Array) -> None:
        self.sum += pc.sum(values[0]).as_py() or 0

    def merge(self, states: list[pa.Array]) -> None:
        self.update(states[0])

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self.sum)]

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self.sum)


class RowNumber(WindowEvaluator):
    """Counts rows."""

    def evaluate_all(self, values: list[pa.Array], num_rows: int) -> pa.Array:
        return pa.array(range(1, num_rows + 1), pa.int64())
