"""What Prometheus reads of a worker, and that it is so."""

import asyncio
import re
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionContext, udf
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus
from support import do_get, fetch_one, in_threads, listening, stage_key, status, status_of, stub, until
from test_server import refused
from worker_service import coordinated, plan_of, read, refusal, refused_read, service, task_key

import worker
from worker import metrics, metrics_server
from worker.client import WorkerClient
from worker.config import Settings
from worker.durations import BOUNDS, Durations
from worker.metrics_server import MOST_CONNECTIONS, MetricsServer
from worker.proto import Flight_pb2, observability_pb2, observability_pb2_grpc, worker_pb2
from worker.testing import RunningWorker, running_worker

DOCUMENT = Path(__file__).parent.parent / "docs" / "operation.md"

# By a sample's name and its labels, sorted and as text.
Samples: TypeAlias = dict[tuple[str, str], float]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def get(port: int, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read()).decode()


def samples(text: str) -> Samples:
    return {
        (sample.name, ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in parse_prometheus(text)
        for sample in family.samples
    }


@contextmanager
def served(running: RunningWorker) -> Iterator[MetricsServer]:
    with metrics.serve(running.worker, "127.0.0.1", 0) as server:
        yield server


def collected(running: RunningWorker) -> Samples:
    """What is served, without a server."""
    return samples(generate_latest(metrics.registry(running.worker)).decode())


async def ended(running: RunningWorker) -> dict[str, float]:
    """By method and status, how many requests have ended."""
    await until(lambda: running.worker.statistics().requests == 0)
    return {
        labels.replace("method=", "").replace(",status=", " "): value
        for (name, labels), value in collected(running).items()
        if name == "worker_requests_total"
    }


def rows(number: int) -> bytes:
    """A plan of one partition of so many rows."""
    session = SessionContext()
    session.register_record_batches("t", [[pa.record_batch({"x": range(number)})]])
    return session.sql("SELECT x + 1 FROM t").execution_plan().to_bytes()


def calls_an_unknown_function() -> bytes:
    """A plan that does not decode in another session."""
    session = SessionContext()
    session.register_udf(udf(lambda column: column, [pa.int64()], pa.int64(), "immutable", "unknown_here"))
    return session.sql("SELECT unknown_here(value) FROM range(3)").execution_plan().to_bytes()


def endless() -> bytes:
    plan = SessionContext().sql("SELECT value FROM range(0, 1000000000000)").execution_plan()
    return plan.to_bytes()


@asynccontextmanager
async def one_of_everything() -> AsyncIterator[RunningWorker]:
    """A worker that has answered requests of both dialects, well and badly."""
    async with running_worker() as running:
        await fetch_one(running, do_get(rows(5)))
        await status_of(running, b"no ticket")
        async with coordinated(running, plan_of([1, 2])) as coordination:
            await coordination.read(range(1))
        await until(lambda: running.worker.statistics().requests == 0)
        yield running


def documented() -> set[str]:
    """The names in the first column of the table of metrics."""
    chapter = DOCUMENT.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", chapter, re.MULTILINE)
    assert cells
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(("accept", "parse"), [("text/plain", parse_prometheus), (OPENMETRICS, parse_openmetrics)])
async def test_prometheus_own_parsers_find_exactly_what_the_table_names(accept: str, parse: Any) -> None:
    async with one_of_everything() as running:
        with served(running) as server:
            (text,) = await in_threads([lambda: get(server.port, accept)])
    families = list(parse(text))
    totals = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert totals == documented()
    for family in families:
        assert family.documentation
        assert family.samples, f"{family.name} has no samples"


async def test_requests_for_tickets_are_counted_by_how_they_ended() -> None:
    """OK, refused before and after the ticket is read, cancelled in the midst of it, and not offered."""
    async with running_worker() as running, stub(running.address) as client, WorkerClient(running.url) as reader:
        assert await ended(running) == {}
        for number in (3, 5):
            await fetch_one(running, do_get(rows(number)))
        await status_of(running, b"no ticket")
        await status_of(running, do_get(rows(1), partition=7))
        batches = reader.execute(endless(), 0)
        await anext(batches)
        assert collected(running)["worker_requests_active", ""] == 1
        assert collected(running)["worker_streams", ""] == 1
        await batches.aclose()
        descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(rows(1)))
        assert (await status(client.GetFlightInfo(descriptor)))[0] is grpc.StatusCode.OK
        assert (await status(client.GetSchema(Flight_pb2.FlightDescriptor())))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await status(client.ListActions(Flight_pb2.Empty())))[0] is grpc.StatusCode.UNIMPLEMENTED
        assert await ended(running) == {
            "DoGet OK": 2,
            "DoGet INVALID_ARGUMENT": 2,
            "DoGet CANCELLED": 1,
            "GetFlightInfo OK": 1,
            "GetSchema INVALID_ARGUMENT": 1,
            "ListActions UNIMPLEMENTED": 1,
        }
        errors = {labels: n for (name, labels), n in collected(running).items() if name == "worker_errors_total"}
        assert errors == {"error=InvalidTicket": 2, "error=PartitionOutOfRange": 1}


async def test_requests_of_a_cluster_are_counted_by_how_they_ended() -> None:
    async with running_worker() as running:
        async with coordinated(running, plan_of([1, 2, 3])) as coordination:
            await coordination.read(range(1))
            await refused_read(running, coordination.key, range(1))
        await refusal(running, b"no plan")
        async with service(running) as client:
            key = task_key()
            waiting = client.ExecuteTask(worker_pb2.ExecuteTaskRequest(task_key=key, none=worker_pb2.NoneHead()))
            await until(lambda: running.worker.statistics().requests == 1)
            waiting.cancel()
            await client.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        async with grpc.aio.insecure_channel(running.address) as channel:
            asked = observability_pb2_grpc.ObservabilityServiceStub(channel)
            await asked.Ping(observability_pb2.PingRequest())
            await asked.GetTaskProgress(observability_pb2.GetTaskProgressRequest())
        assert await ended(running) == {
            "CoordinatorChannel OK": 1,
            "CoordinatorChannel INVALID_ARGUMENT": 1,
            "ExecuteTask OK": 1,
            "ExecuteTask FAILED_PRECONDITION": 1,
            "ExecuteTask CANCELLED": 1,
            "GetWorkerInfo OK": 1,
            "Ping OK": 1,
            "GetTaskProgress OK": 1,
        }


async def test_what_a_deadline_ends_is_cancelled() -> None:
    async with running_worker() as running, WorkerClient(running.url) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in client.execute(endless(), 0, timeout=0.5):
                pass
        assert await ended(running) == {"DoGet CANCELLED": 1}


async def test_rows_and_bytes_are_those_that_were_sent_in_either_dialect() -> None:
    async with running_worker() as running:
        async with stub(running.address) as client:
            request = Flight_pb2.Ticket(ticket=do_get(rows(1000)))
            size = sum([len(data.data_header) + len(data.data_body) async for data in client.DoGet(request)])
        found = collected(running)
        assert (found["worker_sent_rows_total", ""], found["worker_sent_bytes_total", ""]) == (1000, size)
        async with coordinated(running, plan_of([1, 2], [3], [])) as coordination:
            key = coordination.key
            tables = await read(running, key, range(3))
        assert sum(table.num_rows for table in tables.values()) == 3
        assert collected(running)["worker_sent_rows_total", ""] == 1003


async def test_decoding_and_first_messages_are_timed() -> None:
    async with running_worker() as running:
        key = stage_key()
        for _ in range(2):
            await fetch_one(running, do_get(rows(2), key=key))
        async with coordinated(running, plan_of([1])) as coordination:
            await coordination.read(range(1))
        await status_of(running, do_get(calls_an_unknown_function()))
        found = collected(running)
        # The second of the key is a retry, which has an instance of its own; what fails takes time too.
        assert found["worker_plan_decode_seconds_count", ""] == 4
        assert 0 < found["worker_plan_decode_seconds_sum", ""] < 60
        assert found["worker_first_byte_seconds_count", "method=DoGet"] == 2
        assert found["worker_first_byte_seconds_count", "method=ExecuteTask"] == 1
        assert found["worker_first_byte_seconds_bucket", "le=+Inf,method=DoGet"] == 2


async def test_no_client_and_no_session_builder_can_make_labels_of_their_own() -> None:
    class OfTheUsers(Exception):
        pass

    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        raise OfTheUsers if "x-unexpected" in ctx.headers else worker.PermissionDenied(str(ctx.headers.get("x-name")))

    async with running_worker(build) as running, stub(running.address) as client:
        for metadata in ((("x-name", "ada"),), (("x-name", "bob"),), (("x-unexpected", "yes"),)):
            await status(client.DoGet(Flight_pb2.Ticket(ticket=do_get(rows(1))), metadata=metadata))
        assert running.worker.statistics().errors == {"PermissionDenied": 2, "SessionBuilderFailed": 1}
        assert await ended(running) == {"DoGet PERMISSION_DENIED": 2, "DoGet INTERNAL": 1}


async def test_who_has_no_token_is_counted_and_what_methods_they_think_of_are_not(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("0123456789abcdef")
    async with running_worker(settings=Settings(auth_token_file=tmp_path / "tokens")) as running:
        await status_of(running, do_get(rows(1)))
        async with grpc.aio.insecure_channel(running.address) as channel:
            for name in ("/a/B", "/arrow.flight.protocol.FlightService/DoNot"):
                call: Any = channel.unary_unary(name)
                assert (await status(call(b"")))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert await ended(running) == {"DoGet UNAUTHENTICATED": 1, "unknown UNAUTHENTICATED": 2}
        assert running.worker.statistics().errors == {"Unauthenticated": 3}


async def test_metrics_are_served_while_the_event_loop_is_busy() -> None:
    async with running_worker() as running:
        with served(running) as server:
            assert samples(get(server.port))["worker_streams", ""] == 0  # blocks the loop until the answer is there


async def test_two_workers_of_a_process_have_metrics_of_their_own_and_may_share_a_registry_with_others() -> None:
    async with running_worker() as one, running_worker() as other:
        await fetch_one(one, do_get(rows(2)))
        assert collected(one)["worker_sent_rows_total", ""] == 2
        assert collected(other)["worker_sent_rows_total", ""] == 0
        registry = metrics.registry(one.worker)
        REGISTRY.register(registry)
        try:
            assert REGISTRY.get_sample_value("worker_sent_rows_total") == 2
        finally:
            REGISTRY.unregister(registry)


async def test_who_connects_and_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server._Handler, "timeout", 0.05)
    async with running_worker() as running:
        with served(running) as server:

            def wait() -> bytes:
                with socket.create_connection(("127.0.0.1", server.port), timeout=30) as silent:
                    return silent.recv(1)

            assert await in_threads([wait]) == [b""]


async def test_of_many_who_connect_and_say_nothing_the_oldest_are_cut_off_and_metrics_are_served() -> None:
    async with running_worker() as running:
        with served(running) as server, ExitStack() as opened:

            def connect() -> socket.socket:
                return opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))

            silent = [connect() for _ in range(MOST_CONNECTIONS + 2)]
            assert await in_threads([partial(each.recv, 1) for each in silent[:2]]) == [b"", b""]
            (text,) = await in_threads([lambda: get(server.port)])
            assert "worker_sent_rows_total" in text
            assert sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) <= MOST_CONNECTIONS + 1


async def test_a_server_of_metrics_that_is_closed_does_not_listen() -> None:
    async with running_worker() as running:
        with served(running) as server:
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=30)


async def test_the_command_line_serves_metrics_on_a_port_that_it_logs() -> None:
    command = ("-m", "worker", "--port", "0", "--metrics-port", "0")
    async with listening(*command) as (process, url), WorkerClient(url) as client:
        assert process.stderr is not None
        line = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
        told = re.search(r" INFO metrics are served host=127\.0\.0\.1 port=(\d+)$", line.rstrip())
        assert told is not None, line
        async for _ in client.execute(rows(3), 0):
            pass
        (text,) = await in_threads([lambda: get(int(told[1]))])
        assert samples(text)["worker_sent_rows_total", ""] == 3
        assert samples(text)["process_resident_memory_bytes", ""] > 1 << 20


async def test_a_port_of_metrics_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await refused("--metrics-port", str(port), folder=tmp_path)
    assert f"cannot serve metrics on 127.0.0.1:{port}" in said


def test_a_histogram_puts_each_duration_below_its_bound() -> None:
    durations = Durations()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1):
        durations.add(seconds)
    histogram = durations.histogram()
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1]) == (2, 1, 1, 1)
    assert histogram.count == 5
    assert histogram.seconds == pytest.approx(2.01 * BOUNDS[0] + 2 * BOUNDS[-1] + 1)
