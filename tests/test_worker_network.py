"""Tasks that read other tasks through the WorkerService: what they get, what they tell of it, and what goes wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pyarrow as pa
import pytest
from certificates import Authority
from datafusion import SessionConfig, SessionContext
from flight_plans import distributed, url
from support import status, until
from worker_service import (
    CONFIG,
    INVALID,
    NONE,
    NUMBERS,
    Metadata,
    all_values,
    coordinated,
    execute_request,
    files,
    hashed,
    plan_of,
    reads,
    refusal,
    refused_read,
    repartition,
    service,
    task_key,
    values,
)

from worker import Settings, Worker, add_WorkerServiceServicer_to_server, plan_proto
from worker.encoding.encode import Encoder
from worker.plan_proto import Message
from worker.proto import nodes_pb2, worker_pb2, worker_pb2_grpc
from worker.testing import running_worker

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Execute: TypeAlias = Callable[[worker_pb2.ExecuteTaskRequest, Context], AsyncIterator[worker_pb2.FlightData]]


def shuffle(partitions: int, urls: Sequence[str], query: bytes) -> Message:
    return reads("shuffle", NUMBERS, hashed(0, partitions), urls, query)


def coalesce(partitions: int, urls: Sequence[str], query: bytes) -> Message:
    return reads("coalesce", NUMBERS, plan_proto.Partitioning(unknown=partitions), urls, query)


def broadcast(partitions: int, urls: Sequence[str], query: bytes) -> Message:
    return reads("network_broadcast", NUMBERS, plan_proto.Partitioning(unknown=partitions), urls, query)


def over(leaf: Message, query: str) -> Message:
    """The plan of a query over a table ``t``, which the leaf takes the place of."""
    plan = plan_proto.parse(plan_of([1], query=query))
    (scan,) = (node for node in plan_proto.nodes(plan) if plan_proto.kind(node) == "memory_scan")
    scan.CopyFrom(leaf)
    return plan


def rows(figures: Sequence[worker_pb2.MetricsSet]) -> list[int | None]:
    """The rows of each node; None for one that does not tell."""
    counts = [
        [metric.output_rows.value for metric in node.metrics if metric.HasField("output_rows")] for node in figures
    ]
    return [sum(count) if count else None for count in counts]


def counts(figures: worker_pb2.MetricsSet) -> dict[str, int]:
    return {metric.count.name: metric.count.value for metric in figures.metrics if metric.HasField("count")}


@asynccontextmanager
async def upstream(execute: Execute) -> AsyncIterator[str]:
    """The URL of a worker that answers for its tasks as a test says."""

    class Upstream(worker_pb2_grpc.WorkerServiceServicer):
        async def ExecuteTask(self, request: Any, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
            async for data in execute(request, context):
                yield data

    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Upstream(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)


def sent(partition: int, *batches: pa.RecordBatch) -> list[worker_pb2.FlightData]:
    """What a worker sends for a partition."""
    encoder = Encoder(NUMBERS, 64 << 20)
    about = worker_pb2.FlightAppMetadata(partition=partition).SerializeToString()
    return [
        worker_pb2.FlightData(data_header=header, data_body=b"".join(body), app_metadata=about)
        for header, body in (encoder.schema(), *encoder.encode(batches))
    ]


def batch(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(numbers, pa.int64())})


async def test_a_shuffle_has_all_rows_of_all_tasks_once() -> None:
    numbers = list(range(1000))
    query = task_key().query_id
    async with running_worker() as one, running_worker() as other, AsyncExitStack() as stack:
        urls = [url(one), url(other)]
        for number, running in enumerate((one, other)):
            plan = plan_of(numbers[number::4], numbers[number + 2 :: 4])
            key = task_key(number, query)
            await stack.enter_async_context(coordinated(running, plan, key=key, task_count=2))
        found = []
        for number, running in enumerate((one, other)):
            key = task_key(number, query, stage=2)
            plan = shuffle(3, urls, query)
            async with coordinated(running, plan, key=key, task_count=2) as task:
                tables = await task.read(range(3))
                assert all(table.num_rows for table in tables.values())
                (leaf,) = await task.figures()
            found += [*tables.values()]
            assert rows([leaf]) == [sum(table.num_rows for table in tables.values())]
            assert counts(leaf)["local_connections_used"] == 1
            # A schema and a batch for each partition of the other worker's.
            assert counts(leaf)["msg_count"] == 6
        assert all_values(found) == numbers


async def test_a_coalesce_has_its_group_of_tasks_and_nothing_beyond_it() -> None:
    """Three tasks of two partitions, read by two: the first reads two of them, the second one."""
    query = task_key().query_id
    async with running_worker() as one, running_worker() as other, AsyncExitStack() as stack:
        workers = [one, other, one]
        for number, running in enumerate(workers):
            plan = plan_of([10 * number], [10 * number + 1])
            await stack.enter_async_context(coordinated(running, plan, key=task_key(number, query), task_count=3))
        plan = coalesce(4, [url(running) for running in workers], query)
        expected = [[[0], [1], [10], [11]], [[20], [21], [], []]]
        for number in range(2):
            key = task_key(number, query, stage=2)
            async with coordinated(other, plan, key=key, task_count=2) as task:
                tables = await task.read(range(4))
                assert [values(tables[partition]) for partition in range(4)] == expected[number]


async def test_a_broadcast_is_read_whole_by_every_task_and_computed_once() -> None:
    query = task_key().query_id
    async with running_worker() as one, running_worker() as other:
        plan = broadcast(2, [url(one)], query)
        async with coordinated(one, plan_of([1, 2], [3]), key=task_key(0, query)) as source:
            for number, running in enumerate((one, other, other)):
                key = task_key(number, query, stage=2)
                async with coordinated(running, plan, key=key, task_count=3) as task:
                    tables = await task.read(range(2))
                    assert [values(tables[partition]) for partition in range(2)] == [[1, 2], [3]]
            # The broadcast, which is not executed, a projection, and a scan of memory, which tells nothing.
            assert rows(await source.figures()) == [None, 3, None]


async def test_figures_are_in_the_order_of_the_coordinators_plan() -> None:
    query = task_key().query_id
    plan = over(shuffle(1, ["http://own"], query), "SELECT x + 1 AS x FROM t WHERE x > 5")
    kinds = [plan_proto.kind(node) for node in plan_proto.nodes(plan)]
    assert kinds == ["projection", "filter", "extension"]
    async with running_worker() as running:
        plan = over(shuffle(1, [url(running)], query), "SELECT x + 1 AS x FROM t WHERE x > 5")
        async with (
            coordinated(running, plan_of(range(10)), key=task_key(0, query)),
            coordinated(running, plan, key=task_key(0, query, stage=2)) as task,
        ):
            assert all_values((await task.read(range(2), repartition(hashed(0, 2)))).values()) == [7, 8, 9, 10]
            figures = await task.figures()
    # The head, the nodes, and the network node, that of a worker that read itself.
    assert rows(figures) == [4, 4, 4, 10]
    assert counts(figures[-1]) == {"local_connections_used": 1}


def union(count: int, children: Sequence[tuple[int, int, int]], *inputs: Message) -> Message:
    """A union of children for one task, padded to so many partitions."""
    node = nodes_pb2.ChildrenIsolatorUnion(
        partition_count=count,
        task_idx_map=[
            nodes_pb2.Children(
                child_ctx=[nodes_pb2.Child(child_idx=i, task_idx=t, task_count=c) for i, t, c in children]
            )
        ],
    )
    return distributed(nodes_pb2.Node(children_isolator_union=node), *inputs)


FILTERED = plan_proto.parse(plan_of([1, 2, 3], query="SELECT x FROM t WHERE x > 2"))
WHOLE = plan_proto.parse(plan_of([4, 5], [6]))


@pytest.mark.parametrize(
    ("partitions", "children", "expected", "nodes"),
    [
        (3, [0, 1], [[3], [4, 5], [6]], [4, 1, None, 3, None]),
        (3, [1, 0], [[4, 5], [6], [3]], [4, 3, None, 1, None]),
        (5, [0, 1], [[3], [4, 5], [6], [], []], [4, 1, None, 3, None]),
        (1, [0], [[3]], [1, 1, None]),
        (2, [1], [[4, 5], [6]], [3, 3, None]),
        (2, [0], [[3], []], [1, 1, None]),
        (2, [], [[], []], [0]),
    ],
    ids=["both", "in another order", "both padded", "one", "another one", "one padded", "none"],
)
async def test_a_union_has_its_tasks_children_padded_with_empty_partitions(
    partitions: int, children: list[int], expected: list[list[int]], nodes: list[int | None]
) -> None:
    plan = union(partitions, [(child, 0, 1) for child in children], FILTERED, WHOLE)
    async with running_worker() as running, coordinated(running, plan) as task:
        tables = await task.read(range(partitions))
        assert [values(tables[partition]) for partition in range(partitions)] == expected
        assert rows(await task.figures()) == nodes


async def test_a_child_of_a_union_reads_as_the_task_that_it_is_of_its_stage() -> None:
    query = task_key().query_id
    async with running_worker() as running:
        child = shuffle(1, [url(running)], query)
        plan = union(2, [(0, 1, 2), (0, 0, 2)], child)
        async with (
            coordinated(running, plan_of(range(100)), key=task_key(0, query)),
            coordinated(running, plan, key=task_key(0, query, stage=2)) as task,
        ):
            tables = await task.read(range(2))
            assert all(table.num_rows for table in tables.values())
            assert all_values(tables.values()) == list(range(100))
            assert rows(await task.figures()) == [100, *(tables[part].num_rows for part in range(2))]


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (union(1, [(2, 0, 1)], FILTERED, WHOLE), "a union of 2 inputs wants input [2]"),
        (union(1, []), "a union of 0 inputs wants input []"),
        (
            distributed(nodes_pb2.Node(children_isolator_union=nodes_pb2.ChildrenIsolatorUnion()), WHOLE),
            "a union has inputs for 0 tasks, none for task 0",
        ),
    ],
    ids=["no such child", "no child", "no task"],
)
async def test_a_union_that_makes_no_sense_is_refused(plan: Message, text: str) -> None:
    async with running_worker() as running:
        assert await refusal(running, plan) == (INVALID, text)


@pytest.mark.parametrize(("times", "nodes"), [(1, [3, None, 3, None]), (3, [9, 9, 3, None])])
async def test_a_broadcast_left_within_a_plan_repeats_its_input(times: int, nodes: list[int | None]) -> None:
    repeated = distributed(nodes_pb2.Node(broadcast=nodes_pb2.Broadcast(consumer_task_count=times)), WHOLE)
    plan = over(repeated, "SELECT x + 0 AS x FROM t")
    async with running_worker() as running, coordinated(running, plan) as task:
        tables = await task.read(range(2 * times))
        assert [values(table) for table in tables.values()] == [[4, 5], [6]] * times
        assert rows(await task.figures()) == nodes


def sampled(message: Message) -> Message:
    return distributed(nodes_pb2.Node(sampler=nodes_pb2.Sampler()), message)


async def test_what_there_is_of_each_partition_is_told_before_it_is_read() -> None:
    session = SessionContext(SessionConfig().with_target_partitions(2))
    schema = pa.schema({"n": pa.int64(), "s": pa.string()})
    first = pa.record_batch([[1, None, 1, 2], ["a", "b", "c", "d"]], schema=schema)
    second = pa.record_batch([[None], [None]], schema=schema)
    session.register_record_batches("t", [[first], [second], []])
    plan = sampled(
        plan_proto.parse(session.sql("SELECT n, s FROM t WHERE n > 0 OR n IS NULL").execution_plan().to_bytes())
    )
    async with running_worker() as running, coordinated(running, plan) as task:
        loads = {load.partition: load for load in task.loads}
        assert len(loads) == len(task.loads) == 3
        assert [loads[partition].rows_ready for partition in range(3)] == [4, 1, 0]
        assert [loads[partition].rows_pulled_from_leaf for partition in range(3)] == [4, 1, 0]
        assert all(load.reached_eos for load in task.loads)
        shares = [(*load.per_column_ndv_percentage, *load.per_column_null_percentage) for load in loads.values()]
        by_partition = dict(zip(loads, shares, strict=True))
        assert [by_partition[partition] for partition in range(3)] == [(0.5, 1, 0.25, 0), (0, 0, 1, 1), (0, 0, 0, 0)]
        numbers, letters = loads[0].per_column_bytes_ready
        assert 4 * 8 <= numbers <= 4 * 8 + 8
        assert 4 * 4 + 4 <= letters <= 200
        assert list(loads[2].per_column_bytes_ready) == [0, 0]
        # It is read under the head that is decided only now.
        tables = await task.read(range(2), repartition(hashed(0, 2)))
        assert pa.concat_tables(tables.values()).sort_by("s")["n"].to_pylist() == [1, None, 1, 2, None]
        assert rows(await task.figures()) == [5, None, 5, None]


async def test_a_plan_without_a_sampler_tells_no_loads() -> None:
    async with running_worker() as running, coordinated(running, plan_of([1])) as task:
        assert task.loads == []


async def test_headers_go_on_to_the_workers_that_are_read() -> None:
    seen: list[Any] = []

    async def note(request: worker_pb2.ExecuteTaskRequest, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
        seen.extend(tuple(pair) for pair in context.invocation_metadata() or ())
        for data in sent(0, batch(1)):
            yield data

    headers: Metadata = [
        ("authorization", "Bearer ada"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("x-thing-bin", b"\x00\xff"),
        (f"{CONFIG}distributed.compression", "zstd"),
        (f"{CONFIG}mine.option", "yes"),
    ]
    async with running_worker() as running, upstream(note) as source:
        plan = shuffle(1, [source], task_key().query_id)
        async with coordinated(running, plan, metadata=headers) as task:
            assert values((await task.read(range(1)))[0]) == [1]
    assert [pair for pair in seen if pair[0] != "user-agent"] == headers


async def test_what_is_asked_of_the_workers_that_are_read() -> None:
    asked: list[worker_pb2.ExecuteTaskRequest] = []

    async def answer(request: worker_pb2.ExecuteTaskRequest, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
        asked.append(request)
        for partition in range(request.target_partition_start, request.target_partition_end):
            for data in sent(partition):
                yield data

    query = task_key().query_id
    async with running_worker() as running, upstream(answer) as source:
        for leaf in (shuffle(2, [source], query), broadcast(2, [source], query), coalesce(2, [source] * 3, query)):
            async with coordinated(running, leaf, key=task_key(2, stage=2), task_count=3) as task:
                await task.read(range(2))
    first, third = task_key(0, query), task_key(2, query)
    assert asked == [
        execute_request(first, range(4, 6), repartition(hashed(0, 6))),
        execute_request(first, range(4, 6), worker_pb2.BroadcastExecHead(output_partitions=6)),
        execute_request(third, range(2), NONE),
    ]


async def test_an_error_of_a_worker_that_is_read_arrives_as_it_is_and_once() -> None:
    details = b"\x08\x0d what went wrong"

    async def fail(request: worker_pb2.ExecuteTaskRequest, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
        for data in sent(0, batch(1)):
            yield data
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        await context.abort(grpc.StatusCode.DATA_LOSS, "the disk has gone: 100 %, für immer")

    query = task_key().query_id
    async with (
        running_worker() as one,
        running_worker() as other,
        upstream(fail) as source,
        coordinated(other, shuffle(1, [source], query), key=task_key(0, query, stage=2)),
        coordinated(one, reads("shuffle", NUMBERS, hashed(0, 1), [url(other)], query, stage=2)) as task,
        service(one) as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(client.ExecuteTask(execute_request(task.key, range(1)))))
        assert raised.value.code() is grpc.StatusCode.DATA_LOSS
        assert raised.value.details() == "the disk has gone: 100 %, für immer"
        assert dict(raised.value.trailing_metadata() or ())["grpc-status-details-bin"] == details
        # Whoever asks later is told the same, and the coordinator's side does not fail.
        again = await refused_read(one, task.key)
        assert again == (grpc.StatusCode.DATA_LOSS, "the disk has gone: 100 %, für immer")


async def test_a_worker_that_is_not_there_is_named_once() -> None:
    query = task_key().query_id
    nobody = "http://127.0.0.1:1"
    async with (
        running_worker() as one,
        running_worker() as other,
        coordinated(other, shuffle(1, [nobody], query), key=task_key(0, query, stage=2)),
        coordinated(one, reads("shuffle", NUMBERS, hashed(0, 1), [url(other)], query, stage=2)) as task,
    ):
        code, text = await refused_read(one, task.key)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert text.startswith(f"worker {nobody} is not available: ")
        assert text.count("not available") == 1
        assert url(other) not in text


@pytest.mark.parametrize("source", ["127.0.0.1:1", "grpc://127.0.0.1:1", "http://", "http://host:port", "", "no url"])
async def test_a_url_that_makes_no_sense_is_named(source: str) -> None:
    async with running_worker() as running, coordinated(running, shuffle(1, [source], task_key().query_id)) as task:
        code, text = await refused_read(running, task.key)
        assert code is INVALID
        assert repr(source) in text


SCHEMA, BATCH = sent(0, batch(1, 2, 3))
RUBBISH = {
    "of another partition": sent(1, batch(1)),
    "no schema": [BATCH],
    "no metadata of Arrow's": [worker_pb2.FlightData(data_header=b"rubbish", data_body=b"rubbish")],
    "none at all": [worker_pb2.FlightData()],
    "cut": [SCHEMA, worker_pb2.FlightData(data_header=BATCH.data_header[:20], data_body=BATCH.data_body)],
    "less than it says": [SCHEMA, worker_pb2.FlightData(data_header=BATCH.data_header, data_body=BATCH.data_body[:8])],
    "no partition": [worker_pb2.FlightData(data_header=SCHEMA.data_header, app_metadata=b"rubbish")],
}


@pytest.mark.parametrize("messages", RUBBISH.values(), ids=RUBBISH)
async def test_a_worker_that_answers_with_rubbish_is_named_and_not_listened_to(
    messages: list[worker_pb2.FlightData],
) -> None:
    ended = asyncio.Event()

    async def answer(request: worker_pb2.ExecuteTaskRequest, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
        try:
            for message in messages:
                yield message
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with (
        running_worker() as running,
        upstream(answer) as source,
        coordinated(running, shuffle(1, [source], task_key().query_id)) as task,
    ):
        code, text = await refused_read(running, task.key)
        assert code is grpc.StatusCode.INTERNAL
        assert text.startswith(f"worker {source} does not answer rightly: ")
        await asyncio.wait_for(ended.wait(), 2)


async def test_a_cancelled_query_leaves_nothing_of_what_it_was_reading(tmp_path: Path) -> None:
    hanging, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(request: worker_pb2.ExecuteTaskRequest, context: Context) -> AsyncIterator[worker_pb2.FlightData]:
        try:
            for data in sent(0, batch(*range(100_000))):
                yield data
            hanging.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    metadata = [(f"{CONFIG}distributed.worker_connection_buffer_budget_bytes", "1000")]
    async with (
        running_worker(settings=Settings(spill_folder=tmp_path)) as running,
        upstream(hang) as source,
        service(running) as client,
        coordinated(running, shuffle(1, [source], task_key().query_id), metadata=metadata) as task,
    ):
        reading = asyncio.ensure_future(status(client.ExecuteTask(execute_request(task.key, range(1)))))
        await hanging.wait()
        await until(lambda: len(files(tmp_path)) == 2 and running.worker.statistics().requests == 2)
        task.call.cancel()
        assert await asyncio.wait_for(reading, 2) == (grpc.StatusCode.CANCELLED, "the coordinator ended the query")
        await asyncio.wait_for(cancelled.wait(), 2)
        held = running.worker.statistics
        await until(lambda: not (held().requests + held().tasks + held().streams))
        assert files(tmp_path) == {"lock"}


async def test_workers_whose_urls_are_https_are_trusted_by_the_credentials_that_are_set() -> None:
    """A server of a user's own, with TLS, and two workers that read it, one of which does not trust it."""
    authority = Authority()
    own = authority.issue("worker")
    query = task_key().query_id
    async with Worker() as worker:
        server = grpc.aio.server()
        add_WorkerServiceServicer_to_server(worker, server)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(own.key, own.cert)]))
        await server.start()
        plan = shuffle(1, [f"https://127.0.0.1:{port}"], query)
        trusting = grpc.ssl_channel_credentials(authority.pem)
        set_plan = worker_pb2.SetPlanRequest(task_key=task_key(0, query), task_count=1, plan_proto=plan_of([1, 2]))
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusting) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).CoordinatorChannel()
            await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=set_plan))
            async with running_worker() as one, running_worker() as other:
                one.worker.with_channel_credentials(trusting)
                async with coordinated(one, plan) as task:
                    assert values((await task.read(range(1)))[0]) == [1, 2]
                async with coordinated(other, plan) as task:
                    code, text = await refused_read(other, task.key)
                    assert code is grpc.StatusCode.UNAVAILABLE
                    assert text.startswith(f"worker https://127.0.0.1:{port} is not available: ")
        await server.stop(None)
