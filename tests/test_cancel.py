"""What is left of requests that are broken off, in whichever way, whatever they were at: nothing, at once."""

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pyarrow as pa
import pytest
from datafusion import DataFrame, ScalarUDF, SessionConfig, SessionContext, udf
from support import status, stub, until
from worker_service import coordinated, execute_request, service

from worker import Settings, StageKey, Worker, WorkerQueryContext, plan_ticket
from worker.config import MEBIBYTE
from worker.execution.executor import LEFTOVER_SECONDS
from worker.execution.stream import READS_BEFORE_FLOW
from worker.proto.Flight_pb2 import Ticket
from worker.server import Server
from worker.testing import RunningWorker, running_worker

ENDLESS = "range(1000000000000)"
NEVER = "regexp_like(cast(value as varchar), '(a|b)+c.*z')"

# What flows before it stalls: enough for reads that block, where those are made.
ROWS_THAT_FLOW = 200 * 1024

BATCHES_THAT_FLOW = 10 * READS_BEFORE_FLOW

PARTITIONS = 3

# A client's deadline, which all requests are under way long before.
DEADLINE_SECONDS = 3.0

# The issue is whether anything goes on: what does takes as much of a core as the machine gives it.
PROCESSOR_SECONDS = 0.1


def _planned(sql: str, partitions: int = 1, batch_size: int = 8192) -> DataFrame:
    options = {"datafusion.execution.batch_size": str(batch_size)}
    return SessionContext(SessionConfig(options).with_target_partitions(partitions)).sql(sql)


# By what they are at, what takes for ever: to give all of its rows, or to find one. (A nested loop join does not let
# go at all: such a process has to be replaced.)
FLOWING = {
    "scan": f"SELECT value, value + 1.5 AS a FROM {ENDLESS}",
    "window": f"SELECT value, row_number() OVER () FROM {ENDLESS}",
    "stalled union": (
        f"SELECT value FROM range({ROWS_THAT_FLOW}) UNION ALL SELECT value FROM {ENDLESS} WHERE value < 0 LIMIT 1000000"
    ),
    "stalled": f"SELECT value FROM {ENDLESS} WHERE value < {ROWS_THAT_FLOW}",
}
COMPUTING = {
    "filter": f"SELECT value FROM {ENDLESS} WHERE {NEVER}",
    "limit": f"SELECT value FROM {ENDLESS} WHERE value < 0 LIMIT 10",
    "aggregate": f"SELECT sum(value) FROM {ENDLESS}",
    "groups": f"SELECT value % 1000 AS k, sum(value) FROM {ENDLESS} GROUP BY k",
    "sort": f"SELECT value FROM {ENDLESS} WHERE value % 20 = 0 ORDER BY value * 7919 % 1000003, value",
    "top": f"SELECT value FROM {ENDLESS} ORDER BY value * 7919 % 1000003 LIMIT 10",
    "join's build side": f"SELECT a.value FROM {ENDLESS} AS a JOIN range(9) AS b USING (value) WHERE a.value < 0",
    "join's probe side": (
        f"SELECT a.value FROM range(1000) AS a JOIN (SELECT value + 1000000 AS v FROM {ENDLESS}) AS b ON a.value = b.v"
    ),
    "union": f"SELECT sum(value) FROM (SELECT value FROM {ENDLESS} UNION ALL SELECT value FROM {ENDLESS})",
}


class Relay:
    """What connections go through that are to be cut."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()
        await self._server.wait_closed()

    def cut(self) -> None:
        """As when the client's machine is gone: nothing of gRPC's is said."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)
        self._writers += (writer, to_writer)
        await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


@dataclass
class Scene:
    """A worker, and requests to it that never end by themselves."""

    worker: Worker
    server: Server
    relay: Relay
    timeout: float | None
    calls: list[Any] = field(default_factory=list)
    tasks: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def ask(self, plan: DataFrame, partitions: Sequence[int] = (0,), rows: int = 0) -> None:
        """Asks for partitions of one task, and reads so many rows of them."""
        key = StageKey.unique() if len(partitions) > 1 else None
        flight = await self.tasks.enter_async_context(stub(self.relay.address))
        plan_bytes = plan.execution_plan().to_bytes()
        for partition in partitions:
            ticket = Ticket(ticket=plan_ticket(plan_bytes, partition, key))
            self.calls.append(flight.DoGet(ticket, timeout=self.timeout))
        before = self.worker.statistics().rows_sent
        while self.worker.statistics().rows_sent - before < rows:
            assert await self.calls[-1].read() is not grpc.aio.EOF

    async def coordinate(self) -> None:
        """Sets a task as a coordinator does, and reads a partition as another worker does."""
        running = RunningWorker(self.worker, self.relay.address)
        plan = _planned(FLOWING["scan"]).execution_plan().to_bytes()
        client = await self.tasks.enter_async_context(service(running))
        coordination = await self.tasks.enter_async_context(coordinated(running, plan, timeout=self.timeout))
        reading = client.ExecuteTask(execute_request(coordination.key, range(1)), timeout=self.timeout)
        self.calls += (coordination.call, reading)
        assert await self.calls[-1].read() is not grpc.aio.EOF

    async def warm_up(self) -> None:
        """Has the worker make what it keeps: threads, a folder for what tasks read of each other."""
        plan = _planned("SELECT 1").execution_plan().to_bytes()
        running = RunningWorker(self.worker, self.server.address)
        async with coordinated(running, plan) as coordination:
            await coordination.read(range(1))

    async def cancel(self) -> None:
        for call in self.calls:
            call.cancel()

    async def disconnect(self) -> None:
        self.relay.cut()

    async def deadline(self) -> None:
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            for call in self.calls:
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def shut_down(self) -> None:
        await self.server.stop()


WAYS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "cancel": Scene.cancel,
    "disconnect": Scene.disconnect,
    "deadline": Scene.deadline,
    "shutdown": Scene.shut_down,
}


async def _flow(scene: Scene) -> None:
    for name, sql in FLOWING.items():
        # A stalled stream is one whose rows have all come.
        await scene.ask(_planned(sql, batch_size=1024), rows=ROWS_THAT_FLOW if name.startswith("stalled") else 1)


async def _compute(scene: Scene) -> None:
    for sql in COMPUTING.values():
        await scene.ask(_planned(sql))
    for name in ("filter", "groups", "join's probe side"):
        await scene.ask(_planned(COMPUTING[name], PARTITIONS), range(PARTITIONS))


SHAPES: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "flowing": _flow,
    "computing": _compute,
    "coordinated": Scene.coordinate,
}


# A deadline takes a while to come, and a server that is told of it takes it for a cancel.
@pytest.mark.parametrize(
    ("way", "shape"),
    [(way, shape) for way in WAYS for shape in SHAPES if (way, shape) != ("deadline", "computing")],
)
async def test_nothing_is_left_of_requests_that_are_broken_off(way: str, shape: str, tmp_path: Path) -> None:
    """
    1. Requests of all kinds are under way; then they are broken off.
    2. Soon the worker holds nothing; half a second later, nothing is computed any more.
    3. Their sessions are gone, and so are their tasks, descriptors, and files.
    """
    process, sessions = psutil.Process(), []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        session = ctx.builder.build()
        sessions.append(weakref.ref(session))
        return session

    async with _scene(build, tmp_path, DEADLINE_SECONDS if way == "deadline" else None) as scene:
        await scene.warm_up()
        idle = await _processor_seconds(0.2) / 0.2
        descriptors, tasks = process.num_fds(), len(asyncio.all_tasks())
        await SHAPES[shape](scene)
        expected = len(scene.calls) - (shape == "coordinated")
        await until(lambda: scene.worker.statistics().streams == expected, DEADLINE_SECONDS)

        await WAYS[way](scene)
        broken_off = time.monotonic()

        await until(lambda: not any(_held(scene.worker)), 1)
        await asyncio.sleep(broken_off + 0.5 - time.monotonic())
        assert await _processor_seconds(0.5) < 0.5 * idle + PROCESSOR_SECONDS
        scene.calls.clear()
        await scene.tasks.aclose()
        await until(lambda: not [session for session in sessions if session() is not None])
        scene.relay.cut()
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: process.num_fds() <= descriptors)
        await until(lambda: not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "lock"])


@asynccontextmanager
async def _scene(builder: Any, spill_folder: Path, timeout: float | None) -> AsyncIterator[Scene]:
    settings = Settings(
        host="127.0.0.1",
        port=0,
        grace=0,
        shutdown_delay=0,
        spill_folder=spill_folder,
        memory_limit=64 * MEBIBYTE,
    )
    async with (
        Worker(builder, settings=settings) as worker,
        Server(worker, settings) as server,
        Relay(server.address) as relay,
    ):
        scene = Scene(worker, server, relay, timeout)
        async with scene.tasks:
            yield scene


def _held(worker: Worker) -> tuple[int, int, int]:
    statistics = worker.statistics()
    return statistics.requests, statistics.streams, statistics.tasks


async def _processor_seconds(seconds: float) -> float:
    """What this process uses of the processor in so many seconds."""
    process = psutil.Process()
    start = process.cpu_times()
    await asyncio.sleep(seconds)
    end = process.cpu_times()
    return end.user + end.system - start.user - start.system


@dataclass
class _Waiting:
    """A function that returns what it is given, so many times, and then waits for ever."""

    returns: int = 0
    waiting: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, values: pa.Array) -> pa.Array:
        self.returns -= 1
        if self.returns < 0:
            self.waiting.set()
            try:
                while True:
                    time.sleep(0.001)
            finally:
                self.ended.set()
        return values

    def udf(self) -> ScalarUDF:
        return udf(self, [pa.int64()], pa.int64(), "volatile", "wait")

    async def build(self, ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_scalar_functions([self.udf()]).build()

    def plan(self, query: str) -> bytes:
        session = SessionContext(SessionConfig({"datafusion.execution.batch_size": "8"}).with_target_partitions(1))
        session.register_udf(udf(lambda values: values, [pa.int64()], pa.int64(), "volatile", "wait"))
        return session.sql(query).execution_plan().to_bytes()


async def test_a_function_that_a_flowing_stream_calls_is_broken_off() -> None:
    """
    1. A stream flows, so that it is read in a thread, which then waits in a function of the user's for ever.
    2. The request is cancelled: what the function waits in is interrupted, as by Ctrl-C.
    """
    function = _Waiting(BATCHES_THAT_FLOW)
    async with running_worker(function.build) as running, stub(running.address) as flight:
        call = flight.DoGet(Ticket(ticket=plan_ticket(function.plan(f"SELECT wait(value) FROM {ENDLESS}"))))
        assert await call.read() is not grpc.aio.EOF
        assert await asyncio.to_thread(function.waiting.wait, 10)
        call.cancel()
        await until(lambda: not any(_held(running.worker)), 1)
        assert await asyncio.to_thread(function.ended.wait, 10)


async def test_a_function_that_datafusion_calls_in_a_thread_of_its_own_is_broken_off_when_it_is_for_nobody() -> None:
    """
    1. One request waits in a function of the user's, and so does another, each in a thread of DataFusion.
    2. One is cancelled. Which call was its own nobody can tell: both go on.
    3. The other is cancelled, and another request comes: both calls are interrupted, and the new request is answered.
    """
    functions = [_Waiting(), _Waiting()]

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        if "x-which" not in ctx.headers:
            return ctx.builder.build()
        return await functions[int(ctx.headers["x-which"])].build(ctx)

    async with running_worker(build) as running, stub(running.address) as flight:
        calls = []
        for which, function in enumerate(functions):
            ticket = Ticket(ticket=plan_ticket(function.plan(f"SELECT sum(wait(value)) FROM {ENDLESS}")))
            calls.append(flight.DoGet(ticket, metadata=[("x-which", str(which))]))
            assert await asyncio.to_thread(function.waiting.wait, 10)
        calls[0].cancel()
        await until(lambda: _held(running.worker) == (1, 1, 1), 1)
        assert not await asyncio.to_thread(functions[0].ended.wait, 5 * LEFTOVER_SECONDS)
        calls[1].cancel()
        one = Ticket(ticket=plan_ticket(_planned("SELECT 1").execution_plan().to_bytes()))
        async with asyncio.timeout(10):
            while not all(function.ended.is_set() for function in functions):
                assert await status(flight.DoGet(one)) == (grpc.StatusCode.OK, "")


entered, left = threading.Event(), threading.Event()


def _unpickle_for_long() -> None:
    entered.set()
    assert left.wait(20)


class _SlowToUnpickle:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _unpickle_for_long, ()

    def __call__(self, values: pa.Array) -> pa.Array:
        return values


async def test_a_request_whose_plan_is_being_decoded_ends_at_once_and_its_task_with_the_decoding() -> None:
    """The thread goes on: nothing interrupts what makes a plan of bytes, and the task's memory is in use as long."""
    session = SessionContext()
    session.register_udf(udf(_SlowToUnpickle(), [pa.int64()], pa.int64(), "volatile", "slow"))
    plan = session.sql("SELECT slow(value) FROM range(9)").execution_plan().to_bytes()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_python_udf_inlining(True).build()

    async with running_worker(build) as running, stub(running.address) as flight:
        call = flight.DoGet(Ticket(ticket=plan_ticket(plan)))
        try:
            assert await asyncio.to_thread(entered.wait, 10)
            call.cancel()
            await until(lambda: _held(running.worker) in {(0, 0, 0), (0, 0, 1)}, 1)
        finally:
            left.set()
        await until(lambda: not any(_held(running.worker)))


async def test_a_request_whose_session_is_being_built_in_a_thread_holds_nothing_once_it_is_cancelled() -> None:
    building, built = threading.Event(), threading.Event()

    def build(ctx: WorkerQueryContext) -> SessionContext:
        building.set()
        assert built.wait(20)
        return ctx.builder.build()

    async with running_worker(build) as running, stub(running.address) as flight:
        call = flight.DoGet(Ticket(ticket=plan_ticket(_planned("SELECT 1").execution_plan().to_bytes())))
        try:
            assert await asyncio.to_thread(building.wait, 10)
            call.cancel()
            await until(lambda: not any(_held(running.worker)), 1)
        finally:
            built.set()
