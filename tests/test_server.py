"""`python -m worker` as a process: how it starts, and how it ends."""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from datafusion import SessionConfig, SessionContext
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support import listening, until

from worker import plan_ticket
from worker.client import WorkerClient
from worker.proto.Flight_pb2 import Ticket
from worker.proto.Flight_pb2_grpc import FlightServiceStub
from worker.testing import running_worker

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
ROWS = 20_000_000


@asynccontextmanager
async def process(*arguments: str, folder: Path | None = None) -> AsyncIterator[tuple[Process, str]]:
    """A worker process, and the address that it says it listens on."""
    async with listening("-m", "worker", "--port", "0", *arguments, folder=folder) as (running, url):
        yield running, url.removeprefix("grpc://")


async def refused(*arguments: str, folder: Path) -> str:
    """What a worker that does not start says of it."""
    command = [sys.executable, "-m", "worker", "--port", "0", *arguments]
    running = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd=folder)
    output, errors = await running.communicate()
    assert (running.returncode, output) == (2, b"")
    assert b"Traceback" not in errors
    return errors.decode()


def large_plan() -> bytes:
    session = SessionContext(SessionConfig().with_target_partitions(1))
    return session.sql(f"select value, value * 2.5 as x from range(0, {ROWS})").execution_plan().to_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_stream_finish_and_the_process_ends_with_0_right_after_it(number: int) -> None:
    """
    1. A stream is under way, its reader waits; a health watch is open.
    2. The signal comes: the watch hears NOT_SERVING and ends, and new requests are refused.
    3. The reader goes on and gets all rows; the process ends, long before the grace is over.
    """
    async with process("--grace", "60") as (running, address), grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        async with WorkerClient(f"grpc://{address}") as client:
            batches = client.execute(large_plan(), 0)
            rows = (await anext(batches)).num_rows

            running.send_signal(number)

            assert (await watch.read()).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await watch.read()
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError) as new:
                await FlightServiceStub(channel).DoGet(Ticket(ticket=plan_ticket(large_plan()))).read()
            assert new.value.code() is grpc.StatusCode.UNAVAILABLE
            assert running.returncode is None

            async for batch in batches:
                rows += batch.num_rows
            finished = time.monotonic()
            assert await running.wait() == 0
            assert time.monotonic() - finished < 5
    assert rows == ROWS


async def test_a_second_signal_ends_the_process_at_once_with_the_signals_own_code() -> None:
    async with process("--grace", "60") as (running, address), grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with (
            WorkerClient(f"grpc://{address}") as client,
            aclosing(client.execute(large_plan(), 0)) as batches,
        ):
            await anext(batches)
            running.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING

            running.send_signal(signal.SIGINT)

            assert await asyncio.wait_for(running.wait(), 5) == 128 + signal.SIGINT


async def test_what_does_not_finish_within_the_grace_is_cancelled_and_the_process_ends_with_0() -> None:
    async with process("--grace", "0.5") as (running, address), WorkerClient(f"grpc://{address}") as client:
        batches = client.execute(large_plan(), 0)
        await anext(batches)

        running.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(running.wait(), 10) == 0
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in batches:
                pass


@pytest.mark.parametrize(
    "builder",
    [
        "def build_state(ctx):\n    time.sleep(600)\n",
        "async def build_state(ctx):\n"
        "    while True:\n"
        "        with contextlib.suppress(asyncio.CancelledError):\n"
        "            await asyncio.sleep(600)\n",
    ],
    ids=["blocks", "swallows its cancellation"],
)
async def test_a_session_builder_that_hangs_does_not_keep_the_process_from_ending(builder: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        f"import asyncio, contextlib, pathlib, time\n{builder}".replace(
            "):\n", "):\n    pathlib.Path('called').touch()\n", 1
        )
    )
    arguments = ("--grace", "0.2", "--session-builder", "hanging:build_state")
    async with (
        process(*arguments, folder=tmp_path) as (running, address),
        WorkerClient(f"grpc://{address}") as client,
    ):
        waiting = asyncio.ensure_future(anext(client.execute(large_plan(), 0)))
        await until((tmp_path / "called").exists)

        running.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(running.wait(), 10) == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await waiting


async def test_during_the_shutdown_delay_health_says_not_serving_and_requests_are_served() -> None:
    async with process("--shutdown-delay", "60") as (running, address), grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()

        running.send_signal(signal.SIGTERM)

        assert (await watch.read()).status == NOT_SERVING
        check = await health.Check(health_pb2.HealthCheckRequest(service="arrow.flight.protocol.FlightService"))
        assert check.status == NOT_SERVING
        async with WorkerClient(f"grpc://{address}") as client:
            assert [batch async for batch in client.execute(large_plan(), 0)]
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        assert b"INFO health is NOT_SERVING: new requests are refused in 60 s\n" in await running.stderr.read()


async def test_an_idle_worker_ends_at_once_however_often_it_has_worked() -> None:
    """DataFusion's threads are not there to be run into by the end of the interpreter."""
    plan = SessionContext().sql("select 1 as one").execution_plan()
    for _ in range(5):
        async with process() as (running, address):
            async with WorkerClient(f"grpc://{address}") as client:
                assert [batch.to_pylist() async for batch in client.execute(plan)] == [[{"one": 1}]]
            running.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(running.wait(), 10) == 0


async def test_health_and_reflection_are_served() -> None:
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "arrow.flight.protocol.FlightService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        call = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        services = {service.name for service in (await call.read()).list_services_response.service}
        assert services >= {"arrow.flight.protocol.FlightService", "grpc.health.v1.Health"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--session-builder", "nobody"], "'nobody' is not of the form module:attr"),
        (["--session-builder", "nobody:build"], "there is no module 'nobody'"),
        (["--session-builder", "user:missing"], "user has no attribute 'missing'"),
        (["--session-builder", "user:number"], "5 is no session builder"),
        (["--session-builder", "user:two"], "it must take a WorkerQueryContext, and that alone"),
        (["--session-builder", "broken:build"], "importing broken failed with ZeroDivisionError"),
        (["--session-builder", "needy:build"], "needy needs 'not_installed', which is missing"),
        (["--idle-time", "never"], "--idle-time (WORKER_IDLE_TIME)"),
        (["--location", "here"], "--location (WORKER_LOCATION)"),
        (
            ["--allow-path", "/,/nowhere"],
            "--allow-path (WORKER_ALLOW_PATH): Path does not point to a directory: /nowhere",
        ),
        (["--tls-cert", "/none.pem"], "--tls-cert (WORKER_TLS_CERT): Path does not point to a file: /none.pem"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--no-supervisor", "--workers", "2"], "--workers (WORKER_WORKERS): more than one takes the supervisor"),
    ],
)
async def test_what_is_wrong_with_an_option_is_said_before_the_port_opens(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "user.py").write_text("number = 5\nasync def two(ctx, other): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import not_installed\n")

    assert message in await refused(*arguments, folder=tmp_path)


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async with running_worker() as running:
        port = running.address.rpartition(":")[2]
        assert f"cannot listen on 127.0.0.1:{port}" in await refused("--port", port, folder=tmp_path)


async def test_the_session_builder_of_the_command_line_makes_the_sessions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import worker\n"
        "async def build_state(ctx):\n"
        "    raise worker.PermissionDenied(f'not you, {ctx.headers.get(\"name\")}')\n"
    )
    plan = SessionContext().sql("select 1").execution_plan()
    async with (
        process("--session-builder", "mine:build_state", folder=tmp_path) as (_, address),
        WorkerClient(f"grpc://{address}", headers={"Name": "Ada"}) as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="not you, Ada") as denied:
            await anext(client.execute(plan, 0))
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_variable_that_is_no_setting_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_IDLETIME", "5")
    async with process() as (running, _):
        running.terminate()
        assert running.stderr is not None
        assert b"there is no setting for the variable WORKER_IDLETIME" in await running.stderr.read()
