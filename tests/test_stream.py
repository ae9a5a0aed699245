"""How batches come through: joined where they flow, at once where they trickle, and let go of at the end."""

import asyncio
import queue
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import psutil
import pyarrow as pa
import pytest
from datafusion import ScalarUDF, SessionConfig, SessionContext, udf
from support import listening

from worker import WorkerQueryContext, plan_ticket
from worker.client import WorkerClient
from worker.execution.stream import FLOW_SECONDS, READS_BEFORE_FLOW, STREAM_BYTES
from worker.proto.Flight_pb2 import FlightData, Ticket
from worker.proto.Flight_pb2_grpc import FlightServiceStub
from worker.testing import running_worker

FLOWING = 10 * READS_BEFORE_FLOW
TRICKLING = 10


def _rows(count: int, batch_size: int, column: str = "value") -> bytes:
    options = {"datafusion.execution.batch_size": str(batch_size)}
    session = SessionContext(SessionConfig(options).with_target_partitions(1))
    return session.sql(f"SELECT {column} FROM range({count})").execution_plan().to_bytes()


def _gate(wait: Callable[[], None]) -> ScalarUDF:
    def pass_through(values: pa.Array) -> pa.Array:
        wait()
        return values

    return udf(pass_through, [pa.int64()], pa.int64(), "volatile", "gate")


@asynccontextmanager
async def _gated(plan_rows: int) -> AsyncIterator[tuple[Callable[[], None], AsyncIterator[pa.RecordBatch]]]:
    """What lets one more row go, and the batches that arrive, of a stream of as many batches as rows."""
    permits: queue.SimpleQueue[None] = queue.SimpleQueue()
    session = SessionContext(SessionConfig({"datafusion.execution.batch_size": "1"}).with_target_partitions(1))
    session.register_udf(_gate(lambda: None))
    plan = session.sql(f"SELECT gate(value) AS value FROM range({plan_rows})").execution_plan().to_bytes()

    gate = _gate(lambda: permits.get(timeout=60))

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_scalar_functions([gate]).build()

    async with running_worker(build) as running, WorkerClient(running.url) as client:
        try:
            yield lambda: permits.put(None), client.execute(plan)
        finally:
            for _ in range(plan_rows):
                permits.put(None)


async def test_a_row_of_a_stream_that_trickles_arrives_before_the_next_is_made() -> None:
    """Also when it flowed before, so that batches were held back for others to join them."""
    async with _gated(FLOWING + TRICKLING) as (let_one_go, batches):
        for _ in range(FLOWING):
            let_one_go()
        arrived = 0
        while arrived < FLOWING:
            arrived += (await anext(batches)).num_rows
        delays = []
        for _ in range(TRICKLING):
            await asyncio.sleep(3 * FLOW_SECONDS)
            start = time.monotonic()
            let_one_go()
            async with asyncio.timeout(10):
                batch = await anext(batches)
            delays.append(time.monotonic() - start)
            assert batch.num_rows == 1
        assert statistics.median(delays) < 0.05


async def test_small_batches_that_flow_are_joined() -> None:
    rows = 200_000
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        call = FlightServiceStub(channel).DoGet(Ticket(ticket=plan_ticket(_rows(rows, 256))))
        messages = [message async for message in call]
        assert isinstance(messages[0], FlightData)
        assert len(messages) < rows / 256 / 10
        assert running.worker.statistics().rows_sent == rows


@pytest.mark.slow
async def test_streams_that_nobody_reads_on_hold_no_more_than_is_said() -> None:
    plan, readers = _rows(1_000_000_000, 8192, column="value, value + 1.5 AS a, value + 2.5 AS b"), 32
    async with listening("-m", "worker", "--no-supervisor", "--port", "0", "--grace", "0") as (process, url):
        server = psutil.Process(process.pid)
        # Without probes of the bandwidth: they make the windows grow, and the streams flow on, for up to a minute.
        fixed_window = [("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(url.removeprefix("grpc://"), options=fixed_window) as channel:
            stub = FlightServiceStub(channel)

            async def start(reading: grpc.aio.UnaryStreamCall[Ticket, FlightData]) -> None:
                for _ in range(3):
                    assert isinstance(await reading.read(), FlightData)

            async def read_a_little(count: int) -> list[grpc.aio.UnaryStreamCall[Ticket, FlightData]]:
                calls = [stub.DoGet(Ticket(ticket=plan_ticket(plan))) for _ in range(count)]
                await asyncio.gather(*map(start, calls))
                await _settled(server)
                return calls

            # What the process needs for any number of streams, such as threads and their heaps, is there after these.
            first = await read_a_little(readers)
            before = server.memory_info().rss
            others = await read_a_little(readers)
            held = server.memory_info().rss - before

            assert held < readers * STREAM_BYTES
            for call in first + others:
                call.cancel()


async def _settled(server: psutil.Process) -> None:
    """Waits until the server has nothing more to do."""
    idle = 0
    while idle < 3:
        before = sum(server.cpu_times()[:2])
        await asyncio.sleep(0.1)
        idle = idle + 1 if sum(server.cpu_times()[:2]) - before < 0.02 else 0
