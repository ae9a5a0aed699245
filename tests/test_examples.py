"""`examples/own_server.py` and `examples/own_client.py`, as somebody runs them who has just copied them."""

import asyncio
import importlib
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import SessionConfig, SessionContext, udf
from pyarrow import flight
from support import EXAMPLES, Touch, listening

from worker import Worker, add_FlightServiceServicer_to_server, plan_ticket, server_options
from worker.client import WorkerClient
from worker.proto import Flight_pb2_grpc

ADA = "Bearer a-token-of-ada"
WEATHER = pa.table({"station": ["Oslo", "Cairo", "Quito"], "fahrenheit": [41.0, 95.0, None]})
CELSIUS = [{"celsius": 5.0}, {"celsius": 35.0}, {"celsius": None}]


@asynccontextmanager
async def own_server() -> AsyncIterator[tuple[Process, str]]:
    async with listening(str(EXAMPLES / "own_server.py"), "--port", "0") as started:
        yield started


async def own_client(url: str, token: str, file: Path) -> tuple[int | None, str, str]:
    """The exit code, what was printed, and what was complained about."""
    command = [sys.executable, str(EXAMPLES / "own_client.py"), "--url", url, "--token", token, str(file)]
    running = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    output, errors = await running.communicate()
    return running.returncode, output.decode(), errors.decode()


def celsius_plan(trap: Touch) -> bytes:
    """A plan that calls celsius, with a Python function of another meaning in it, and a trap in that."""
    session = SessionContext()
    session.register_udf(
        udf(lambda values: (trap, values)[1], [pa.float64()], pa.float64(), "immutable", "celsius"),
    )
    session.register_record_batches("weather", [WEATHER.to_batches()])
    plan = session.sql("select celsius(fahrenheit) as celsius from weather").execution_plan().to_bytes()
    assert b"DFPYUDF" in plan
    return plan


def fetch(url: str, plan: bytes, *authorization: str) -> pa.Table:
    """The rows of partition 0, by a Flight client that knows nothing of this project."""
    headers = [(b"authorization", value.encode()) for value in authorization]
    with flight.connect(url) as client:
        return client.do_get(flight.Ticket(plan_ticket(plan)), flight.FlightCallOptions(headers=headers)).read_all()


async def rows(url: str, plan: bytes, **headers: str) -> list[dict[str, Any]]:
    async with WorkerClient(url, headers=headers) as client:
        return [row async for batch in client.execute(plan) for row in batch.to_pylist()]


async def test_own_server_gives_rows_to_who_has_a_token_and_runs_its_own_function_unpickling_nothing(
    tmp_path: Path,
) -> None:
    plan = celsius_plan(Touch(tmp_path / "unpickled"))
    async with own_server() as (_, url):
        table = await asyncio.to_thread(fetch, url, plan, ADA)
        assert table.to_pylist() == CELSIUS
        assert await rows(url, plan, Authorization="bearer a-token-of-grace") == CELSIUS
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("headers", "raised", "status", "text"),
    [
        ([], flight.FlightUnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "send the header"),
        (["Bearer "], flight.FlightUnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "send the header"),
        (["Basic YTpi"], flight.FlightUnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "send the header"),
        (["Bearer wrong"], flight.FlightUnauthorizedError, grpc.StatusCode.PERMISSION_DENIED, "nobody has this token"),
        ([f"{ADA}x"], flight.FlightUnauthorizedError, grpc.StatusCode.PERMISSION_DENIED, "nobody has this token"),
        ([ADA[:-1]], flight.FlightUnauthorizedError, grpc.StatusCode.PERMISSION_DENIED, "nobody has this token"),
    ],
)
async def test_own_server_refuses_who_has_none_or_a_wrong_one(
    headers: list[str], raised: type[Exception], status: grpc.StatusCode, text: str
) -> None:
    plan = SessionContext().sql("select 1").execution_plan().to_bytes()
    async with own_server() as (_, url):
        with pytest.raises(raised, match=text):
            await asyncio.to_thread(fetch, url, plan, *headers)
        with pytest.raises(grpc.aio.AioRpcError, match=text) as refused:
            await rows(url, plan, **({"authorization": headers[0]} if headers else {}))
        assert refused.value.code() is status


async def test_own_client_prints_what_the_function_of_own_server_answers(tmp_path: Path) -> None:
    file = tmp_path / "weather.parquet"
    pq.write_table(WEATHER.slice(0, 2), file)
    async with own_server() as (_, url):
        assert await own_client(url, "a-token-of-ada", file) == (0, "Cairo: 35.0 °C\nOslo: 5.0 °C\n", "")
        refused = "PERMISSION_DENIED: nobody has this token\n"
        assert await own_client(url, "another", file) == (1, "", refused)
        missing = tmp_path / "none.parquet"
        assert await own_client(url, "a-token-of-ada", missing) == (1, "", f"there is no file {missing}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_own_server_lets_the_running_stream_finish_and_ends_with_0_at_a_signal(number: int) -> None:
    """The stream is far larger than what the connection holds, so that it is under way when the signal comes."""
    count = 5_000_000
    session = SessionContext(SessionConfig().with_target_partitions(1))
    plan = session.sql(f"select value, value * 2.5 as x from range(0, {count})").execution_plan().to_bytes()
    async with own_server() as (running, url), WorkerClient(url, headers={"authorization": ADA}) as client:
        async with aclosing(client.execute(plan, 0)) as batches:
            seen = (await anext(batches)).num_rows
            running.send_signal(number)
            async for batch in batches:
                seen += batch.num_rows
        assert seen == count
        assert await asyncio.wait_for(running.wait(), 10) == 0


@pytest.fixture
def server_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``own_server.py``, imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("own_server")


@pytest.mark.parametrize(
    "register",
    [add_FlightServiceServicer_to_server, Flight_pb2_grpc.add_FlightServiceServicer_to_server],
    ids=["worker", "generated"],
)
async def test_the_builder_of_own_server_guards_both_registrations(
    register: Callable[[Worker, grpc.aio.Server], None], server_module: ModuleType, tmp_path: Path
) -> None:
    plan = celsius_plan(Touch(tmp_path / "unpickled"))
    async with Worker.from_session_builder(server_module.build_state) as worker:
        server = grpc.aio.server(options=server_options())
        register(worker, server)
        url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            assert await rows(url, plan, authorization=ADA) == CELSIUS
            with pytest.raises(flight.FlightUnauthorizedError, match="nobody has this token"):
                await asyncio.to_thread(fetch, url, plan, "Bearer wrong")
            with pytest.raises(flight.FlightUnauthenticatedError, match="send the header"):
                await asyncio.to_thread(fetch, url, plan)
            with pytest.raises(pa.ArrowInvalid, match="'authorization' was sent 2 times"):
                await asyncio.to_thread(fetch, url, plan, ADA, ADA)
        finally:
            await server.stop(None)
        assert worker.statistics().plans_decoded == 1
    assert not (tmp_path / "unpickled").exists()
