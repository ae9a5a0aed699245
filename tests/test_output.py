"""What settings, headers and sessions say of the batches that a request gets."""

import random
from collections.abc import Mapping

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionContext
from pyarrow import flight
from support import Header, fetch_one, in_threads, status, stub

from worker import Settings, Worker, WorkerQueryContext, plan_ticket
from worker.encoding.encode import ENCODED_AT_ONCE
from worker.message import header_type
from worker.proto.Flight_pb2 import FlightData, Ticket
from worker.testing import RunningWorker, running_worker

COMPRESSION = "x-datafusion-distributed-config-distributed.compression"
EXPAND_VIEWS = "x-datafusion-distributed-config-datafusion.optimizer.expand_views_at_output"

WORDS = ["a string that is too long to stand inside of a view", None, "short", ""] * 1000


def _plan() -> bytes:
    columns = {"text": pa.array(WORDS, pa.string_view()), "number": pa.array(range(len(WORDS)), pa.int64())}
    session = SessionContext()
    frame = session.create_dataframe([[pa.RecordBatch.from_pydict(columns)]])
    return frame.execution_plan().to_bytes()


async def _messages(worker: RunningWorker, headers: Mapping[str, str]) -> list[FlightData]:
    async with stub(worker.address) as flight_service:
        call = flight_service.DoGet(Ticket(ticket=plan_ticket(_plan())), metadata=tuple(headers.items()))
        return [message async for message in call]


async def _size(worker: RunningWorker, headers: Mapping[str, str]) -> int:
    return sum(len(message.data_body) for message in await _messages(worker, headers))


def _header(name: str, value: str) -> Header:
    return name.encode(), value.encode()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
async def test_bodies_are_compressed_as_the_request_asks(codec: str) -> None:
    async with running_worker() as running:
        plain = await fetch_one(running, plan_ticket(_plan()))
        compressed = await fetch_one(running, plan_ticket(_plan()), [_header(COMPRESSION, codec)])
        assert compressed.equals(plain)
        assert await _size(running, {COMPRESSION: codec}) < await _size(running, {}) / 3


async def test_the_setting_is_for_requests_that_do_not_say() -> None:
    async with running_worker() as running:
        plain = await _size(running, {})
    async with running_worker(settings=Settings(compression="zstd")) as running:
        assert await _size(running, {}) < plain / 3
        assert await _size(running, {COMPRESSION: "none"}) == plain
        assert await _size(running, {COMPRESSION: "lz4"}) != await _size(running, {})


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        (COMPRESSION, "gzip", "none, lz4, zstd is right"),
        (COMPRESSION, "", "none, lz4, zstd is right"),
        (EXPAND_VIEWS, "yes", "true or false is right"),
    ],
)
async def test_a_header_that_says_something_else_is_refused_by_its_name(name: str, value: str, right: str) -> None:
    async with running_worker() as running, stub(running.address) as flight_service:
        call = flight_service.DoGet(Ticket(ticket=plan_ticket(_plan())), metadata=((name, value),))
        code, details = await status(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert name in details
        assert right in details
        assert running.worker.statistics().plans_decoded == 0


async def test_views_stay_views_unless_the_request_or_the_session_says_otherwise() -> None:
    async def expand(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_config_option("datafusion.optimizer.expand_views_at_output", True).build()

    wanted = [_header(EXPAND_VIEWS, "true")]
    async with running_worker() as running:
        views = await fetch_one(running, plan_ticket(_plan()))
        unwanted = await fetch_one(running, plan_ticket(_plan()), [_header(EXPAND_VIEWS, "false")])
        by_request = await fetch_one(running, plan_ticket(_plan()), wanted)
    async with running_worker(expand) as running:
        by_session = await fetch_one(running, plan_ticket(_plan()))
        not_by_request = await fetch_one(running, plan_ticket(_plan()), [_header(EXPAND_VIEWS, "false")])

    for table in (views, unwanted, not_by_request):
        assert table.schema.types == [pa.string_view(), pa.int64()]
    for table in (by_request, by_session):
        assert table.schema.types == [pa.large_string(), pa.int64()]
        assert table.to_pylist() == views.to_pylist()


async def test_the_schema_that_is_told_is_that_of_the_batches() -> None:
    async with running_worker() as running:

        def told(headers: list[Header]) -> pa.Schema:
            options = flight.FlightCallOptions(headers=headers)
            with flight.connect(running.url) as client:
                descriptor = flight.FlightDescriptor.for_command(plan_ticket(_plan()))
                assert (
                    client.get_flight_info(descriptor, options).schema == client.get_schema(descriptor, options).schema
                )
                return client.get_schema(descriptor, options).schema

        for headers in ([], [_header(EXPAND_VIEWS, "true")]):
            (schema,) = await in_threads([lambda headers=headers: told(headers)])  # type: ignore[misc]
            assert schema == (await fetch_one(running, plan_ticket(_plan()), headers)).schema


@pytest.mark.parametrize("compression", ["none", "lz4"])
async def test_no_message_is_larger_than_the_worker_is_told(compression: str) -> None:
    limit = 64 << 10
    session = SessionContext()
    batch = pa.RecordBatch.from_pydict({"number": pa.array(range(100_000), pa.int64())})
    plan = session.create_dataframe([[batch]]).execution_plan().to_bytes()
    async with running_worker() as running:
        assert running.worker.with_max_message_size(limit) is running.worker
        async with stub(running.address) as flight_service:
            call = flight_service.DoGet(Ticket(ticket=plan_ticket(plan)), metadata=((COMPRESSION, compression),))
            messages = [message async for message in call]
        assert len(messages) > 3
        assert max(message.ByteSize() for message in messages) <= limit
        assert [header_type(message.data_header) for message in messages[:2]] == [1, 3]


async def test_a_row_beyond_the_limit_is_an_error_that_says_so() -> None:
    session = SessionContext()
    batch = pa.RecordBatch.from_pydict({"small": ["a"], "large": ["x" * (5 << 20)]})
    plan = session.create_dataframe([[batch]]).execution_plan().to_bytes()
    async with running_worker() as running, stub(running.address) as flight_service:
        code, details = await status(flight_service.DoGet(Ticket(ticket=plan_ticket(plan))))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of them in column 'large'" in details
        running.worker.with_max_message_size(8 << 20)
        assert (await fetch_one(running, plan_ticket(plan))).num_rows == 1


async def _has_another(call: grpc.aio.UnaryStreamCall[Ticket, FlightData]) -> bool:
    """Whether a message comes before the end, whatever that is."""
    try:
        return await call.read() is not grpc.aio.EOF
    except grpc.aio.AioRpcError:
        return False


@pytest.mark.parametrize(
    ("compression", "size"),
    [
        ("none", 4_500_000),
        ("none", ENCODED_AT_ONCE),
        ("zstd", 4_500_000),
    ],
)
async def test_the_rows_before_one_that_is_beyond_the_limit_arrive(compression: str, size: int) -> None:
    session = SessionContext()
    noise = random.Random(1).randbytes(size)
    batch = pa.RecordBatch.from_pydict({"data": [b"a", b"b", noise]})
    plan = session.create_dataframe([[batch]]).execution_plan().to_bytes()
    async with running_worker() as running, stub(running.address) as flight_service:
        call = flight_service.DoGet(Ticket(ticket=plan_ticket(plan)), metadata=((COMPRESSION, compression),))
        messages = 0
        while await _has_another(call):
            messages += 1
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert messages > 1


@pytest.mark.parametrize("size", [0, 1024, 4 << 30])
def test_a_limit_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="max_message_size"):
        Worker().with_max_message_size(size)
