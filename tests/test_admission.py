"""Which tasks run, which wait, which are refused; and what ends those that take too long or too much."""

import asyncio
import gc
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext, col
from flight_plans import coalesced, stage, ticket, url
from support import do_get, fetch_one, listening, stage_key, status, status_of, stub, until
from worker_service import (
    all_values,
    coordinated,
    execute_request,
    plan_of,
    reads,
    refusal,
    refused_read,
    service,
    task_key,
    values,
)

from worker import (
    MemoryExceeded,
    PermissionDenied,
    Settings,
    StageKey,
    Worker,
    WorkerBusy,
    WorkerError,
    WorkerQueryContext,
    plan_proto,
    plan_ticket,
)
from worker.client import WorkerClient
from worker.config import MEBIBYTE
from worker.execution.admission import OLDEST_FACTOR, QUERY_TASKS, Admission, Claim, Demand
from worker.execution.tasks import IDLE_TASKS
from worker.execution.watchdog import SECONDS, SETTLE_SECONDS, Watchdog, resident_bytes
from worker.proto import worker_pb2
from worker.proto.Flight_pb2 import FlightDescriptor, Ticket
from worker.proto.Flight_pb2_grpc import FlightServiceStub, add_FlightServiceServicer_to_server
from worker.testing import RunningWorker, running_worker

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
X = pa.schema([("x", pa.int64())])

# A place that takes all memory, so that the next task waits.
ONE_TASK = Settings(max_tasks=1, max_wait=30)


def _admission(memory: int = 100, **limits: Any) -> Admission:
    return Admission(memory, **{"max_tasks": 10, "max_waiting": 10, "max_wait": 30} | limits)


def _demand(memory: int = 100, principal: str = "ada", query: object = None, **more: Any) -> Demand:
    return Demand(principal, query or object(), memory, **more)


async def _wait(admission: Admission, *demands: Demand) -> "list[asyncio.Future[Claim]]":
    """Tasks that wait, one after the other."""
    waiting: list[asyncio.Future[Claim]] = []
    for demand in demands:
        waiting.append(asyncio.ensure_future(admission.admit(demand)))
        await until(lambda: admission.waiting == len(waiting))
    return waiting


async def _cancel(waiting: "Sequence[asyncio.Future[Claim]]") -> None:
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)


def _admitted(waiting: "Sequence[asyncio.Future[Claim]]") -> list[int]:
    return [number for number, each in enumerate(waiting) if each.done()]


async def test_tasks_run_while_there_is_memory_and_wait_until_there_is() -> None:
    admission = _admission(memory=100)
    first, second = (admission.try_admit(_demand(50)) for _ in range(2))
    assert first
    assert second
    assert admission.claimed == 100
    assert admission.try_admit(_demand(1)) is None
    (waiting,) = await _wait(admission, _demand(1))
    first.release()
    first.release()
    claim = await waiting
    assert admission.claimed == 51
    for each in (claim, second):
        each.release()
    assert (admission.claimed, admission.waiting, list(admission.claims)) == (0, 0, [])


async def test_tasks_run_up_to_their_number_however_little_memory_they_need() -> None:
    admission = _admission(max_tasks=2)
    claims = [admission.try_admit(_demand(0)) for _ in range(2)]
    assert all(claims)
    assert admission.try_admit(_demand(0)) is None


async def test_a_pool_that_is_larger_than_all_memory_runs_alone() -> None:
    admission = _admission(memory=100)
    alone = admission.try_admit(_demand(1000))
    assert alone
    assert admission.claimed == 100
    assert admission.try_admit(_demand(1)) is None
    alone.release()
    assert admission.try_admit(_demand(1))
    assert admission.try_admit(_demand(1000)) is None


async def test_callers_take_turns_and_each_is_served_in_its_order() -> None:
    admission = _admission()
    running = admission.try_admit(_demand())
    callers = ["ada", "ada", "ada", "bob", "bob", "cy"]
    waiting = await _wait(admission, *(_demand(principal=caller) for caller in callers))
    order: list[int] = []
    while running:
        running.release()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        new = [number for number in _admitted(waiting) if number not in order]
        assert len(new) == (1 if len(order) < len(callers) else 0)
        order += new
        running = waiting[new[0]].result() if new else None
    assert order == [0, 3, 5, 1, 4, 2]


async def test_a_task_that_needs_little_does_not_overtake_one_that_waits_for_much() -> None:
    admission = _admission()
    running = [admission.try_admit(_demand(50)) for _ in range(2)]
    waiting = await _wait(admission, _demand(100), _demand(50, "bob"))
    assert running[0]
    running[0].release()
    assert admission.try_admit(_demand(50)) is None
    assert admission.waiting == 2
    assert running[1]
    running[1].release()
    assert await waiting[0]
    await _cancel(waiting[1:])


async def test_a_task_that_needs_no_memory_does_not_wait_for_those_that_do() -> None:
    admission = _admission()
    running = admission.try_admit(_demand())
    waiting = await _wait(admission, _demand())
    assert admission.try_admit(_demand(0))
    assert running
    await _cancel(waiting)


async def test_who_waits_too_long_is_refused() -> None:
    admission = _admission(max_wait=0.05)
    running = admission.try_admit(_demand())
    with pytest.raises(WorkerBusy, match=r"1 tasks, .* hold 100 bytes, .* after 0.05 s, which is max_wait: try"):
        await admission.admit(_demand())
    assert running
    assert admission.waiting == 0


async def test_more_than_may_wait_are_refused_at_once() -> None:
    admission = _admission(max_waiting=1)
    running = admission.try_admit(_demand())
    waiting = await _wait(admission, _demand())
    with pytest.raises(WorkerBusy, match="1 wait, which is max_waiting: try again"):
        await admission.admit(_demand())
    assert running
    await _cancel(waiting)


async def test_plans_that_wait_take_no_more_than_a_part_of_the_memory() -> None:
    admission = _admission(memory=80)
    running = admission.try_admit(_demand())
    waiting = await _wait(admission, _demand(plan_size=6))
    with pytest.raises(WorkerBusy, match="hold 6 bytes of plans, of at most 10: try again"):
        await admission.admit(_demand(plan_size=5))
    assert running
    await _cancel(waiting)
    waiting = await _wait(admission, _demand(plan_size=5))
    await _cancel(waiting)


async def test_who_is_cancelled_leaves_at_once_and_keeps_nobody_waiting() -> None:
    admission = _admission()
    running = [admission.try_admit(_demand(50)) for _ in range(2)]
    waiting = await _wait(admission, _demand(100), _demand(50, "bob"))
    assert running[0]
    running[0].release()
    await _cancel(waiting[:1])
    assert await waiting[1]
    assert (admission.claimed, admission.waiting) == (100, 0)


async def test_who_is_cancelled_just_as_its_turn_has_come_gives_its_place_back() -> None:
    admission = _admission()
    running = admission.try_admit(_demand())
    waiting = await _wait(admission, _demand(), _demand())
    assert running
    running.release()
    waiting[0].cancel()
    claim = await waiting[1]
    assert waiting[0].cancelled()
    assert list(admission.claims) == [claim]


async def test_tasks_of_a_query_that_runs_never_wait_and_it_holds_its_largest_pool() -> None:
    admission = _admission(max_tasks=1)
    first = admission.try_admit(_demand(40, query="q"))
    second = admission.try_admit(_demand(60, query="q"))
    third = admission.try_admit(_demand(50, query="q"))
    assert admission.claimed == 60
    assert first
    assert second
    assert third
    second.release()
    first.release()
    assert admission.try_admit(_demand(1)) is None
    third.release()
    assert admission.claimed == 0


async def test_all_tasks_of_a_query_that_wait_are_admitted_with_the_first() -> None:
    admission = _admission()
    running = admission.try_admit(_demand())
    waiting = await _wait(admission, _demand(query="q"), _demand(principal="bob"), _demand(principal="cy", query="q"))
    assert running
    running.release()
    assert await waiting[0]
    assert await waiting[2]
    assert not waiting[1].done()
    await _cancel(waiting[1:2])


async def test_a_query_has_no_more_tasks_than_any_can_be_in_need_of() -> None:
    admission = _admission()
    assert all(admission.try_admit(_demand(query="q")) for _ in range(QUERY_TASKS))
    assert admission.try_admit(_demand(query="q")) is None


async def test_two_workers_that_are_full_of_queries_which_wait_for_the_other_go_on() -> None:
    """
    1. One worker runs a task of the older query, the other of the younger: both are full.
    2. Each query needs a task on the other worker too. The older one's is admitted, the younger one's waits.
    3. The older query ends, and the younger one's task is admitted.
    """
    one, other = _admission(max_tasks=1), _admission(max_tasks=1)
    older, younger = partial(_demand, query="old", age=(1, 2)), partial(_demand, query="young", age=(1, 3))
    older_here = one.try_admit(older())
    assert older_here
    assert other.try_admit(younger())
    older_there = other.try_admit(older())
    assert older_there
    (waiting,) = await _wait(one, younger())
    older_there.release()
    assert not waiting.done()
    older_here.release()
    assert await waiting


async def test_the_oldest_that_waits_is_admitted_when_all_that_are_older_have_gone() -> None:
    admission = _admission()
    first = admission.try_admit(_demand(50, age=(1, 0)))
    last = admission.try_admit(_demand(50, age=(9, 0)))
    assert first
    assert last
    waiting = await _wait(admission, _demand(age=(8, 0)), _demand(principal="bob", age=(7, 0)))
    first.release()
    assert await waiting[1]
    assert not waiting[0].done()
    await _cancel(waiting[:1])


async def test_the_oldest_waits_as_well_when_the_limits_are_passed_by_far() -> None:
    admission = _admission(memory=100)
    ages = range(9, 0, -1)
    claims = [claim for age in ages if (claim := admission.try_admit(_demand(age=(age, 0))))]
    assert len(claims) == OLDEST_FACTOR
    admission = _admission(max_tasks=1)
    claims = [claim for age in ages if (claim := admission.try_admit(_demand(0, age=(age, 0))))]
    assert len(claims) == OLDEST_FACTOR


def _pooled(rows: int, partitions: int = 1) -> bytes:
    """A plan of rows of 8 bytes, which come as they are read and need a memory pool nevertheless."""
    session = SessionContext(SessionConfig().with_target_partitions(partitions))
    numbered = session.sql(f"select value, row_number() over () as n from range(0, {rows})").filter(col("n") > 0)
    frame = numbered.select(col("value").alias("x"))
    if partitions > 1:
        frame = frame.repartition_by_hash(col("x"), num=partitions)
    return frame.execution_plan().to_bytes()


def _streaming(rows: int) -> bytes:
    """A plan that needs none."""
    return SessionContext().sql(f"select value as x from range(0, {rows})").execution_plan().to_bytes()


ENDLESS = 1 << 40


@asynccontextmanager
async def _running(worker: RunningWorker, plan: bytes | None = None, **options: Any) -> AsyncIterator[Any]:
    """A call whose task runs, and is not read, for as long as the block lasts."""
    async with stub(worker.address) as client:
        call = client.DoGet(Ticket(ticket=do_get(plan or _pooled(ENDLESS))), **options)
        await call.read()
        yield call
        call.cancel()


async def _end_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status of a call, which comes behind all messages."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), await call.details()


async def _principal_by_name(ctx: WorkerQueryContext) -> SessionContext:
    ctx.principal = ctx.headers.get("x-name") or ""
    return ctx.builder.build()


async def test_a_ticket_waits_for_its_place_and_is_answered() -> None:
    async with running_worker(settings=ONE_TASK) as worker, stub(worker.address) as client:
        async with _running(worker):
            statistics = worker.worker.statistics
            assert statistics().memory_claimed == ONE_TASK.pool_size
            decoded = statistics().plans_decoded
            waiting = asyncio.ensure_future(fetch_one(worker, do_get(_pooled(3))))
            await until(lambda: statistics().waiting == 1)
            described = client.GetSchema(FlightDescriptor(type=FlightDescriptor.CMD, cmd=do_get(_pooled(3))))
            await until(lambda: statistics().waiting == 2)
            assert statistics().plans_decoded == decoded
        assert values(await waiting) == [0, 1, 2]
        await described
        await until(lambda: statistics().requests == 0)
        assert (statistics().waiting, statistics().memory_claimed, statistics().tasks) == (0, 0, 0)


async def test_who_finds_no_place_is_told_to_try_again() -> None:
    settings = Settings(max_tasks=1, max_waiting=0)
    async with running_worker(settings=settings) as worker:
        async with _running(worker):
            code, text = await status_of(worker, do_get(_pooled(3)))
        assert (code, text[-15:]) == (EXHAUSTED, "try again later")
        await until(lambda: worker.worker.statistics().requests == 0)
        assert values(await fetch_one(worker, do_get(_pooled(3)))) == [0, 1, 2]


@pytest.mark.parametrize("max_waiting", [0, 9])
async def test_nothing_is_kept_of_who_found_no_place(max_waiting: int) -> None:
    sessions: list[weakref.ref[SessionContext]] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        session = ctx.builder.build()
        sessions.append(weakref.ref(session))
        return session

    settings = Settings(max_tasks=1, max_waiting=max_waiting, max_wait=0.05)
    async with running_worker(build, settings=settings) as worker, _running(worker):
        gc.collect()
        gc.disable()
        try:
            for key in (None, stage_key()):
                code, _ = await status_of(worker, do_get(_pooled(3), key=key))
                assert code is EXHAUSTED
            await until(lambda: [session() is None for session in sessions] == [False, True, True])
        finally:
            gc.enable()


async def test_callers_are_refused_by_their_builder_before_they_wait() -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        if ctx.headers.get("x-name") is None:
            raise PermissionDenied("no name")
        return ctx.builder.build()

    async with running_worker(build, settings=ONE_TASK) as worker, _running(worker, metadata=[("x-name", "ada")]):
        assert await status_of(worker, do_get(_pooled(3))) == (grpc.StatusCode.PERMISSION_DENIED, "no name")


async def test_one_who_waits_leaves_when_it_is_cancelled_or_its_deadline_has_passed() -> None:
    async with running_worker(settings=ONE_TASK) as worker, stub(worker.address) as client, _running(worker):
        statistics = worker.worker.statistics
        decoded = statistics().plans_decoded
        cancelled = client.DoGet(Ticket(ticket=do_get(_pooled(3))))
        await until(lambda: statistics().waiting == 1)
        cancelled.cancel()
        await until(lambda: (statistics().waiting, statistics().tasks, statistics().requests) == (0, 1, 1))
        code, _ = await status(client.DoGet(Ticket(ticket=do_get(_pooled(3))), timeout=0.2))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: (statistics().waiting, statistics().tasks, statistics().requests) == (0, 1, 1))
        assert statistics().plans_decoded == decoded


async def test_those_who_share_a_task_wait_together_and_one_who_goes_keeps_nobody() -> None:
    """
    1. Three callers ask for partitions of a task, which has no place: it waits once.
    2. The first goes away, and the place is free.
    3. The others have all rows, of a plan that was decoded once, and the task has ended.
    """
    key, rows = stage_key(), 100_000
    async with running_worker(settings=ONE_TASK) as worker, stub(worker.address) as client:
        statistics = worker.worker.statistics
        async with _running(worker):
            decoded = statistics().plans_decoded
            first = client.DoGet(Ticket(ticket=do_get(_pooled(rows, 3), 0, key)))
            await until(lambda: statistics().waiting == 1)
            others = [
                asyncio.ensure_future(fetch_one(worker, do_get(_pooled(rows, 3), partition, key)))
                for partition in (1, 2)
            ]
            await until(lambda: statistics().requests == 4)
            first.cancel()
            await until(lambda: statistics().requests == 3)
            assert statistics().waiting == 1
        tables = await asyncio.gather(*others)
        assert 0 < sum(table.num_rows for table in tables) < rows
        assert statistics().plans_decoded == decoded + 1
        await until(lambda: (statistics().tasks, statistics().memory_claimed) == (0, 0))


async def test_a_task_that_idles_holds_no_memory_and_waits_for_it_again() -> None:
    key = stage_key()
    async with running_worker(settings=ONE_TASK) as worker:
        statistics = worker.worker.statistics
        first = await fetch_one(worker, do_get(_pooled(1000, 2), 0, key))
        await until(lambda: statistics().requests == 0)
        assert (statistics().tasks, statistics().memory_claimed) == (1, 0)
        async with _running(worker):
            waiting = asyncio.ensure_future(fetch_one(worker, do_get(_pooled(1000, 2), 1, key)))
            await until(lambda: statistics().waiting == 1)
        assert all_values([first, await waiting]) == [*range(1000)]
        await until(lambda: statistics().tasks == 0)


async def test_no_more_tasks_idle_than_may() -> None:
    plan = _streaming(1)
    async with running_worker() as worker, stub(worker.address) as client:

        async def describe() -> None:
            ticket = plan_ticket(plan, 0, StageKey.unique())
            await client.GetSchema(FlightDescriptor(type=FlightDescriptor.CMD, cmd=ticket))

        await describe()
        for _ in range(10):
            await asyncio.gather(*(describe() for _ in range(IDLE_TASKS // 10)))
        await until(lambda: worker.worker.statistics().requests == 0)
        assert worker.worker.statistics().tasks == IDLE_TASKS


async def test_no_more_plans_are_kept_for_tasks_that_idle_than_a_part_of_the_memory() -> None:
    plan = plan_of(range(1000), query="select x from t")
    async with running_worker(settings=Settings(memory=8 * 3 * len(plan))) as worker, stub(worker.address) as client:
        for _ in range(5):
            ticket = plan_ticket(plan, 0, StageKey.unique())
            await client.GetSchema(FlightDescriptor(type=FlightDescriptor.CMD, cmd=ticket))
        await until(lambda: worker.worker.statistics().requests == 0)
        assert worker.worker.statistics().tasks == 3


async def test_plans_that_need_no_memory_run_beside_one_that_has_it_all() -> None:
    settings = Settings(memory=8 << 30, memory_limit=8 << 30)
    async with running_worker(settings=settings) as worker, _running(worker), AsyncExitStack() as running:
        for _ in range(10):
            await running.enter_async_context(_running(worker, _streaming(ENDLESS)))
        statistics = worker.worker.statistics()
        assert (statistics.streams, statistics.memory_claimed) == (11, 8 << 30)


async def test_a_stream_beyond_their_number_is_refused() -> None:
    settings = Settings(max_streams=1)
    async with running_worker(settings=settings) as worker:
        async with _running(worker):
            code, text = await status_of(worker, do_get(_streaming(1)))
            assert (code, "max_streams (1): try again" in text) == (EXHAUSTED, True)
            async with coordinated(worker, plan_of([1], [2])) as task:
                code, text = await refused_read(worker, task.key, range(2))
            assert (code, "and 2 more" in text) == (EXHAUSTED, True)
        await until(lambda: worker.worker.statistics().streams == 0)
        assert (await fetch_one(worker, do_get(_streaming(1)))).num_rows == 1


async def test_callers_take_turns_at_a_worker() -> None:
    """One caller has four tasks that wait, another comes later with one: it is the second to be served."""
    served: list[str] = []

    async def one(name: str) -> None:
        await fetch_one(worker, do_get(_pooled(3)), [(b"x-name", name.encode())])
        served.append(name)

    def waits(number: int) -> bool:
        return worker.worker.statistics().waiting == number

    async with running_worker(_principal_by_name, settings=ONE_TASK) as worker:
        async with _running(worker):
            waiting = []
            for number, name in enumerate(["ada", "ada", "ada", "ada", "bob"], 1):
                waiting.append(asyncio.ensure_future(one(name)))
                await until(partial(waits, number))
        await asyncio.gather(*waiting)
    assert served.index("bob") < 3


async def test_a_session_without_a_limit_runs_alone() -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_memory_limit(None).build()

    settings = Settings(memory=100 * MEBIBYTE)
    async with running_worker(build, settings=settings) as worker, _running(worker):
        assert worker.worker.statistics().memory_claimed == 100 * MEBIBYTE


async def test_stages_in_tickets_that_read_each_other_on_one_worker_do_not_wait_for_each_other() -> None:
    query = uuid.uuid4()
    async with running_worker(settings=ONE_TASK) as worker:
        below = plan_proto.parse(_pooled(10, 2))
        read = stage(1, below, [url(worker), url(worker)], query)
        key = StageKey(query).to_proto()
        table = await fetch_one(worker, ticket(coalesced(X, 4, read), count=1, key=key))
        assert values(table) == sorted([*range(10)] * 2)
        await until(lambda: worker.worker.statistics().memory_claimed == 0)


async def test_stages_of_a_coordinator_on_one_worker_do_not_wait_for_each_other() -> None:
    query = uuid.uuid4().bytes
    one = plan_proto.Partitioning(unknown=1)
    async with running_worker(settings=ONE_TASK) as worker:
        read = reads("coalesce", X, one, [url(worker)], query, stage=1)
        async with (
            coordinated(worker, read, key=task_key(0, query, stage=2)) as above,
            coordinated(worker, _pooled(3), key=task_key(0, query, stage=1)),
        ):
            assert worker.worker.statistics().tasks == 2
            assert values((await above.read(range(1)))[0]) == [0, 1, 2]
        await until(lambda: worker.worker.statistics().memory_claimed == 0)


async def test_a_task_of_a_coordinator_waits_for_older_ones_and_so_does_who_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.cluster.tasks.PLAN_SECONDS", 0.1)
    key = task_key()
    plan = worker_pb2.SetPlanRequest(task_key=key, task_count=1, plan_proto=_pooled(3), query_start_time_ns=2)
    async with running_worker(settings=ONE_TASK) as worker, service(worker) as client:
        async with coordinated(worker, _pooled(3), query_start_time_ns=1):
            call = client.CoordinatorChannel()
            await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=plan))
            await until(lambda: worker.worker.statistics().waiting == 1)
            reading = client.ExecuteTask(execute_request(key, range(1)))
            code, _ = await status(client.ExecuteTask(execute_request(key, range(1)), timeout=0.5))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await status(reading) == (grpc.StatusCode.OK, "")
        await call.done_writing()
        assert await status(call) == (grpc.StatusCode.OK, "")


async def test_a_task_of_a_coordinator_that_finds_no_place_is_refused_and_so_is_who_reads_it() -> None:
    key = task_key()
    settings = Settings(max_tasks=1, max_waiting=0)
    async with running_worker(settings=settings) as worker, coordinated(worker, _pooled(3), query_start_time_ns=1):
        code, text = await refusal(worker, _pooled(3), key=key, query_start_time_ns=2)
        assert (code, text[-15:]) == (EXHAUSTED, "try again later")
        assert await refused_read(worker, key) == (code, text)
        assert worker.worker.statistics().tasks == 1


async def test_a_request_that_takes_longer_than_any_may_is_ended_also_when_its_client_does_not_read() -> None:
    async with running_worker(settings=Settings(max_duration=0.3)) as worker, _running(worker) as call:
        await until(lambda: worker.worker.statistics().requests == 0)
        statistics = worker.worker.statistics()
        assert (statistics.streams, statistics.tasks, statistics.memory_claimed) == (0, 0, 0)
        assert await _end_of(call) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the request took longer than 0.3 s, which is this worker's max_duration",
        )


async def test_a_request_whose_builder_never_returns_is_ended() -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        await asyncio.Event().wait()
        raise AssertionError

    async with running_worker(build, settings=Settings(max_duration=0.1)) as worker:
        code, text = await status_of(worker, do_get(_streaming(1)))
        assert (code, "max_duration" in text) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)


async def test_a_query_that_takes_longer_than_any_may_is_ended() -> None:
    settings = Settings(max_duration=0.5)
    async with running_worker(settings=settings) as worker, service(worker) as client:
        async with coordinated(worker, _pooled(ENDLESS)) as task:
            reading = client.ExecuteTask(execute_request(task.key, range(1)))
            assert await reading.read()
            await until(lambda: worker.worker.statistics().requests == 0)
            for call in (task.call, reading):
                code, text = await _end_of(call)
                assert (code, "max_duration" in text) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        await until(lambda: worker.worker.statistics().requests == 0)
        assert worker.worker.statistics().memory_claimed == 0


async def test_a_request_to_a_worker_that_the_generated_function_has_registered_is_ended_as_well() -> None:
    async with Worker(settings=Settings(max_duration=0.3)) as worker:
        server = grpc.aio.server()
        add_FlightServiceServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with stub(f"127.0.0.1:{port}") as client:
            call = client.DoGet(Ticket(ticket=do_get(_pooled(ENDLESS))))
            assert await call.read()
            await until(lambda: worker.statistics().requests == 0)
            code, text = await _end_of(call)
            assert (code, "max_duration" in text) == (grpc.StatusCode.DEADLINE_EXCEEDED, True), text
        await server.stop(None)


async def test_a_task_that_spills_more_than_it_may_is_refused(tmp_path: Path) -> None:
    settings = Settings(memory_limit=12 * MEBIBYTE, max_spill=MEBIBYTE, spill_folder=tmp_path)
    sort = SessionContext(SessionConfig().with_target_partitions(1)).sql(
        "select value * 7 % 1000003 as x from range(0, 2000000) order by x"
    )
    async with running_worker(settings=settings) as worker:
        code, text = await status_of(worker, do_get(sort.execution_plan().to_bytes()))
        assert (code, "disk" in text) == (EXHAUSTED, True), text


@pytest.mark.parametrize("dialect", ["tickets", "coordinator"])
async def test_a_worker_that_sends_without_end_does_not_fill_the_disk(tmp_path: Path, dialect: str) -> None:
    settings = Settings(max_spill=8 * MEBIBYTE, spill_folder=tmp_path)
    query = uuid.uuid4()
    async with running_worker() as endless, running_worker(settings=settings) as worker:
        if dialect == "tickets":
            read = stage(1, plan_proto.parse(_pooled(ENDLESS)), [url(endless)], query)
            code, text = await status_of(worker, ticket(coalesced(X, 1, read), count=1))
        else:
            below, above = task_key(0, query.bytes, 1), task_key(0, query.bytes, 2)
            node = reads("coalesce", X, plan_proto.Partitioning(unknown=1), [url(endless)], query.bytes, stage=1)
            async with coordinated(endless, _pooled(ENDLESS), key=below), coordinated(worker, node, key=above):
                code, text = await refused_read(worker, above)
        assert (code, "of which max_spill allows 8388608" in text) == (EXHAUSTED, True), text
        await until(lambda: worker.worker.statistics().requests == 0)
        await until(lambda: not list(tmp_path.rglob("*.arrow")))
        assert worker.worker._folder._used == 0


def _fail() -> None:
    pytest.fail("it has given up")


async def test_the_watchdog_ends_the_task_with_which_memory_grew_and_of_several_the_largest() -> None:
    """
    1. Memory grows beyond the limit while two tasks run: the one with the larger pool is ended.
    2. A task comes, whose pool is the largest of all, and memory stays where it is: the other one is ended.
    3. Memory still stays where it is. That is held against nobody.
    """
    admission, watchdog = _admission(), Watchdog(1, _fail)
    ended: asyncio.Queue[str] = asyncio.Queue()

    def run(name: str, memory: int) -> None:
        claim = admission.try_admit(_demand(memory))
        assert claim

        def end(error: WorkerError) -> None:
            assert isinstance(error, MemoryExceeded)
            assert "the worker ran short of memory" in str(error)
            claim.release()
            ended.put_nowait(name)

        claim.end = end

    run("large", 20)
    run("small", 10)
    watching = asyncio.ensure_future(watchdog.watch(admission.claims))
    await asyncio.sleep(0)
    watchdog.limit = resident_bytes()
    held = []
    # Not once: other tests may have left memory that is given back meanwhile.
    while ended.empty():
        held.append(b"x" * 32 * MEBIBYTE)
        await asyncio.sleep(SECONDS)
    assert ended.get_nowait() == "large"
    run("late", 30)
    assert await asyncio.wait_for(ended.get(), 20) == "small"
    await asyncio.wait((watching,), timeout=SETTLE_SECONDS + 5 * SECONDS)
    assert ended.empty()
    assert held
    next(iter(admission.claims)).release()
    await asyncio.wait_for(watching, 10)


async def test_the_watchdog_gives_up_when_memory_grows_although_a_task_was_ended_and_ends_nobody_who_comes_then() -> (
    None
):
    given_up, ended = asyncio.Event(), asyncio.Event()
    admission, watchdog = _admission(), Watchdog(1, given_up.set)
    first = admission.try_admit(_demand())
    assert first

    def end(_: WorkerError) -> None:
        first.release()
        ended.set()

    first.end = end
    watching = asyncio.ensure_future(watchdog.watch(admission.claims))
    await asyncio.sleep(0)
    watchdog.limit = resident_bytes()
    watchdog.most = watchdog.limit + 512 * MEBIBYTE
    held = []
    while not given_up.is_set():
        held.append(b"x" * 32 * MEBIBYTE)
        other = admission.try_admit(_demand()) if ended.is_set() else None
        if other:
            other.end = lambda error: pytest.fail(str(error))
        await asyncio.wait((watching,), timeout=SECONDS)
        assert not watching.done()
        if other:
            other.release()
    assert len(held) > 8
    watching.cancel()
    await asyncio.wait((watching,))


async def test_memory_that_is_kept_from_before_is_no_reason_to_end_a_task() -> None:
    admission, watchdog = _admission(), Watchdog(1, _fail)
    watchdog.limit = resident_bytes() - MEBIBYTE
    claim = admission.try_admit(_demand())
    assert claim
    claim.end = lambda error: pytest.fail(str(error))
    watching = asyncio.ensure_future(watchdog.watch(admission.claims))
    await asyncio.wait([watching], timeout=3 * SECONDS)
    assert not watching.done()
    claim.release()
    await watching


async def test_what_allocators_keep_is_given_back_when_there_has_been_no_task_for_a_while() -> None:
    admission = _admission()
    claim = admission.try_admit(_demand())
    assert claim
    watching = asyncio.ensure_future(Watchdog(1, _fail).watch(admission.claims))
    blocks = [b"x" * 100_000 for _ in range(2000)]
    # Those that are left lie between what is free: the C library does not give that back by itself.
    blocks = blocks[::20]
    before = resident_bytes()
    claim.release()
    await asyncio.wait_for(watching, 20)
    assert before - resident_bytes() > 100 * MEBIBYTE


async def _rows(client: WorkerClient, plan: bytes) -> int | None:
    """How many rows a plan has; None if the worker says that it has no place or memory."""
    try:
        table: pa.Table = pa.Table.from_batches([batch async for batch in client.execute(plan, 0)])
    except grpc.aio.AioRpcError as error:
        if error.code() is not EXHAUSTED:
            raise
        return None
    return len(table)


async def test_a_worker_ends_a_task_before_the_kernel_ends_the_worker() -> None:
    """
    1. A function takes 400 MB that no pool counts, for a client that does not read.
    2. The worker says that it ends the task, and so it is told to the client.
    3. The worker goes on: it answers others, and ends the next such task as well, which takes more than is kept.
    """
    session = SessionContext(SessionConfig().with_target_partitions(1))
    hog = "select repeat('x', 16777216 + value) as x from range(0, $rows)"
    options = ("--port", "0", "--memory", "64MiB", "--max-message-size", "32MiB")
    async with listening("-m", "worker", *options) as (process, location), WorkerClient(location) as client:
        address = location.removeprefix("grpc://")
        channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        async with channel:
            for rows in (25, 50):
                plan = session.sql(hog.replace("$rows", str(rows))).execution_plan().to_bytes()
                call = FlightServiceStub(channel).DoGet(Ticket(ticket=do_get(plan)))
                assert process.stderr is not None
                while b"memory is short" not in await process.stderr.readline():
                    pass
                code, text = await _end_of(call)
                assert (code, "the worker ran short of memory" in text) == (EXHAUSTED, True)
                # It takes a while until the memory is back.
                async with asyncio.timeout(20):
                    while await _rows(client, _pooled(3)) is None:
                        await asyncio.sleep(0.1)
