"""Connections: how old they get, and what gRPC is told of them."""

import asyncio

import grpc
import pytest
from datafusion import SessionContext
from support import do_get, status

from worker import Settings, server_options
from worker.proto import Flight_pb2, Flight_pb2_grpc
from worker.testing import running_worker


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ("keepalive_time", "grpc.keepalive_time_ms"),
        ("max_connection_age", "grpc.max_connection_age_ms"),
        ("max_connection_age_grace", "grpc.max_connection_age_grace_ms"),
    ],
)
def test_seconds_become_milliseconds(setting: str, option: str) -> None:
    for seconds, milliseconds in ((0.0001, 1), (1.5, 1500), (2_000_000, 2_000_000_000)):
        options = dict(server_options(Settings.model_validate({setting: seconds})))
        assert options[option] == milliseconds


def test_connections_live_as_long_as_clients_want_unless_a_setting_says() -> None:
    assert not {"grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms"} & dict(server_options()).keys()


async def test_an_old_connection_finishes_its_stream_and_the_next_request_has_a_new_one() -> None:
    """
    1. A stream is begun, and read on only when its connection has reached its age: all rows come.
    2. The connection ends, and another request is served.
    """
    rows = 10_000_000
    plan = SessionContext().sql(f"select value from range(0, {rows})").execution_plan().to_bytes()
    one = SessionContext().sql("select 1").execution_plan().to_bytes()
    async with (
        running_worker(settings=Settings(max_connection_age=0.5)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        service = Flight_pb2_grpc.FlightServiceStub(channel)
        reading = service.DoGet(Flight_pb2.Ticket(ticket=do_get(plan)))
        await reading.read()
        # The worker says that there shall be no new requests, and the client's channel does not count it any more.
        await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 30)
        while await reading.read() is not grpc.aio.EOF:
            pass
        assert await reading.code() is grpc.StatusCode.OK
        assert running.worker.statistics().rows_sent == rows
        assert (await status(service.DoGet(Flight_pb2.Ticket(ticket=do_get(one)))))[0] is grpc.StatusCode.OK


async def test_of_many_requests_that_come_at_once_none_is_cancelled() -> None:
    """gRPC cancels some of more than a thousand that no handler has been found for, unless it is told otherwise."""
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        service = Flight_pb2_grpc.FlightServiceStub(channel)
        asked = [service.GetSchema(Flight_pb2.FlightDescriptor()) for _ in range(3000)]
        ended = {code for code, _ in await asyncio.gather(*(status(each) for each in asked))}
        assert ended == {grpc.StatusCode.INVALID_ARGUMENT}
