"""Session builders over the wire: who may ask, what errors say, whose functions run."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import AggregateUDF, ScalarUDF, SessionConfig, SessionContext, WindowUDF, udaf, udf, udwf
from datafusion.user_defined import Accumulator, WindowEvaluator
from support import Touch, do_get, fetch, fetch_one, listening, stage_key, status, stub

from worker import (
    DefaultSessionBuilder,
    EnginePanicked,
    ExecutionFailed,
    FailedPrecondition,
    PermissionDenied,
    SessionBuilderFailed,
    Unauthenticated,
    Worker,
    WorkerError,
    WorkerQueryContext,
    server_options,
)
from worker.client import WorkerClient
from worker.proto import Flight_pb2, Flight_pb2_grpc, plan_pb2
from worker.session import SessionBuilderLike
from worker.testing import RunningWorker, running_worker

Answer: TypeAlias = tuple[grpc.StatusCode, str]
Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

OK = (grpc.StatusCode.OK, "")
BUILDER_FAILED = (grpc.StatusCode.INTERNAL, "the session builder failed: the worker's log says why")


INT = pa.int64()
ADA = [("authorization", "Bearer ada-3f9c")]
GRACE = [("authorization", "Bearer grace-71d0")]


@pytest.fixture
def plan() -> bytes:
    """Two partitions, a row each: 1, 2."""
    session = SessionContext(SessionConfig().with_target_partitions(2))
    session.register_record_batches("t", [[pa.record_batch({"x": [number]})] for number in (1, 2)])
    described = session.table("t").execution_plan()
    assert described.partition_count == 2
    return described.to_bytes()


@asynccontextmanager
async def generated_registration(builder: SessionBuilderLike) -> AsyncIterator[RunningWorker]:
    """A worker on a server of one's own, added by the generated function."""
    async with Worker.from_session_builder(builder) as worker:
        server = grpc.aio.server(options=server_options())
        Flight_pb2_grpc.add_FlightServiceServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield RunningWorker(worker, f"127.0.0.1:{port}")
        finally:
            await server.stop(None)


both_registrations = pytest.mark.parametrize(
    "serving", [running_worker, generated_registration], ids=["worker", "generated"]
)


async def do_get_answer(running: RunningWorker, ticket: bytes, metadata: Metadata = ()) -> Answer:
    async with stub(running.address) as flight_service:
        return await status(flight_service.DoGet(Flight_pb2.Ticket(ticket=ticket), metadata=metadata))


async def answers(running: RunningWorker, ticket: bytes, metadata: Metadata = ()) -> list[Answer]:
    """What the three RPCs are answered with that build a session."""
    descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=ticket)
    async with stub(running.address) as flight_service:
        return [
            await do_get_answer(running, ticket, metadata),
            await status(flight_service.GetFlightInfo(descriptor, metadata=metadata)),
            await status(flight_service.GetSchema(descriptor, metadata=metadata)),
        ]


def raising(error: BaseException) -> Callable[[WorkerQueryContext], Awaitable[SessionContext]]:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        raise error

    return build


def with_subclasses(kind: type[WorkerError]) -> list[type[WorkerError]]:
    return [kind, *(error for subclass in kind.__subclasses__() for error in with_subclasses(subclass))]


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "worker" and record.levelname == "ERROR"]


async def until_nothing_is_held(worker: Worker) -> None:
    deadline = time.monotonic() + 5
    while (now := worker.statistics()) and (now.requests, now.streams, now.tasks) != (0, 0, 0):
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.001)


# Errors of a builder


@both_registrations
@pytest.mark.parametrize("error", with_subclasses(WorkerError))
async def test_an_error_of_the_worker_that_a_builder_raises_is_answered_with_its_status_and_text(
    error: type[WorkerError], serving: Any, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(raising(error("über 50%, so nicht"))) as running:
        assert await answers(running, do_get(plan)) == [(error.status, "über 50%, so nicht")] * 3
        await until_nothing_is_held(running.worker)
        assert running.worker.statistics().plans_decoded == 0
    assert len(errors_logged(caplog)) == (3 if error.status is grpc.StatusCode.INTERNAL else 0)


def test_the_errors_that_are_tried_are_all_there_are() -> None:
    tried = with_subclasses(WorkerError)
    assert {EnginePanicked, ExecutionFailed, FailedPrecondition, SessionBuilderFailed, Unauthenticated} < set(tried)


class UsersOwnError(Exception):
    """What a library of the user's raises."""


class NoException(BaseException):
    """What is no Exception, as a Rust panic is none."""


@both_registrations
@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (UsersOwnError("the password is hunter2"), BUILDER_FAILED),
        (grpc.RpcError("the password is hunter2"), BUILDER_FAILED),
        (TimeoutError("the password is hunter2"), BUILDER_FAILED),
        (ExceptionGroup("the password is hunter2", [UsersOwnError("hunter2")]), BUILDER_FAILED),
        (NoException("the password is hunter2"), BUILDER_FAILED),
        (asyncio.CancelledError("the password is hunter2"), BUILDER_FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_any_other_error_is_internal_says_nothing_to_the_client_and_all_to_the_log(
    error: BaseException, answer: Answer, serving: Any, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(raising(error)) as running:
        assert await answers(running, do_get(plan)) == [answer] * 3
        await until_nothing_is_held(running.worker)
    assert caplog.text.count("Traceback (most recent call last)") >= 3
    assert caplog.text.count("hunter2") >= 3


@both_registrations
@pytest.mark.parametrize("returned", [None, 5, "session", SessionConfig()], ids=lambda value: type(value).__name__)
async def test_a_builder_that_returns_no_session_is_internal_and_the_log_says_what_it_returned(
    returned: Any, serving: Any, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def build(ctx: WorkerQueryContext) -> Any:
        return returned

    async with serving(build) as running:
        assert await answers(running, do_get(plan)) == [BUILDER_FAILED] * 3
    assert f"the session builder returned {type(returned).__name__}" in caplog.text


@both_registrations
async def test_an_option_that_datafusion_does_not_know_is_named_in_the_log_alone(
    serving: Any, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_config_option("datafusion.no_such_option", 1).build()

    async with serving(build) as running:
        assert await answers(running, do_get(plan)) == [BUILDER_FAILED] * 3
    assert "no_such_option" in caplog.text


async def test_after_a_failure_of_any_kind_the_next_request_is_served(plan: bytes) -> None:
    errors = [UsersOwnError(), NoException(), asyncio.CancelledError(), PermissionDenied()]

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        if errors:
            raise errors.pop()
        return ctx.builder.build()

    async with running_worker(build) as running:
        key = stage_key()
        refused = [await do_get_answer(running, do_get(plan, 0, key)) for _ in range(4)]
        assert OK not in refused
        assert await do_get_answer(running, do_get(plan, 0, key)) == OK


@both_registrations
@pytest.mark.parametrize("text", ["no! " * 25_000, "nö! " * 3_000, "no! \udcff"], ids=["long", "escaped", "surrogate"])
async def test_a_text_that_grpc_does_not_carry_as_it_is_keeps_its_status_and_beginning(
    text: str, serving: Any, plan: bytes
) -> None:
    async with serving(raising(PermissionDenied(text))) as running, stub(running.address) as flight_service:
        call = flight_service.DoGet(Flight_pb2.Ticket(ticket=do_get(plan)), timeout=5)
        code, details = await status(call)
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details.startswith(text[:4])


# Cancelled requests


@both_registrations
async def test_a_request_that_is_cancelled_cancels_its_builder_and_logs_nothing(
    serving: Any, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("nobody sets the event")

    async with serving(build) as running, stub(running.address) as flight_service:
        call = flight_service.DoGet(Flight_pb2.Ticket(ticket=do_get(plan)))
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 5)
        await until_nothing_is_held(running.worker)
        await asyncio.gather(reading, return_exceptions=True)
    assert not errors_logged(caplog)


@both_registrations
async def test_nothing_is_left_of_a_cancelled_request_whose_builder_swallows_the_cancellation(
    serving: Any, plan: bytes
) -> None:
    entered, swallowed = asyncio.Event(), asyncio.Event()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        if not swallowed.is_set():
            entered.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.set()
        return ctx.builder.build()

    async with serving(build) as running, stub(running.address) as flight_service:
        call = flight_service.DoGet(Flight_pb2.Ticket(ticket=do_get(plan)))
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        await asyncio.wait_for(swallowed.wait(), 5)
        await until_nothing_is_held(running.worker)
        await asyncio.gather(reading, return_exceptions=True)
        assert await do_get_answer(running, do_get(plan)) == OK


# What a builder gets to know


async def test_names_of_headers_compare_without_case_and_bin_values_are_bytes(plan: bytes) -> None:
    seen: list[Any] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append([ctx.headers["X-Tenant"], ctx.headers.get("x-TENANT"), ctx.headers["X-Trace-Bin"]])
        return ctx.builder.build()

    async with running_worker(build) as running:
        await fetch_one(running, do_get(plan), [(b"x-tenant", b"acme"), (b"x-trace-bin", b"\x00\xff")])
        headers: list[tuple[str, str | bytes]] = [("X-Tenant", "acme"), ("X-Trace-Bin", b"\x00\xff")]
        async with WorkerClient(running.url, headers=headers) as client:
            await client.schema(plan)
    assert seen == [["acme", "acme", b"\x00\xff"]] * 2


@both_registrations
@pytest.mark.parametrize("lookup", ["index", "get"])
async def test_a_header_that_was_sent_twice_is_invalid_and_its_values_are_not_in_the_answer(
    lookup: str, serving: Any, plan: bytes
) -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        assert ctx.headers.get_all("authorization") == ("Bearer ada-3f9c", "Bearer grace-71d0")
        if lookup == "index":
            raise PermissionDenied(ctx.headers["Authorization"])
        raise PermissionDenied(ctx.headers.get("Authorization"))

    text = "header 'authorization' was sent 2 times, once is right"
    async with serving(build) as running:
        assert await answers(running, do_get(plan), ADA + GRACE) == [(grpc.StatusCode.INVALID_ARGUMENT, text)] * 3


async def test_the_tickets_task_and_stage_key_arrive_in_the_context(plan: bytes) -> None:
    seen: list[Any] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        key = ctx.stage_key
        seen.append((ctx.task_index, ctx.task_count, key and (key.query_id.bytes, key.stage_id, key.task_number)))
        return ctx.builder.build()

    key = plan_pb2.StageKey(query_id=bytes(range(16)), stage_id=7, task_number=8)
    ticket = plan_pb2.DoGet(plan_proto=plan, target_task_index=3, target_task_count=5, stage_key=key)
    async with running_worker(build) as running:
        assert await answers(running, ticket.SerializeToString()) == [OK] * 3
        assert await do_get_answer(running, do_get(plan)) == OK
    assert seen == [(3, 5, (bytes(range(16)), 7, 8))] * 3 + [(0, 0, None)]


async def test_neither_the_repr_of_a_context_nor_the_whole_log_of_a_process_shows_a_token(
    plan: bytes, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import worker\n"
        "async def build_state(ctx):\n"
        "    match ctx.headers['x-do']:\n"
        "        case 'fail': raise RuntimeError(f'no session for {ctx!r}, {ctx.headers!s}, {ctx.builder}')\n"
        "        case 'refuse': raise worker.PermissionDenied(f'not you: {ctx!r}')\n"
        "        case 'panic': raise worker.EnginePanicked(f'panicked in {ctx}')\n"
        "        case 'nothing': return None\n"
        "        case 'twice': ctx.headers['x-twice']\n"
        "    return ctx.builder.build()\n"
    )
    secrets: Metadata = [
        ("authorization", "Bearer s3cr3t"),
        ("x-key-bin", b"s3cr3t"),
        ("cookie", "s3cr3t"),
        ("x-twice", "s3cr3t"),
        ("x-twice", "s3cr3t"),
    ]
    command = ["-m", "worker", "--port", "0", "--log-level", "debug", "--session-builder", "mine:build_state"]
    async with listening(*command, folder=tmp_path) as (process, url):
        running = RunningWorker(Worker(), url.removeprefix("grpc://"))
        said = []
        for do in ("fail", "refuse", "panic", "nothing", "twice", "serve"):
            said += await answers(running, do_get(plan), [*secrets, ("x-do", do)])
        said += [await do_get_answer(running, do_get(b"no plan"), [*secrets, ("x-do", "serve")])]
        said += [await do_get_answer(running, do_get(plan, 9), [*secrets, ("x-do", "serve")])]
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = (await asyncio.wait_for(process.stderr.read(), 10)).decode()

    assert [code for code, _ in said].count(grpc.StatusCode.OK) == 3
    assert "s3cr3t" not in str(said)
    assert "Headers(" in str(said)
    assert "authorization" in str(said)
    assert "RuntimeError: no session for WorkerQueryContext(" in log
    assert "panicked in WorkerQueryContext(" in log
    for secret in ("s3cr3t", "czNjcjN0", "principal='"):
        assert secret not in log


# Who may: every request, and tasks of their own


async def test_a_token_that_is_revoked_is_refused_on_the_second_partition_of_a_task(plan: bytes) -> None:
    valid = {"Bearer ada-3f9c"}

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        if ctx.headers["authorization"] not in valid:
            raise PermissionDenied("this token was revoked")
        return ctx.builder.build()

    async with running_worker(build) as running:
        key = stage_key()
        assert await do_get_answer(running, do_get(plan, 0, key), ADA) == OK
        assert running.worker.statistics().tasks == 1

        valid.clear()

        refused = (grpc.StatusCode.PERMISSION_DENIED, "this token was revoked")
        assert await do_get_answer(running, do_get(plan, 1, key), ADA) == refused
        assert await answers(running, do_get(plan, 1, key), ADA) == [refused] * 3
        assert running.worker.statistics().partitions_executed == 1

        valid.add("Bearer ada-3f9c")
        assert await do_get_answer(running, do_get(plan, 1, key), ADA) == OK
        assert running.worker.statistics().plans_decoded == 1


async def test_the_builder_is_awaited_for_every_request(plan: bytes) -> None:
    calls = 0

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        nonlocal calls
        calls += 1
        return ctx.builder.build()

    async with running_worker(build) as running:
        key = stage_key()
        await fetch(running, [do_get(plan, partition, key) for partition in (0, 1, 0)])
        assert calls == 3
        await answers(running, do_get(plan, 0, key))
        assert calls == 6


async def decoded(builder: SessionBuilderLike | None, plan: bytes, first: Metadata, second: Metadata) -> int:
    """How often a plan is decoded whose partitions are read one after the other, under one stage key."""
    async with running_worker(builder) as running:
        key = stage_key()
        assert await do_get_answer(running, do_get(plan, 0, key), first) == OK
        assert await do_get_answer(running, do_get(plan, 1, key), second) == OK
        return running.worker.statistics().plans_decoded


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (ADA, ADA, 1),
        (ADA, [*ADA, ("x-request-id", "2")], 1),
        ([], [], 1),
        (ADA, GRACE, 2),
        (ADA, [], 2),
        ([], ADA, 2),
        (ADA, ADA + GRACE, 2),
        (ADA + GRACE, GRACE + ADA, 2),
        ([("authorization", "ab"), ("authorization", "c")], [("authorization", "a"), ("authorization", "bc")], 2),
    ],
)
async def test_a_stage_key_stands_for_one_task_of_each_token(
    first: Metadata, second: Metadata, expected: int, plan: bytes
) -> None:
    assert await decoded(None, plan, first, second) == expected


async def test_two_tokens_may_use_one_stage_key_for_different_plans_and_one_may_not(plan: bytes) -> None:
    other = SessionContext().sql("select 'another'").execution_plan().to_bytes()
    async with running_worker() as running:
        key = stage_key()
        assert await do_get_answer(running, do_get(plan, 0, key), ADA) == OK
        assert await do_get_answer(running, do_get(other, 0, key), GRACE) == OK
        code, details = await do_get_answer(running, do_get(other, 0, key), ADA)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "another plan" in details


async def test_the_principal_that_a_builder_sets_is_who_shares_tasks_whatever_the_token(plan: bytes) -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        ctx.principal = ctx.headers["x-user"]
        return ctx.builder.build()

    ada, grace = ("x-user", "ada"), ("x-user", "grace")
    assert await decoded(build, plan, [*ADA, ada], [*GRACE, ada]) == 1
    assert await decoded(build, plan, [*ADA, ada], [*ADA, grace]) == 2


async def test_the_principal_tells_neither_the_token_nor_what_a_digest_of_it_would(plan: bytes) -> None:
    """It differs from worker to worker, so that it is of no use to who would try tokens against it."""
    seen: list[str] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append(ctx.principal)
        return ctx.builder.build()

    for _ in range(2):
        async with running_worker(build) as running:
            assert await do_get_answer(running, do_get(plan), ADA) == OK
            assert await do_get_answer(running, do_get(plan), ADA) == OK
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert not [principal for principal in seen if "ada" in principal or not principal]


# Kinds of builders


async def test_a_synchronous_builder_runs_in_a_thread_and_may_block(plan: bytes) -> None:
    """
    1. A request's builder blocks its thread.
    2. Another request is served meanwhile.
    3. The first one's builder goes on.
    """
    loop_thread, entered, release = threading.get_ident(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    threads: list[int] = []

    def build(ctx: WorkerQueryContext) -> SessionContext:
        threads.append(threading.get_ident())
        if "x-block" in ctx.headers:
            loop.call_soon_threadsafe(entered.set)
            if not release.wait(30):
                raise TimeoutError
        return ctx.builder.build()

    async with running_worker(build) as running:
        blocked = asyncio.ensure_future(do_get_answer(running, do_get(plan), [("x-block", "1")]))
        await asyncio.wait_for(entered.wait(), 5)
        assert await do_get_answer(running, do_get(plan)) == OK
        assert not blocked.done()
        release.set()
        assert await blocked == OK
    assert len(threads) == 2
    assert loop_thread not in threads


@pytest.mark.parametrize("error", [PermissionDenied("not you"), UsersOwnError("hunter2"), NoException("hunter2")])
async def test_what_a_synchronous_builder_raises_is_answered_as_what_an_asynchronous_one_does(
    error: BaseException, plan: bytes
) -> None:
    def build(ctx: WorkerQueryContext) -> SessionContext:
        raise error

    async with running_worker(build) as running, running_worker(raising(error)) as asynchronous:
        answered = await answers(running, do_get(plan))
        assert answered == await answers(asynchronous, do_get(plan))
        assert "hunter2" not in str(answered)


async def test_an_object_with_build_session_state_is_a_builder(plan: bytes) -> None:
    class Guard:
        async def build_session_state(self, ctx: WorkerQueryContext) -> SessionContext:
            if "authorization" not in ctx.headers:
                raise Unauthenticated("who asks?")
            return ctx.builder.build()

    async with running_worker(Guard()) as running:
        assert await answers(running, do_get(plan)) == [(grpc.StatusCode.UNAUTHENTICATED, "who asks?")] * 3
        assert await answers(running, do_get(plan), ADA) == [OK] * 3


async def test_a_mapped_builder_serves_the_sessions_that_the_change_answers_with() -> None:
    async def add_aggregate(session: SessionContext) -> SessionContext:
        session.register_udaf(aggregate(100))
        return session

    def add_scalar(session: SessionContext) -> SessionContext:
        session.register_udf(scalar(100))
        return session

    async with running_worker(DefaultSessionBuilder().map(add_scalar).map(add_aggregate)) as running:
        assert (await fetch_one(running, do_get(udf_plan("scalar")))).to_pydict() == {"y": [101, 102, 103]}
        assert (await fetch_one(running, do_get(udf_plan("aggregate")))).to_pydict() == {"y": [106]}


async def test_a_mapped_builder_may_refuse_too(plan: bytes) -> None:
    def refuse(session: SessionContext) -> SessionContext:
        raise PermissionDenied("not today")

    async with running_worker(DefaultSessionBuilder().map(refuse)) as running:
        assert await answers(running, do_get(plan)) == [(grpc.StatusCode.PERMISSION_DENIED, "not today")] * 3


# Python functions


class Sum(Accumulator):
    def __init__(self, start: int) -> None:
        self.sum = start

    def update(self, *values: pa.Array) -> None:
        self.sum += pc.sum(values[0]).as_py()

    def merge(self, states: list[pa.Array]) -> None:
        self.update(states[0])

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self.sum)]

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self.sum)


class Count(WindowEvaluator):
    def __init__(self, start: int) -> None:
        self.start = start

    def evaluate_all(self, values: list[pa.Array], num_rows: int) -> pa.Array:
        return pa.array(range(self.start, self.start + num_rows), INT)


def scalar(add: int, trap: object = None) -> ScalarUDF:
    return udf(lambda values: (trap, pc.add(values, add))[1], [INT], INT, "volatile", "my_udf")


def aggregate(start: int, trap: object = None) -> AggregateUDF:
    return udaf(lambda: (trap, Sum(start))[1], [INT], INT, [INT], "volatile", "my_udaf")


def window(start: int, trap: object = None) -> WindowUDF:
    return udwf(lambda: (trap, Count(start))[1], [INT], INT, "volatile", "my_udwf")


QUERIES = {
    "scalar": "select my_udf(x) as y from t",
    "aggregate": "select my_udaf(x) as y from t",
    "window": "select my_udwf(x) over (order by x) as y from t",
}
NAMES = {"scalar": "my_udf", "aggregate": "my_udaf", "window": "my_udwf"}
CLIENTS_ROWS = {"scalar": [2, 3, 4], "aggregate": [7], "window": [1, 2, 3]}
WORKERS_ROWS = {"scalar": [101, 102, 103], "aggregate": [106], "window": [100, 101, 102]}

each_category = pytest.mark.parametrize("category", QUERIES)


def session_with_functions(number: int, trap: object = None) -> SessionContext:
    session = SessionContext(SessionConfig().with_target_partitions(1))
    session.register_udf(scalar(number, trap))
    session.register_udaf(aggregate(number, trap))
    session.register_udwf(window(number, trap))
    return session


def udf_plan(category: str, trap: object = None) -> bytes:
    """A plan over 1, 2, 3 that calls one function, which is in the plan, pickled, with the trap in it."""
    session = session_with_functions(1, trap)
    session.register_record_batches("t", [[pa.record_batch({"x": [1, 2, 3]})]])
    plan = session.sql(QUERIES[category]).execution_plan().to_bytes()
    assert b"DFPYUD" in plan
    return plan


async def bare(ctx: WorkerQueryContext) -> SessionContext:
    return SessionContext()


async def bare_with_inlining(ctx: WorkerQueryContext) -> SessionContext:
    return SessionContext().with_python_udf_inlining(enabled=True)


async def bare_with_functions(ctx: WorkerQueryContext) -> SessionContext:
    return session_with_functions(100)


async def built_with_functions(ctx: WorkerQueryContext) -> SessionContext:
    return (
        ctx.builder.with_scalar_functions([scalar(100)])
        .with_aggregate_functions([aggregate(100)])
        .with_window_functions([window(100)])
        .build()
    )


async def inlining(ctx: WorkerQueryContext) -> SessionContext:
    return ctx.builder.with_python_udf_inlining().build()


async def inlining_in_a_bare_session(ctx: WorkerQueryContext) -> SessionContext:
    ctx.builder.with_python_udf_inlining()
    return SessionContext()


@both_registrations
@pytest.mark.parametrize("builder", [None, bare, bare_with_inlining])
@each_category
async def test_a_function_that_the_session_lacks_is_named_and_the_clients_own_is_never_unpickled(
    category: str, builder: SessionBuilderLike | None, serving: Any, tmp_path: Path
) -> None:
    plan = udf_plan(category, Touch(tmp_path / "unpickled"))
    text = f"the session has no {category} function '{NAMES[category]}': register it in the session builder"
    async with serving(builder or DefaultSessionBuilder()) as running:
        assert await answers(running, do_get(plan)) == [(grpc.StatusCode.INVALID_ARGUMENT, text)] * 3
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("builder", [bare_with_functions, built_with_functions])
@each_category
async def test_a_function_of_the_session_is_what_runs_and_the_clients_own_is_never_unpickled(
    category: str, builder: SessionBuilderLike, tmp_path: Path
) -> None:
    plan = udf_plan(category, Touch(tmp_path / "unpickled"))
    async with running_worker(builder) as running:
        table = await fetch_one(running, do_get(plan))
        assert await answers(running, do_get(plan)) == [OK] * 3
    assert table.to_pydict() == {"y": WORKERS_ROWS[category]}
    assert not (tmp_path / "unpickled").exists()


@both_registrations
@pytest.mark.parametrize("builder", [inlining, inlining_in_a_bare_session])
@each_category
async def test_with_inlining_asked_for_the_clients_function_runs_and_the_trap_of_these_tests_springs(
    category: str, builder: SessionBuilderLike, serving: Any, tmp_path: Path
) -> None:
    plan = udf_plan(category, Touch(tmp_path / "unpickled"))
    assert not (tmp_path / "unpickled").exists()
    async with serving(builder) as running:
        table = await fetch_one(running, do_get(plan))
    assert table.to_pydict() == {"y": CLIENTS_ROWS[category]}
    assert (tmp_path / "unpickled").exists()


async def test_inlining_is_asked_for_by_one_request_alone(tmp_path: Path) -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_python_udf_inlining("x-trusted" in ctx.headers).build()

    async with running_worker(build) as running:
        plan = udf_plan("scalar")
        table = await fetch_one(running, do_get(plan), [(b"x-trusted", b"1")])
        assert table.to_pydict() == {"y": CLIENTS_ROWS["scalar"]}
        trap = udf_plan("scalar", Touch(tmp_path / "unpickled"))
        assert (await do_get_answer(running, do_get(trap)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert not (tmp_path / "unpickled").exists()


async def failing_function_answer(caplog: pytest.LogCaptureFixture) -> Answer:
    """What a client is told of a function of the session's that raises; the log has it all."""

    def fail(values: pa.Array) -> pa.Array:
        raise ZeroDivisionError("no such number")

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_scalar_functions([udf(fail, [INT], INT, "volatile", "my_udf")]).build()

    async with running_worker(build) as running:
        answer = await do_get_answer(running, do_get(udf_plan("scalar")))
        await until_nothing_is_held(running.worker)
    assert "raise ZeroDivisionError" in caplog.text
    return answer


async def test_what_a_function_raises_is_internal_and_names_the_error(caplog: pytest.LogCaptureFixture) -> None:
    code, details = await failing_function_answer(caplog)
    assert code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in details


async def test_the_traceback_of_a_function_does_not_reach_the_client(caplog: pytest.LogCaptureFixture) -> None:
    _, details = await failing_function_answer(caplog)
    assert "ZeroDivisionError" in details
    assert "Traceback" not in details
    assert __file__ not in details


@both_registrations
@pytest.mark.parametrize("error", [GeneratorExit(), SystemExit(3), StopAsyncIteration(), StopIteration()], ids=repr)
async def test_no_way_out_of_a_builder_leaves_the_client_without_an_answer(
    error: BaseException, serving: Any, plan: bytes
) -> None:
    async with serving(raising(error)) as running:
        assert await answers(running, do_get(plan)) == [BUILDER_FAILED] * 3


async def test_a_refusal_in_a_task_group_is_a_refusal(plan: bytes) -> None:
    async def refuse() -> None:
        raise PermissionDenied("not you")

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        async with asyncio.TaskGroup() as group:
            group.create_task(refuse())
        return ctx.builder.build()

    async with running_worker(build) as running:
        assert await answers(running, do_get(plan)) == [(grpc.StatusCode.PERMISSION_DENIED, "not you")] * 3
