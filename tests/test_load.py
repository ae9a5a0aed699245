"""Many requests at once, requests that are cancelled, readers that stop reading."""

import asyncio
import gc
import os
import random
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext, col, udf
from support import until

from worker import (
    PlanTicket,
    SessionStateBuilder,
    Settings,
    StageKey,
    Statistics,
    Unavailable,
    WorkerQueryContext,
    plan_ticket,
)
from worker.client import WorkerClient
from worker.config import PlanLimits
from worker.execution.admission import Admission, Demand
from worker.execution.executor import Executor
from worker.execution.tasks import Tasks, Wanted
from worker.proto.Flight_pb2 import Ticket
from worker.proto.Flight_pb2_grpc import FlightServiceStub
from worker.testing import RunningWorker, running_worker

MEGABYTE = 1_000_000

ADMISSION = Admission(1 << 30, max_tasks=9, max_waiting=9, max_wait=9)


def rows_plan(rows: int, partitions: int, where: str = "true") -> bytes:
    """A plan of `rows` rows of 8 columns of 8 bytes in `partitions` partitions, out of a RepartitionExec."""
    session = SessionContext(SessionConfig().with_target_partitions(partitions))
    columns = ", ".join(f"value * {factor}.5 as c{factor}" for factor in range(1, 8))
    frame = session.sql(f"select value, {columns} from range(0, {rows}) where {where}")
    return frame.repartition_by_hash(col("value"), num=partitions).execution_plan().to_bytes()


def held(statistics: Statistics) -> tuple[int, int, int]:
    return statistics.requests, statistics.streams, statistics.tasks


@pytest.mark.parametrize("first_cancels", [False, True])
async def test_a_plan_whose_partitions_are_asked_for_all_at_once_is_decoded_once(first_cancels: bool) -> None:
    """
    1. The first caller asks, for a plan that takes its time to decode.
    2. While it is decoded, the other 199 ask too, and the first caller cancels, or does not.
    3. All but who cancelled have an answer, the plan was decoded once, and the task is gone.
    """
    slow_to_decode = f"value not in ({', '.join(str(number) for number in range(1_000_000, 1_020_000))})"
    plan, key, partitions = rows_plan(100_000, 200, slow_to_decode), StageKey.unique(), 200

    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = FlightServiceStub(channel)
        calls = [stub.DoGet(Ticket(ticket=plan_ticket(plan, 0, key)))]
        await until(lambda: running.worker.statistics().plans_decoded > 0, 5)
        calls += [stub.DoGet(Ticket(ticket=plan_ticket(plan, number, key))) for number in range(1, partitions)]
        if first_cancels:
            calls[0].cancel()

        answers = await asyncio.gather(*map(_drain, calls), return_exceptions=True)

        assert isinstance(answers[0], asyncio.CancelledError) == first_cancels
        assert answers[1:] == [None] * (partitions - 1)
        assert running.worker.statistics().plans_decoded == 1
        await until(lambda: held(running.worker.statistics()) == (0, 0, 0), 5)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_is_left_of_a_thousand_requests_cancelled_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(20)
    plans = [rows_plan(3_000_000, 4), rows_plan(1_000, 8)]
    process = psutil.Process()

    async def cancel_some(running: RunningWorker, count: int) -> None:
        gate = asyncio.Semaphore(16)
        keys = [StageKey.unique() for _ in range(count // 10)]

        async def one(channel: grpc.aio.Channel) -> None:
            async with gate:
                ticket = plan_ticket(chance.choice(plans), chance.randrange(4), chance.choice([None, *keys[:4]]))
                call = FlightServiceStub(channel).DoGet(Ticket(ticket=ticket))
                reading = asyncio.ensure_future(_drain(call))
                await asyncio.sleep(chance.choice([0, 0.001, 0.003, 0.01, 0.03, 0.1]) * chance.random())
                call.cancel()
                await asyncio.gather(reading, return_exceptions=True)

        async with grpc.aio.insecure_channel(running.address) as channel:
            await asyncio.gather(*(one(channel) for _ in range(count)))

    async with running_worker(settings=Settings(idle_time=1, spill_folder=tmp_path)) as running:
        descriptors = process.num_fds()
        await cancel_some(running, 200)
        await until(lambda: held(running.worker.statistics()) == (0, 0, 0), 5)
        gc.collect()
        memory, threads = process.memory_info().rss, process.num_threads()
        await until(lambda: process.num_fds() <= descriptors, 5)

        await cancel_some(running, 1000)

        await until(lambda: held(running.worker.statistics()) == (0, 0, 0), 5)
        await until(lambda: process.num_fds() <= descriptors, 5)
        # DataFusion's runtime has a thread for every batch that waits for the GIL, and lets it go after 10 s.
        await until(lambda: process.num_threads() <= threads, 15)
        gc.collect()
        assert process.memory_info().rss < memory + 50 * MEGABYTE
    assert not [name for _, _, files in os.walk(tmp_path) for name in files]


async def test_a_client_with_grpcs_default_limit_reads_large_batches() -> None:
    session = SessionContext(SessionConfig({"datafusion.execution.batch_size": "262144"}).with_target_partitions(1))
    columns = ", ".join(f"value + {number}.5 as c{number}" for number in range(8))
    plan = session.sql(f"select {columns} from range(1000000)").execution_plan().to_bytes()

    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        await _drain(FlightServiceStub(channel).DoGet(Ticket(ticket=plan_ticket(plan))))

        assert running.worker.statistics().rows_sent == 1_000_000


async def test_closing_a_worker_ends_its_streams_and_refuses_new_ones() -> None:
    async with running_worker() as running, WorkerClient(running.url) as client:
        async with aclosing(client.execute(rows_plan(50_000_000, 1), 0)) as batches:
            await anext(batches)

            await running.worker.close()

            with pytest.raises(grpc.aio.AioRpcError, match="the worker was closed") as ended:
                async for _ in batches:
                    pass
        with pytest.raises(grpc.aio.AioRpcError, match="the worker was closed") as refused:
            await anext(client.execute(rows_plan(1, 1), 0))
        assert ended.value.code() is refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: held(running.worker.statistics()) == (0, 0, 0))


@pytest.mark.parametrize("alone", [True, False])
async def test_a_partition_that_was_still_to_be_executed_when_the_worker_closed_is_unavailable(alone: bool) -> None:
    tasks = Tasks(1, ADMISSION, Executor(PlanLimits(), max_streams=9))
    ticket = PlanTicket(rows_plan(1, 2))
    wanted = Wanted(ticket, "ada", SessionStateBuilder().build(), Demand("ada", object(), 1), python_udf_inlining=False)
    async with tasks.task(wanted) as task:
        await tasks.close()
        with pytest.raises(Unavailable):
            await task.execute(0, alone=alone)


async def test_a_partition_that_was_being_executed_when_the_worker_closed_is_not_read() -> None:
    executor, session = Executor(PlanLimits(), max_streams=9), SessionStateBuilder().build()
    instance = await executor.decode(session, rows_plan(1, 1))
    await executor.close()
    with pytest.raises(Unavailable):
        executor.stream(session.execute(instance, 0), instance)


async def test_a_request_whose_plan_was_being_decoded_when_the_worker_closed_is_unavailable() -> None:
    slow_to_decode = f"value not in ({', '.join(str(number) for number in range(1_000_000, 1_020_000))})"
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = FlightServiceStub(channel).DoGet(Ticket(ticket=plan_ticket(rows_plan(1, 1, slow_to_decode))))
        await until(lambda: running.worker.statistics().plans_decoded == 1)
        await running.worker.close()
        with pytest.raises(grpc.aio.AioRpcError, match="the worker was closed") as refused:
            await _drain(call)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_slow_synchronous_builders_do_not_keep_others_from_theirs() -> None:
    """As many as the threads of asyncio's own pool wait, until somebody else has been served."""
    served = threading.Event()

    def build_state(ctx: WorkerQueryContext) -> SessionContext:
        if ctx.headers.get("x-wait"):
            assert served.wait(20)
        return ctx.builder.build()

    plan = rows_plan(1, 1)
    async with running_worker(build_state) as running, WorkerClient(running.url) as client:

        async def rows(**headers: str) -> int:
            return sum([batch.num_rows async for batch in client.execute(plan, 0, headers=headers)])

        waiting = [asyncio.ensure_future(rows(**{"x-wait": "yes"})) for _ in range(40)]
        await until(lambda: running.worker.statistics().requests == 40)
        assert await asyncio.wait_for(rows(), 5) == 1
        served.set()
        assert await asyncio.gather(*waiting) == [1] * 40


async def test_the_loop_goes_on_while_a_request_waits_for_datafusions_threads() -> None:
    """
    1. The inputs of a merge, as many as DataFusion has threads, wait in a function, each in one of these.
    2. Another request's plan, decoded on the event loop, cannot be executed.
    3. The loop goes on nevertheless, and lets the function return: both are answered.
    """
    busy = len(os.sched_getaffinity(0))
    entered, release = threading.Semaphore(0), threading.Event()

    def wait(values: pa.Array) -> pa.Array:
        entered.release()
        assert release.wait(20)
        return values

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_scalar_functions([udf(wait, [pa.int64()], pa.int64(), "volatile", "wait")]).build()

    session = SessionContext()
    session.register_udf(udf(lambda values: values, [pa.int64()], pa.int64(), "volatile", "wait"))
    session.register_record_batches("t", [[pa.record_batch({"x": [1]})]] * busy)
    merge = session.sql("select x from t where wait(x) = 1 limit 1000").execution_plan()
    assert merge.display().startswith("CoalescePartitionsExec")
    async with running_worker(build) as running, WorkerClient(running.url) as client:

        async def rows(plan: bytes) -> int:
            return sum([batch.num_rows async for batch in client.execute(plan, 0)])

        waiting = asyncio.ensure_future(rows(merge.to_bytes()))
        for _ in range(busy):
            assert await asyncio.to_thread(entered.acquire, timeout=5)
        another = asyncio.ensure_future(rows(rows_plan(1, 1)))
        await until(lambda: running.worker.statistics().plans_decoded == 2)
        release.set()
        assert await waiting == busy
        assert await another == 1


async def _drain(call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
    async for _ in call:
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_reader_that_stops_reading_stops_the_plan_and_loses_nothing() -> None:
    """5 GB, of which the reader takes a twentieth, and the rest after 10 s without a read."""
    rows = 5_000_000_000 // 64
    plan = rows_plan(rows, 1)
    process = psutil.Process()

    async with running_worker() as running, WorkerClient(running.url) as client:
        seen, highest, batches = 0, 0, client.execute(plan, 0)
        async for batch in batches:
            seen += batch.num_rows
            if seen > rows // 20:
                break
        before = process.memory_info().rss
        for _ in range(100):
            await asyncio.sleep(0.1)
            highest = max(highest, process.memory_info().rss - before)
        sent = running.worker.statistics().rows_sent
        async for batch in batches:
            seen += batch.num_rows

        assert highest < 100 * MEGABYTE
        assert sent < rows // 10
        assert seen == rows
