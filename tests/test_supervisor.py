"""The supervisor, with workers that are killed, kill themselves, hang, or do not start."""

import asyncio
import contextlib
import itertools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from datafusion import SessionContext, udf
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from support import listening, status, until
from test_partitions import PANICS_IN_EXECUTION
from worker_service import coordinated, read, task_key

import worker
from worker import Settings, plan_ticket
from worker.client import WorkerClient
from worker.proto.Flight_pb2 import Ticket
from worker.proto.Flight_pb2_grpc import FlightServiceStub
from worker.supervision.board import Board
from worker.supervision.collector import combined, serve
from worker.supervision.engine_threads import NAME, EngineThreads
from worker.supervision.journal import Journal
from worker.supervision.ports import reserve
from worker.supervision.supervisor import LONGEST_DELAY, Supervisor, Times, delay, how_it_ended
from worker.testing import RunningWorker, running_worker

# What a session builder of these tests knows: functions that end the process, and a way to make it hang.
BUILDER = """
import os, signal, time
import pyarrow as pa
from datafusion import udf

def die(values):
    os.kill(os.getpid(), signal.SIGKILL)

functions = [udf(die, [pa.int64()], pa.int64(), "volatile", "die")]

async def build_state(ctx):
    if "x-hang" in ctx.headers:
        time.sleep(600)
    return ctx.builder.with_scalar_functions(functions).build()
"""
ONE = SessionContext().sql("select 1 as one").execution_plan().to_bytes()
ENDLESS = SessionContext().sql("select value from generate_series(1, 1000000000000)").execution_plan().to_bytes()
UNYIELDING = (
    SessionContext()
    .sql("select count(*) from range(0, 300000) a join range(0, 300000) b on a.value * b.value % 7 > b.value + a.value")
    .execution_plan()
    .to_bytes()
)
SECONDS = 30


def killer() -> bytes:
    """A plan that ends the process."""
    import pyarrow as pa

    session = SessionContext()
    session.register_udf(udf(lambda values: values, [pa.int64()], pa.int64(), "volatile", "die"))
    return session.sql("select die(value) from range(0, 3)").execution_plan().to_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the session builder."""
    (tmp_path / "mine.py").write_text(BUILDER)
    return tmp_path


async def ask(address: str, plan: bytes, *headers: tuple[str, str]) -> tuple[grpc.StatusCode, str]:
    """What becomes of a plan's first partition."""
    # What has been refused is tried again at once, not after gRPC's second or more.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        ticket = Ticket(ticket=plan_ticket(plan))
        return await status(
            FlightServiceStub(channel).DoGet(ticket, metadata=headers, wait_for_ready=True, timeout=SECONDS)
        )


async def works(address: str) -> None:
    """Waits until a worker answers."""
    async with asyncio.timeout(SECONDS):
        while (await ask(address, ONE))[0] is not grpc.StatusCode.OK:
            await asyncio.sleep(0.01)


def children(process: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process).children()
    return found


async def child_of(process: int, *others: psutil.Process) -> psutil.Process:
    """The worker of a supervisor, once there is one that is none of the others."""
    await until(lambda: any(child not in others for child in children(process)), SECONDS)
    return next(child for child in children(process) if child not in others)


def out_of_memory_score(process: int) -> int:
    return int(Path(f"/proc/{process}/oom_score_adj").read_text())


async def test_a_worker_that_is_killed_is_replaced_on_its_port_and_that_is_logged() -> None:
    async with listening("-m", "worker", "--port", "0") as (process, url):
        address = url.removeprefix("grpc://")
        await works(address)
        first = await child_of(process.pid)
        assert out_of_memory_score(first.pid) == min(1000, out_of_memory_score(process.pid) + 500)

        first.kill()

        await works(address)
        assert await child_of(process.pid, first) != first
        process.terminate()
        assert process.stderr is not None
        log = (await process.stderr.read()).decode()
        assert await process.wait() == 0
        assert f"ERROR worker died port={url.rpartition(':')[2]} process={first.pid} how=SIGKILL seconds=" in log
        assert " running=nothing " in log


def of_workers(folder: Path) -> list[Path]:
    """The folders that workers have in there."""
    return list(folder.glob("worker-*"))


@pytest.mark.parametrize("is_set", [True, False])
async def test_of_a_worker_that_was_killed_no_file_is_left(
    is_set: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    options = ("--spill-folder", str(folder)) if is_set else ()
    async with listening("-m", "worker", "--port", "0", *options) as (process, url):
        (first,) = children(process.pid)
        (left,) = of_workers(folder)
        (left / "spilled").touch()

        first.kill()

        await works(url.removeprefix("grpc://"))
        assert not left.exists()
        process.terminate()
        assert await process.wait() == 0
    assert not of_workers(folder)


async def test_a_plan_that_ends_the_worker_is_refused_the_third_time_and_those_beside_it_are_not(folder: Path) -> None:
    """
    1. A stream is under way when the plan ends the worker; its client comes again, and so does the plan.
    2. The third time the plan is refused, and the other client is served.
    """
    options = ("--session-builder", "mine:build_state")
    async with listening("-m", "worker", "--port", "0", *options, folder=folder) as (process, url):
        address = url.removeprefix("grpc://")
        for _ in range(2):
            await works(address)
            async with WorkerClient(url) as client, aclosing(client.execute(ENDLESS, 0)) as batches:
                await anext(batches)
                code, _ = await ask(address, killer())
                assert code is grpc.StatusCode.UNAVAILABLE
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in batches:
                        pass

        code, text = await ask(address, killer())
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text.startswith("this plan ended the worker more than once")
        async with WorkerClient(url) as client, aclosing(client.execute(ENDLESS, 0)) as batches:
            assert (await anext(batches)).num_rows
        process.terminate()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert b"plan without a stage key, partition 0 executed for " in await process.stderr.read()


async def test_a_task_of_a_cluster_that_ends_a_worker_is_refused_the_third_time_in_other_queries_and_workers_too(
    folder: Path,
) -> None:
    options = ("--session-builder", "mine:build_state", "--workers", "2")
    unavailable, refused = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION
    async with listening("-m", "worker", "--port", "0", *options, folder=folder) as (process, url):
        assert process.stdout is not None
        other = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
        for each, expected in ((url, unavailable), (url, unavailable), (url, refused), (other, refused)):
            address = each.removeprefix("grpc://")
            running = RunningWorker(worker.Worker(), address)
            await works(address)
            key = task_key()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                async with coordinated(running, killer(), key=key):
                    await read(running, key, range(1))
            assert failed.value.code() is expected


async def test_both_dialects_note_what_runs() -> None:
    """When it is cancelled, it is known for a moment that it has run."""
    board = Board.shared()
    journal = Journal(board)
    async with running_worker(journal=journal) as running:
        async with WorkerClient(running.url) as client, aclosing(client.execute(ENDLESS, 0)) as batches:
            await anext(batches)
            assert [plan.text for plan in board.running()] == ["plan without a stage key, partition 0"]
        await until(lambda: journal.oldest() == math.inf)
        key = task_key(number=0)
        async with coordinated(running, ENDLESS, key=key):
            reading = asyncio.ensure_future(read(running, key, range(1)))
            await until(lambda: any("/1/0, partition 0" in plan.text for plan in board.running()))
            reading.cancel()
            await asyncio.wait([reading])
        await until(lambda: journal.oldest() == math.inf)


@asynccontextmanager
async def supervised(times: Times, *options: str) -> AsyncIterator[tuple[Supervisor, str]]:
    """A supervisor in this process, and where its worker listens."""
    command = [sys.executable, "-m", "worker", *options, "--no-supervisor", "--grace", "0"]
    announced: asyncio.Queue[str] = asyncio.Queue()
    supervisor = Supervisor(Settings(port=0, grace=0), command, announced.put_nowait, times=times)
    running = asyncio.ensure_future(supervisor.run())
    try:
        yield supervisor, (await asyncio.wait_for(announced.get(), SECONDS)).removeprefix("grpc://")
        supervisor.stop(signal.SIGTERM)
        assert await asyncio.wait_for(running, SECONDS) == 0
    finally:
        running.cancel()
        await asyncio.wait([running])
        for child in children(os.getpid()):
            child.kill()


async def test_a_worker_whose_event_loop_hangs_is_replaced_and_shows_in_what(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(worker.__file__).parent.parent))
    times = Times(silent=3, kill=0.1)
    async with supervised(times, "--session-builder", "mine:build_state") as (supervisor, address):
        code, _ = await ask(address, ONE, ("x-hang", "yes"))
        assert code is grpc.StatusCode.UNAVAILABLE
        await works(address)
        assert supervisor.places[0].restarts >= 1
    assert 'mine.py", line 13 in build_state' in capfd.readouterr().err


async def test_a_worker_with_a_thread_that_works_for_nobody_is_replaced() -> None:
    async with supervised(Times(stuck=2)) as (supervisor, address):
        async with grpc.aio.insecure_channel(address) as channel:
            answer = FlightServiceStub(channel).DoGet(Ticket(ticket=plan_ticket(UNYIELDING)))
            first = supervisor.places[0].child
            assert first is not None
            await until(lambda: bool(first.board.running()), SECONDS)
            answer.cancel()
        await until(lambda: supervisor.places[0].restarts >= 1, SECONDS)
        await works(address)
        await asyncio.wait_for(asyncio.shield(first.ended), SECONDS)


async def test_a_worker_that_hangs_in_its_start_is_replaced() -> None:
    async with supervised(Times(silent=1, start=2)) as (supervisor, address):
        (place,) = supervisor.places
        place.start_seconds = 0
        first = place.child
        assert first is not None
        first.signal(signal.SIGKILL)
        await until(lambda: place.child is not first, SECONDS)
        assert place.child is not None
        place.child.signal(signal.SIGSTOP)
        assert not place.is_up
        # The next one may be slow, on a busy machine.
        place.start_seconds = SECONDS
        await works(address)
        assert place.restarts >= 2


async def test_a_supervisor_that_can_start_no_thread_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads there are only so many in a container, and what it is to replace may have taken them."""
    async with supervised(Times()) as (supervisor, address):
        (place,) = supervisor.places
        first = place.child
        assert first is not None
        tried = asyncio.Event()

        def fail(*_: object) -> None:
            tried.set()
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            first.signal(signal.SIGKILL)
            await asyncio.wait_for(tried.wait(), SECONDS)
            tried.clear()
            await asyncio.wait_for(tried.wait(), SECONDS)
            assert place.child is first
        await works(address)


async def test_a_standard_error_that_nobody_reads_holds_up_nothing(folder: Path) -> None:
    """
    1. The log fills what is between the worker and whoever does not read.
    2. Plans panic, which DataFusion writes to standard error, in as many threads as it has: each has its answer.
    3. Once it is read again, the log goes on, and says that there is a gap.
    """
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", "--port", "0", "--grace", "0"), stdout=PIPE, stderr=write_end
    )
    os.close(write_end)
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().removeprefix("listening on grpc://").strip()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = FlightServiceStub(channel)
            for _ in range(10):
                await asyncio.gather(*(status(stub.DoGet(Ticket(ticket=b"\xff" * 1000))) for _ in range(100)))
        for _ in range(8):
            code, _text = await ask(address, PANICS_IN_EXECUTION["no arguments"]())
            assert code is grpc.StatusCode.INTERNAL

        log = b""
        while b"[lines dropped: nobody read them]\n" not in log:
            log += os.read(read_end, 1 << 16)
            await works(address)
    finally:
        process.kill()
        await process.wait()
        os.close(read_end)


async def test_a_plan_whose_memory_grows_after_its_end_has_the_worker_replaced_and_is_refused_the_third_time() -> None:
    """
    1. A function takes more memory than there may be; its request is ended, and it does not notice.
    2. The worker is replaced, and answers others.
    3. Once more, and the plan is refused.
    """
    session = SessionContext()
    session.from_pydict({"x": [1 << 40]}, "t")
    plan = session.sql("SELECT repeat(arrow_cast('x', 'LargeUtf8'), x) AS y FROM t").execution_plan().to_bytes()
    async with supervised(Times(), "--memory", "256MiB") as (supervisor, address):
        for restarts in (1, 2):
            code, text = await ask(address, plan)
            assert code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}, text
            await until(lambda wanted=restarts: supervisor.places[0].restarts == wanted, SECONDS)  # type: ignore[misc]
            await works(address)
        code, text = await ask(address, plan)
        assert code is grpc.StatusCode.FAILED_PRECONDITION, text
        await works(address)


async def test_a_panic_is_told_with_its_place_and_message() -> None:
    async with supervised(Times()) as (_, address):
        for plan in (PANICS_IN_EXECUTION["no arguments"](), PANICS_IN_EXECUTION["first zero rows"]()):
            code, text = await ask(address, plan)
            assert code is grpc.StatusCode.INTERNAL
            assert text.startswith("DataFusion panicked while it executed the plan: ")
            assert re.search(r"\(panicked at datafusion-[a-z-]+-55\.\S+\.rs:\d+:\d+: .+\)$", text), text
        await works(address)


def scraped(port: int) -> dict[str, float]:
    """The values of all samples without labels that a supervisor serves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


async def test_a_supervisor_tells_prometheus_of_its_worker_also_while_that_is_dead() -> None:
    async with supervised(Times(silent=60), "--metrics-port", "0") as (supervisor, address):
        port = serve(supervisor, "127.0.0.1", 0)
        own = {"worker_up": 1, "worker_restarts_total": 0, "worker_quarantined_plans": 0}
        await works(address)
        found = await asyncio.to_thread(scraped, port)
        assert found.items() >= own.items()
        assert found["worker_partitions_executed_total"] >= 1
        assert found["process_cpu_seconds_total"] > 0

        first = supervisor.places[0].child
        assert first is not None
        first.signal(signal.SIGSTOP)
        assert await asyncio.to_thread(scraped, port) == own
        first.signal(signal.SIGKILL)
        await first.ended
        assert (await asyncio.to_thread(scraped, port))["worker_up"] == 0

        await works(address)
        found = await asyncio.to_thread(scraped, port)
        assert found.items() >= (own | {"worker_restarts_total": 1}).items()
        assert found["worker_partitions_executed_total"] >= 1


def test_the_metrics_of_several_workers_are_told_apart_by_a_label() -> None:
    texts = []
    for number in (1, 2):
        registry = CollectorRegistry()
        Counter("rows", "Rows", ["kind"], registry=registry).labels("sent").inc(number)
        Histogram("seconds", "Seconds", buckets=[1], registry=registry).observe(number)
        texts.append(({"worker": f"800{number}"}, generate_latest(registry).decode()))

    class Combined(Collector):
        def collect(self) -> Iterator[Metric]:
            return combined(texts)

    registry = CollectorRegistry()
    registry.register(Combined())
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {(sample.labels["worker"], sample.labels["kind"], sample.value) for sample in families["rows"].samples} == {
        ("8001", "sent", 1),
        ("8002", "sent", 2),
    }
    buckets = [sample for sample in families["seconds"].samples if sample.name == "seconds_bucket"]
    assert {(sample.labels["worker"], sample.labels["le"], sample.value) for sample in buckets} == {
        ("8001", "1.0", 1),
        ("8001", "+Inf", 1),
        ("8002", "1.0", 0),
        ("8002", "+Inf", 1),
    }


async def test_workers_end_with_a_supervisor_that_is_killed_and_leave_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    async with listening("-m", "worker", "--port", "0", "--grace", "0") as (process, url):
        await works(url.removeprefix("grpc://"))
        (child,) = children(process.pid)
        process.kill()
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, SECONDS)
        assert not of_workers(folder)


async def test_workers_that_have_not_started_end_with_a_supervisor_that_is_killed_and_leave_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(worker.__file__).parent.parent))
    (folder / "slow.py").write_text("import pathlib, time; pathlib.Path('loading').touch(); time.sleep(600)")
    command = ("-m", "worker", "--port", "0", "--session-builder", "slow:build_state")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=folder)
    await until((folder / "loading").exists, SECONDS)
    (child,) = children(process.pid)
    process.kill()
    await process.wait()
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, SECONDS)
    assert not of_workers(folder)


async def test_a_process_that_was_started_without_standard_streams_is_none_the_worse(folder: Path) -> None:
    """Its descriptors would be those of sockets, which what the engine writes to standard error goes into."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", 'exec "$@" <&- >&- 2>&-', "", sys.executable, "-m", "worker", "--port", str(port))
    )
    try:
        await works(f"127.0.0.1:{port}")
        for each in (process.pid, (await child_of(process.pid)).pid):
            assert os.readlink(f"/proc/{each}/fd/1") == os.devnull
        process.terminate()
        assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@pytest.mark.parametrize("option", ["--supervisor", "--no-supervisor"])
async def test_a_worker_whose_standard_output_nobody_reads_serves(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = (sys.executable, "-m", "worker", "--port", str(port), option)
    process = await asyncio.create_subprocess_exec(*command, stdout=write_end, stderr=PIPE)
    os.close(write_end)
    try:
        await works(f"127.0.0.1:{port}")
        process.terminate()
        _, errors = await process.communicate()
        assert process.returncode == 0
        assert b"BrokenPipe" not in errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def test_a_port_is_one_supervisors_even_while_its_worker_is_dead() -> None:
    async with listening("-m", "worker", "--port", "0") as (_, url):
        port = url.rpartition(":")[2]
        for option in ("--supervisor", "--no-supervisor"):
            other = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "worker", "--port", port, option, stdout=PIPE, stderr=PIPE
            )
            output, errors = await other.communicate()
            assert (other.returncode, output) == (2, b"")
            assert f"cannot listen on 127.0.0.1:{port}".encode() in errors


def test_a_reserved_port_cannot_be_reserved_again() -> None:
    reserved = reserve("127.0.0.1", 0)
    port = reserved[0].getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: the port is taken"):
        reserve("127.0.0.1", port)
    for each in reserved:
        each.close()
    for each in reserve("127.0.0.1", port):
        each.close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("192.0.2.1", 0)])
def test_what_cannot_be_listened_on_is_named(host: str, port: int) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {host}:{port}"):
        reserve(host, port)


async def test_there_may_be_several_workers_each_with_its_share_of_the_memory() -> None:
    async with listening("-m", "worker", "--port", "0", "--workers", "2") as (process, url):
        assert process.stdout is not None
        other = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
        assert other != url
        for each in (url, other):
            await works(each.removeprefix("grpc://"))
        first, second = children(process.pid)
        for child in (first, second):
            assert int(child.environ()["WORKER_MEMORY"]) == Settings().memory // 2
        process.terminate()
        assert await process.wait() == 0


async def test_several_workers_listen_on_ports_that_follow_each_other() -> None:
    port = next(port for port in itertools.count(20000 + os.getpid() % 10000, 2) if _are_free(port, port + 1))
    async with listening("-m", "worker", "--port", str(port), "--workers", "2") as (process, url):
        assert process.stdout is not None
        other = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
        assert {url, other} == {f"grpc://127.0.0.1:{port}", f"grpc://127.0.0.1:{port + 1}"}


def _are_free(*ports: int) -> bool:
    with contextlib.ExitStack() as opened:
        try:
            for port in ports:
                for each in reserve("127.0.0.1", port):
                    opened.enter_context(each)
        except OSError:
            return False
    return True


def test_deaths_in_succession_are_waited_after_longer_and_longer() -> None:
    assert [delay(deaths) for deaths in range(6)] == [0, 0, 0.5, 1, 2, 4]
    assert delay(100) == delay(10_000) == LONGEST_DELAY


def test_an_end_is_named_by_its_signal() -> None:
    assert [how_it_ended(code) for code in (0, 2, -6, -9, -63)] == [
        "exit code 0",
        "exit code 2",
        "SIGABRT",
        "SIGKILL",
        "signal 63",
    ]


class Proc:
    """A folder of threads, as ``/proc/self/task`` is, that tests write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def show(self, number: int, cpu: float, waits: int, name: str = NAME) -> None:
        thread = self.folder / str(number)
        thread.mkdir(exist_ok=True)
        ticks = int(cpu * os.sysconf("SC_CLK_TCK"))
        fields = " ".join(["R", *["0"] * 10, str(ticks), "0", *["0"] * 20])
        (thread / "stat").write_text(f"{number} ({name}) {fields}\n")
        (thread / "status").write_text(
            f"Name:\t{name}\nvoluntary_ctxt_switches:\t{waits}\nnonvoluntary_ctxt_switches:\t9\n"
        )


@pytest.fixture
def looks(tmp_path: Path) -> tuple[Proc, EngineThreads]:
    return Proc(tmp_path), EngineThreads(tmp_path)


def test_a_thread_that_works_on_when_all_that_was_started_before_is_over_works_for_nobody(
    looks: tuple[Proc, EngineThreads],
) -> None:
    proc, threads = looks
    found = []
    for now in range(10):
        proc.show(1, cpu=now, waits=7)
        # What was started at 0 is over at 4; what came later does not count.
        found.append(threads.look(now, oldest=-1 if now < 4 else 3))
    assert found == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("cpu", "waits", "name", "oldest"),
    [(0.0, 0, NAME, 99), (1.0, 1, NAME, 99), (1.0, 0, "python", 99), (1.0, 0, NAME, -1)],
    ids=["sleeps", "waits now and then", "is not DataFusion's", "works for what was started before"],
)
def test_other_threads_do_not(
    cpu: float, waits: int, name: str, oldest: float, looks: tuple[Proc, EngineThreads]
) -> None:
    proc, threads = looks
    for now in range(10):
        proc.show(1, cpu * now, waits * now, name)
        assert threads.look(now, oldest) == 0


def test_the_threads_of_this_process_can_be_looked_at() -> None:
    assert EngineThreads().look(time.monotonic(), float("inf")) == 0
