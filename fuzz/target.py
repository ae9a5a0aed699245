"""The worker that is attacked: a process of its own, what it answers, and how it is afterwards."""

import asyncio
import contextlib
import os
import re
import socket
import sys
import time
import urllib.request
import uuid
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import grpc
import psutil
import pyarrow as pa
from google.protobuf.message import DecodeError

from fuzz.building import planned
from fuzz.cases import Case, Kind
from worker.proto import Flight_pb2, Flight_pb2_grpc, plan_pb2, worker_pb2, worker_pb2_grpc

# Where the worker's package is.
ROOT = Path(__file__).parent.parent

# An answer that takes longer is none.
SECONDS = 10.0

# What is allocated at once fails beyond this. Most of a worker's address space are stacks, which take no memory.
ADDRESS_SPACE = 48 << 30

# A worker that has so much in memory is killed, before the machine is out of it.
RESIDENT = 6 << 30
WATCH_SECONDS = 0.1

# Of an answer that goes on and on, so much is read before it is cancelled.
MESSAGES = 20

# So soon the client tries a worker again that has just died, and no later.
RECONNECT_MILLISECONDS = 100

# A service that died has to answer again so soon, on a machine that has little else to do.
RECOVERY_SECONDS = 2.0

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MILLISECONDS),
    ("grpc.min_reconnect_backoff_ms", RECONNECT_MILLISECONDS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MILLISECONDS),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
_GAUGE = re.compile(r"^worker_(requests_active|streams|tasks)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a case was answered."""

    status: grpc.StatusCode
    text: str
    seconds: float

    @property
    def is_unforeseen(self) -> bool:
        """Whether the worker did not know what to say: what the engine says, and its panics, have names."""
        return self.status is grpc.StatusCode.UNKNOWN or self.text.startswith("internal error")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has."""

    resident: int
    descriptors: int
    threads: int


class Client:
    """Sends cases to a worker."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: ``grpc://host:port``.
        """
        self._channel = grpc.aio.insecure_channel(url.removeprefix("grpc://"), options=_OPTIONS)
        self._flight = Flight_pb2_grpc.FlightServiceStub(self._channel)
        self._worker = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._coordinator: Any = self._channel.stream_stream("/worker.WorkerService/CoordinatorChannel")
        self._execute: Any = self._channel.unary_stream("/worker.WorkerService/ExecuteTask")
        self._numbers = 0

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def send(self, case: Case) -> Answer:
        """Sends a case, and reads the beginning of the answer.

        DEADLINE_EXCEEDED where there was none in ``SECONDS``.
        """
        started = time.monotonic()
        status, text = await self._send(case)
        return Answer(status, text, time.monotonic() - started)

    async def rows(self, plan: bytes) -> pa.Table:
        """The rows of the first partition of a plan.

        Raises:
            grpc.aio.AioRpcError: there are none.
        """
        ticket = plan_pb2.DoGet(plan_proto=plan).SerializeToString()
        framed = bytearray()
        call: Any = self._flight.DoGet(Flight_pb2.Ticket(ticket=ticket), timeout=SECONDS)
        async for data in call:
            framed += b"\xff\xff\xff\xff" + len(data.data_header).to_bytes(4, "little") + data.data_header
            framed += data.data_body
        with pa.ipc.open_stream(bytes(framed)) as reader:
            return reader.read_all()

    async def _send(self, case: Case) -> tuple[grpc.StatusCode, str]:
        match case.kind:
            case Kind.PLAN:
                ticket = plan_pb2.DoGet(plan_proto=case.data).SerializeToString()
                return await _status(self._flight.DoGet(Flight_pb2.Ticket(ticket=ticket), timeout=SECONDS))
            case Kind.TICKET:
                return await _status(self._flight.DoGet(Flight_pb2.Ticket(ticket=case.data), timeout=SECONDS))
            case Kind.DESCRIPTOR:
                descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=case.data)
                status, text = await _status(self._flight.GetSchema(descriptor, timeout=SECONDS))
                if status is grpc.StatusCode.OK:
                    status, text = await _status(self._flight.GetFlightInfo(descriptor, timeout=SECONDS))
                return status, text
            case Kind.TASK:
                self._numbers += 1
                query = uuid.uuid5(uuid.NAMESPACE_OID, str(self._numbers)).bytes
                key = worker_pb2.TaskKey(query_id=query, stage_id=1, task_number=0)
                return await self._set_plan(key, plan_proto=case.data)
            case Kind.SET_PLAN:
                return await self._set_plan_bytes(case.data)
            case Kind.EXECUTE:
                return await self._execute_bytes(case.data)

    async def _set_plan(self, key: worker_pb2.TaskKey, plan_proto: bytes) -> tuple[grpc.StatusCode, str]:
        request = worker_pb2.SetPlanRequest(task_key=key, task_count=1, plan_proto=plan_proto)
        return await self._set_plan_bytes(request.SerializeToString())

    async def _set_plan_bytes(self, request: bytes) -> tuple[grpc.StatusCode, str]:
        """Sets a plan and reads its first partition."""
        try:
            key = worker_pb2.SetPlanRequest.FromString(request).task_key
        except DecodeError:
            key = worker_pb2.TaskKey()
        # As CoordinatorToWorkerMsg has it: field 1.
        call = self._coordinator(timeout=SECONDS)
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(b"\x0a" + _varint(len(request)) + request)
                first = await call.read()
                if first is not grpc.aio.EOF:
                    read = worker_pb2.ExecuteTaskRequest(
                        task_key=key, target_partition_end=1, none=worker_pb2.NoneHead()
                    )
                    return await _status(self._execute(read.SerializeToString(), timeout=SECONDS))
            return await call.code(), await call.details() or ""
        finally:
            call.cancel()

    async def _execute_bytes(self, request: bytes) -> tuple[grpc.StatusCode, str]:
        """Reads a task, which is set first: also one whose key nobody would think of."""
        try:
            key = worker_pb2.ExecuteTaskRequest.FromString(request).task_key
        except DecodeError:
            return await _status(self._execute(request, timeout=SECONDS))
        # There is no stage with a task more than the largest number.
        count = min(key.task_number + 1, (1 << 64) - 1)
        call = self._coordinator(timeout=SECONDS)
        try:
            plan = worker_pb2.SetPlanRequest(task_key=key, task_count=count, plan_proto=_HARMLESS)
            await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=plan).SerializeToString())
            if await call.read() is grpc.aio.EOF:
                return await call.code(), await call.details() or ""
            return await _status(self._execute(request, timeout=SECONDS))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return await call.code(), await call.details() or ""
        finally:
            call.cancel()


async def _status(call: Any) -> tuple[grpc.StatusCode, str]:
    """How an RPC ends, or OK when it has sent some messages; it is over then."""
    try:
        if not hasattr(call, "__aiter__"):
            await call
            return grpc.StatusCode.OK, ""
        read = 0
        async for _ in call:
            read += 1
            if read >= MESSAGES:
                break
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    finally:
        call.cancel()
    return grpc.StatusCode.OK, ""


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _harmless() -> bytes:
    batch = pa.RecordBatch.from_pydict({"x": pa.array(range(100), pa.int64())})
    return bytes(planned("SELECT x, x % 7 AS y FROM t WHERE x > 10 ORDER BY y, x", t=batch).SerializeToString())


_HARMLESS = _harmless()
_ROWS = [(x, x % 7) for x in sorted(range(11, 100), key=lambda x: (x % 7, x))]


@dataclass
class Bystander:
    """A client that means no harm, and asks the same over and over."""

    client: Client
    answers: int = 0
    retries: int = 0
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0

    async def ask(self) -> bool:
        """Asks once; whether there was an answer. One that is wrong is a problem."""
        started = time.monotonic()
        try:
            table = await self.client.rows(_HARMLESS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                self.problems.append(f"{error.code().name}: {error.details()}")
            return False
        rows = list(zip(*table.to_pydict().values(), strict=True))
        if rows != _ROWS:
            self.problems.append(f"wrong rows: {rows[:3]}")
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.answers += 1
        return True

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Asks again and again for as long as the block lasts."""
        going_on = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            going_on.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await going_on

    async def _go_on(self) -> None:
        while True:
            if not await self.ask():
                self.retries += 1
            await asyncio.sleep(0.05)


class Target:
    """A worker in a process of its own, or one that runs elsewhere."""

    def __init__(self, process: Process | None, url: str, metrics: str | None) -> None:
        self.process = process
        self.url = url
        self.client = Client(url)
        self.bystander = Bystander(Client(url))
        self.metrics = metrics
        self._serving = self._find()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.bystander.client.close()

    @property
    def is_ours(self) -> bool:
        """Whether it can be looked at, and ended."""
        return self.process is not None

    def has_died(self) -> bool:
        """Whether the process that served at first is there no more."""
        if self._serving is None:
            return False
        try:
            return not self._serving.is_running() or self._serving.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    async def died_over(self, answer: Answer) -> bool:
        """Whether the process died over what was answered so: the connection may be gone before the process is."""
        if answer.status in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}:
            for _ in range(20):
                if self.has_died():
                    return True
                await asyncio.sleep(0.05)
        return self.has_died()

    async def recovered(self, seconds: float) -> float:
        """How long it takes until it answers again.

        Raises:
            TimeoutError: longer than that.
        """
        started = time.monotonic()
        async with asyncio.timeout(seconds):
            while not await self.bystander.ask():
                await asyncio.sleep(0.02)
        self._serving = self._find()
        return time.monotonic() - started

    def usage(self) -> Usage:
        """What the serving process has.

        Raises:
            psutil.NoSuchProcess: it has just died.
        """
        assert self._serving is not None
        with self._serving.oneshot():
            memory = self._serving.memory_info().rss
            return Usage(memory, self._serving.num_fds(), self._serving.num_threads())

    async def held(self) -> dict[str, float]:
        """What the worker says that it holds: requests, streams, tasks."""
        if self.metrics is None:
            return {}
        text = await asyncio.to_thread(_read, self.metrics)
        found: dict[str, float] = {}
        for name, value in _GAUGE.findall(text):
            found[name] = found.get(name, 0) + float(value)
        return found

    async def comes_to_rest(self, seconds: float) -> dict[str, float]:
        """What it still holds after so long, nothing as soon as there is nothing."""
        held: dict[str, float] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while held := {name: value for name, value in (await self.held()).items() if value}:
                    await asyncio.sleep(0.1)
        return held

    def _find(self) -> psutil.Process | None:
        """The process that serves: under a supervisor its child."""
        if self.process is None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return next(iter(root.children()), root)
        return None


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        text: str = answer.read().decode()
        return text


@asynccontextmanager
async def target(
    *options: str,
    errors: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    address_space: int = ADDRESS_SPACE,
) -> AsyncIterator[Target]:
    """A worker, started for as long as the block lasts. It cannot take the machine's memory.

    Args:
        options: of the worker's command line.
        errors: a file that its standard error goes to.
        environment: its variables, beside those of this process.
        address_space: bytes that it may have.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(errors.open("ab")) if errors else DEVNULL
        metrics = _free_port()
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f'ulimit -v {address_space >> 10}; ulimit -c 0; exec nice -n 5 "$0" "$@"', sys.executable),
            *("-m", "worker", "--port", "0", "--metrics-port", str(metrics), "--grace", "0", *options),
            stdout=PIPE,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        try:
            line = (await process.stdout.readline()).decode()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the worker did not start: {line!r}")
            url = line.removeprefix("listening on ").strip()
            async with Target(process, url, f"http://127.0.0.1:{metrics}/metrics") as running, _watched(process):
                yield running
        finally:
            await _end(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@asynccontextmanager
async def _watched(process: Process) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for each in _family(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if each.memory_info().rss > RESIDENT:
                        each.kill()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def _family(process: Process) -> list[psutil.Process]:
    """A process and those that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []


async def _end(process: Process) -> None:
    """Ends a process and those that it started, whatever state they are in."""
    for each in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    await process.wait()
