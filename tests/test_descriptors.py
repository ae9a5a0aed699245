"""What describes plans, and what a worker does not offer; and the two ways to add one to a server."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext
from pyarrow import flight
from pydantic import ByteSize
from support import do_get, fetch, fetch_one, in_threads, stage_key, status, stub

from worker import Settings, Worker, add_FlightServiceServicer_to_server, server_options
from worker.proto import Flight_pb2, Flight_pb2_grpc, plan_pb2
from worker.testing import RunningWorker, running_worker

PARTITIONS = 4

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False, metadata={b"unit": b"pieces"}),
        pa.field("at", pa.timestamp("us", "Europe/Berlin")),
        pa.field("tags", pa.list_(pa.field("item", pa.string(), nullable=False)), metadata={b"of": b"whom"}),
    ],
    metadata={b"made": b"by hand"},
)


@pytest.fixture
def plan() -> bytes:
    """Four partitions of a table, the last of which is empty."""
    session = SessionContext(SessionConfig().with_target_partitions(PARTITIONS))
    batches = [
        pa.record_batch([[number], [number], [[str(number)]]], schema=SCHEMA) for number in range(PARTITIONS - 1)
    ]
    session.register_record_batches("t", [*([batch] for batch in batches), [batches[0].slice(1)]])
    described = session.table("t").execution_plan()
    assert described.partition_count == PARTITIONS
    return described.to_bytes()


async def call(worker: RunningWorker, ask: Callable[[flight.FlightClient], Any]) -> Any:
    """What a Flight client is answered."""
    with flight.connect(worker.url) as client:
        (answer,) = await in_threads([lambda: ask(client)])
        return answer


async def flight_info(worker: RunningWorker, command: bytes) -> flight.FlightInfo:
    return await call(worker, lambda client: client.get_flight_info(flight.FlightDescriptor.for_command(command)))


def tickets(info: flight.FlightInfo) -> list[bytes]:
    return [endpoint.ticket.ticket for endpoint in info.endpoints]


async def test_flight_info_has_a_ready_ticket_for_every_partition_of_one_task(plan: bytes) -> None:
    async with running_worker() as worker:
        info = await flight_info(worker, do_get(plan))
        tables = await fetch(worker, tickets(info))
        statistics = worker.worker.statistics()
    assert info.descriptor == flight.FlightDescriptor.for_command(do_get(plan))
    assert info.schema.equals(SCHEMA, check_metadata=True)
    assert (info.total_records, info.total_bytes) == (-1, -1)
    assert [table["id"].to_pylist() for table in tables] == [[0], [1], [2], []]
    assert all(table.schema.equals(SCHEMA, check_metadata=True) for table in tables)
    assert statistics.plans_decoded == 1
    assert statistics.partitions_executed == PARTITIONS


async def test_flight_info_makes_a_new_stage_key_where_there_is_none(plan: bytes) -> None:
    async with running_worker() as worker:
        infos = [await flight_info(worker, do_get(plan)) for _ in range(2)]
    keys = [[plan_pb2.DoGet.FromString(ticket).stage_key.query_id for ticket in tickets(info)] for info in infos]
    assert all(len(query_id) == 16 for ids in keys for query_id in ids)
    assert [len(set(ids)) for ids in keys] == [1, 1]
    assert keys[0] != keys[1]


async def test_flight_info_keeps_what_the_descriptor_says(plan: bytes) -> None:
    asked = plan_pb2.DoGet(plan_proto=plan, target_task_index=3, target_task_count=5, stage_key=stage_key())
    async with running_worker() as worker:
        info = await flight_info(worker, asked.SerializeToString())
    expected = []
    for partition in range(PARTITIONS):
        asked.target_partition = partition
        expected.append(plan_pb2.DoGet.FromString(asked.SerializeToString()))
    assert [plan_pb2.DoGet.FromString(ticket) for ticket in tickets(info)] == expected


async def test_endpoints_have_the_location_of_the_settings_and_else_none(plan: bytes) -> None:
    async with running_worker() as worker:
        info = await flight_info(worker, do_get(plan))
    assert [endpoint.locations for endpoint in info.endpoints] == [[]] * PARTITIONS
    async with running_worker(settings=Settings(location="grpc://worker-3:8000")) as worker:
        info = await flight_info(worker, do_get(plan))
    assert [endpoint.locations for endpoint in info.endpoints] == [[flight.Location("grpc://worker-3:8000")]] * 4


async def test_get_schema_is_exact(plan: bytes) -> None:
    async with running_worker() as worker:
        descriptor = flight.FlightDescriptor.for_command(do_get(plan))
        answer = await call(worker, lambda client: client.get_schema(descriptor))
        assert answer.schema.equals(SCHEMA, check_metadata=True)
        assert worker.worker.statistics().partitions_executed == 0


async def test_a_flight_info_beyond_the_limit_is_resource_exhausted_and_names_size_and_limit(plan: bytes) -> None:
    descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(plan, key=stage_key()))

    async def answer(limit: int) -> tuple[grpc.StatusCode, str]:
        settings = Settings(max_flight_info_size=ByteSize(limit))
        async with running_worker(settings=settings) as worker, stub(worker.address) as flight_service:
            return await status(flight_service.GetFlightInfo(descriptor))

    code, details = await answer(1000)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1000" in details
    (size,) = map(int, re.findall(r"(\d+) bytes", details))
    assert size >= PARTITIONS * len(plan)
    assert (await answer(size - 1))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await answer(size) == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize("rpc", ["GetFlightInfo", "GetSchema"])
async def test_a_path_is_no_descriptor(rpc: str) -> None:
    descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.PATH, path=["some", "table"])
    async with running_worker() as worker, stub(worker.address) as flight_service:
        code, details = await status(getattr(flight_service, rpc)(descriptor))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "cmd" in details


@pytest.mark.parametrize(
    ("rpc", "request_", "instead"),
    [
        ("Handshake", [Flight_pb2.HandshakeRequest()], "authorization header"),
        ("ListFlights", Flight_pb2.Criteria(), "GetFlightInfo"),
        ("PollFlightInfo", Flight_pb2.FlightDescriptor(), "GetFlightInfo"),
        ("DoPut", [Flight_pb2.FlightData()], "DoGet"),
        ("DoExchange", [Flight_pb2.FlightData()], "DoGet"),
        ("DoAction", Flight_pb2.Action(type="drop"), "DoGet"),
        ("ListActions", Flight_pb2.Empty(), "DoGet"),
    ],
)
async def test_what_a_worker_does_not_offer_is_unimplemented_and_says_what_to_use(
    rpc: str, request_: Any, instead: str
) -> None:
    async with running_worker() as worker, stub(worker.address) as flight_service:
        code, details = await status(getattr(flight_service, rpc)(request_))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert instead in details
        assert worker.worker.statistics().requests == 0


REGISTRATIONS = {
    "worker": add_FlightServiceServicer_to_server,
    "generated": Flight_pb2_grpc.add_FlightServiceServicer_to_server,
}


class Handlers(grpc.aio.ServerInterceptor):
    """Keeps the handlers that a server answers with."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        self.found.append(handler)
        return handler


@asynccontextmanager
async def served(worker: Worker, registration: str, *interceptors: Handlers) -> AsyncIterator[RunningWorker]:
    """A worker on a server of the user's own."""
    server = grpc.aio.server(options=server_options(), interceptors=interceptors)
    REGISTRATIONS[registration](worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield RunningWorker(worker, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


class Counting(Worker):
    """A worker of a user who wants a look at every message."""

    messages = 0

    async def DoGet(
        self, request: Flight_pb2.Ticket, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Flight_pb2.FlightData]:
        async for data in super().DoGet(request, context):
            self.messages += 1
            yield data


@pytest.mark.parametrize("registration", REGISTRATIONS)
async def test_both_registrations_serve_tickets_and_descriptors(plan: bytes, registration: str) -> None:
    async with Worker() as worker, served(worker, registration) as running:
        info = await flight_info(running, do_get(plan))
        tables = await fetch(running, tickets(info))
    assert [table["id"].to_pylist() for table in tables] == [[0], [1], [2], []]
    assert all(table.schema.equals(SCHEMA, check_metadata=True) for table in tables)


@pytest.mark.parametrize(("registration", "is_bytes"), [("worker", True), ("generated", False)])
async def test_only_the_registration_of_the_worker_sends_ready_bytes(
    plan: bytes, registration: str, is_bytes: bool
) -> None:
    handlers = Handlers()
    async with Worker() as worker, served(worker, registration, handlers) as running:
        await fetch_one(running, do_get(plan))
    (handler,) = handlers.found
    assert (handler.response_serializer is None) is is_bytes


@pytest.mark.parametrize("registration", REGISTRATIONS)
async def test_a_do_get_that_is_overridden_is_what_serves_with_both_registrations(
    plan: bytes, registration: str
) -> None:
    async with Counting() as worker, served(worker, registration) as running:
        table = await fetch_one(running, do_get(plan, 1))
        assert worker.messages == 2
    assert table["id"].to_pylist() == [1]


async def test_a_ticket_beyond_the_limit_is_refused_and_one_up_to_it_is_read() -> None:
    async with running_worker(settings=Settings(max_ticket_size=1 << 20)) as running, stub(running.address) as service:
        for size, refused in (((1 << 20) - 100, False), (2 << 20, True)):
            ticket = Flight_pb2.Ticket(ticket=do_get(b"\xff" * size))
            code, details = await status(service.DoGet(ticket))
            expected = grpc.StatusCode.RESOURCE_EXHAUSTED if refused else grpc.StatusCode.INVALID_ARGUMENT
            assert code is expected, details
        assert running.worker.statistics().requests == 0
