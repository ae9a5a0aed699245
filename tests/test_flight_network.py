"""Distributed plans in tickets: network nodes and isolators, over two workers that read each other."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import SessionConfig, SessionContext
from flight_plans import METRICS, coalesced, distributed, isolated, network, stage, ticket, url
from support import as_of_51, fetch, fetch_one, metadata_of, stage_key, status, stub, until

from worker import InvalidPlan, PermissionDenied, Settings, WorkerQueryContext, plan_proto
from worker.cluster import flight_rewrite
from worker.cluster.nodes import Place, parse_in_ticket
from worker.headers import Headers
from worker.plan import schema_message
from worker.plan_proto import Message, PhysicalPlanNode
from worker.proto import Flight_pb2, nodes_pb2, plan_pb2
from worker.testing import RunningWorker, running_worker
from worker.ticket import PlanTicket

FILES = 5
ROWS = 1000
SUMS = "SELECT k, sum(v) AS s, count(*) AS n FROM t GROUP BY k"


@pytest.fixture
def session(tmp_path: Path) -> SessionContext:
    """A session that plans over a table of several files, with so many partitions."""
    folder = tmp_path / "t"
    folder.mkdir()
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        names = [f"{number % 37}-{'x' * (number % 37)}" for number in numbers]
        pq.write_table(pa.table({"k": names, "v": list(numbers)}), folder / f"{file}.parquet")
    session = SessionContext(SessionConfig().with_target_partitions(FILES))
    session.register_parquet("t", folder)
    return session


@asynccontextmanager
async def _two(**settings: object) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    async with running_worker(settings=Settings(**settings)) as one, running_worker() as other:  # type: ignore[arg-type]
        yield one, other


def _planned(session: SessionContext, query: str, *, is_old: bool = False) -> Message:
    """The plan of a query, as DataFusion 51 writes it if it is to be old."""
    plan = session.sql(query).execution_plan().to_bytes()
    return as_of_51(session, plan) if is_old else plan_proto.parse(plan)


def _find(plan: Message, kind: str) -> Message:
    return next(node for node in plan_proto.nodes(plan) if plan_proto.kind(node) == kind)


def _sums(
    session: SessionContext,
    urls: Sequence[str],
    query: uuid.UUID | None = None,
    each: int = 3,
    final: Message | None = None,
) -> Message:
    """The plan of ``SUMS`` or another such query in three stages of two tasks, two tasks, and one."""
    final = final or _planned(session, SUMS)
    exchange = _find(final, "repartition")
    below = PhysicalPlanNode()
    below.CopyFrom(exchange)
    partitioning = plan_proto.Partitioning()
    partitioning.CopyFrom(exchange.repartition.partitioning)
    partitioning.hash.partition_count = each
    below.repartition.partitioning.hash.partition_count = 2 * each
    scan = _find(below, "parquet_scan")
    scan.CopyFrom(isolated(scan, 2))
    schema = pa.schema([("k", pa.string_view()), ("s", pa.int64()), pa.field("n", pa.int64(), nullable=False)])
    exchange.CopyFrom(network("shuffle", schema_message(schema), partitioning, stage(1, below, urls, query)))
    assert "repartition" not in {plan_proto.kind(node) for node in plan_proto.nodes(final)}
    return coalesced(schema, 2 * each, stage(2, final, urls[::-1], query))


def _rows(table: pa.Table) -> list[str]:
    return sorted(map(str, table.to_pylist()))


async def _status(worker: RunningWorker, ticket: bytes) -> tuple[grpc.StatusCode, str]:
    async with stub(worker.address) as service:
        return await status(service.DoGet(Flight_pb2.Ticket(ticket=ticket)))


async def test_stages_read_each_other(session: SessionContext) -> None:
    async with _two() as (one, other):
        plan = _sums(session, [url(one), url(other)])
        table = await fetch_one(one, ticket(plan, count=1, key=stage_key()))
        assert _rows(table) == _rows(session.sql(SUMS).to_arrow_table())
        assert table.schema == session.sql(SUMS).to_arrow_table().schema
        await until(lambda: one.worker.statistics().tasks == other.worker.statistics().tasks == 0)


async def test_stages_that_datafusion_51_has_planned(session: SessionContext) -> None:
    query = "SELECT k, sum(v) AS s, count(*) AS n FROM t WHERE v % 3 > 0 AND k > '2' GROUP BY k HAVING sum(v) > 10"
    final = _planned(session, query, is_old=True)
    assert [node.filter.batch_size for node in plan_proto.nodes(final) if plan_proto.kind(node) == "filter"] == [0, 0]
    async with _two() as (one, other):
        table = await fetch_one(one, ticket(_sums(session, [url(one), url(other)], final=final), count=1))
    assert _rows(table) == _rows(session.sql(query).to_arrow_table()) != []


@pytest.mark.parametrize("each", [1, 2, 16])
async def test_any_number_of_partitions(session: SessionContext, each: int) -> None:
    """With 16, some are empty; a client that is no coordinator says neither a task nor a key."""
    async with _two() as (one, other):
        table = await fetch_one(one, ticket(_sums(session, [url(one), url(other)], each=each)))
        assert _rows(table) == _rows(session.sql(SUMS).to_arrow_table())


async def test_partitions_of_a_task_share_its_input(session: SessionContext) -> None:
    async with _two() as (one, other):
        plan = _sums(session, [url(other), url(other)]).merge.input
        key = stage_key()
        tables = await fetch(one, [ticket(plan, partition, 0, 1, key) for partition in range(6)])
        assert _rows(pa.concat_tables(tables)) == _rows(session.sql(SUMS).to_arrow_table())
        assert other.worker.statistics().partitions_executed == 2 * 3 + 2 * 6
        assert one.worker.statistics().partitions_executed == 6
        await until(lambda: one.worker.statistics().tasks == other.worker.statistics().tasks == 0)


async def test_what_is_large_goes_through_files_that_are_deleted(session: SessionContext, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    query = "SELECT k || repeat('y', 4000) AS k, v FROM t"
    async with _two(spill_folder=spill) as (one, other):
        below = _planned(session, query)
        schema = session.sql(query).to_arrow_table().schema
        plan = coalesced(schema, FILES, stage(1, below, [url(other)])).merge.input
        key = stage_key()
        tables = [await fetch_one(one, ticket(plan, partition, key=key)) for partition in range(FILES - 1)]
        assert [file for file in spill.rglob("*") if file.is_file() and file.stat().st_size > 1 << 20]
        tables.append(await fetch_one(one, ticket(plan, FILES - 1, key=key)))
        assert _rows(pa.concat_tables(tables)) == _rows(session.sql(query).to_arrow_table())
        await until(lambda: not [file for file in spill.glob("*/*") if file.name != "lock"])
    assert not list(spill.iterdir())


async def test_views_arrive_as_they_are_between_workers_and_plain_at_a_client_that_wants_that(
    session: SessionContext,
) -> None:
    expand = (b"x-datafusion-distributed-config-datafusion.optimizer.expand_views_at_output", b"true")
    compress = (b"x-datafusion-distributed-config-distributed.compression", b"zstd")
    async with _two() as (one, other):
        plan = _sums(session, [url(one), url(other)])
        table = await fetch_one(one, ticket(plan), [expand, compress])
        assert table.schema.field("k").type == pa.large_string()
        assert _rows(table) == _rows(session.sql(SUMS).to_arrow_table())


async def test_a_plan_is_described_without_reading_other_workers(session: SessionContext) -> None:
    async with _two() as (one, other):
        plan = _sums(session, [url(other), url(other)]).merge.input
        async with stub(one.address) as service:
            descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=ticket(plan))
            info = await service.GetFlightInfo(descriptor)
        assert len(info.endpoint) == 6
        assert pa.ipc.read_schema(pa.py_buffer(info.schema)).names == ["k", "s", "n"]
        assert other.worker.statistics().plans_decoded == 0


async def test_the_last_message_has_the_figures_of_all_tasks(session: SessionContext) -> None:
    query = uuid.uuid4()
    async with _two() as (one, other):
        plan = _sums(session, [url(one), url(other)], query)
        key = plan_pb2.StageKey(query_id=query.bytes, stage_id=3)
        *others, last = await metadata_of(one, ticket(plan, 0, 0, 1, key), [METRICS])
        assert not any(others)
        told = plan_pb2.FlightAppMetadata.FromString(last).metrics_collection.tasks
        tasks = {(task.stage_key.stage_id, task.stage_key.task_number): task.metrics for task in told}
        assert len(told) == len(tasks) == 5
        rows = {
            place: [
                sum(metric.output_rows.value for metric in node.metrics if metric.HasField("output_rows"))
                for node in nodes
            ]
            for place, nodes in tasks.items()
        }
    # A merge; an aggregate and what it is projected with; and a repartitioning, an aggregate, an isolator, and a scan.
    groups = 37
    assert rows[3, 0] == [groups]
    assert [sum(both) for both in zip(rows[2, 0], rows[2, 1], strict=True)] == [groups, groups]
    repartitioned, aggregated, isolated, scanned = [sum(both) for both in zip(rows[1, 0], rows[1, 1], strict=True)]
    assert repartitioned == aggregated == FILES * groups
    assert isolated == 0
    assert scanned == FILES * ROWS


async def test_figures_are_sent_only_when_all_partitions_were_read(session: SessionContext) -> None:
    plan = _planned(session, SUMS)
    async with running_worker() as worker:
        key = stage_key()
        for partition in range(FILES - 1):
            assert not any(await metadata_of(worker, ticket(plan, partition, key=key), [METRICS]))
        assert (await metadata_of(worker, ticket(plan, FILES - 1, key=key), [METRICS]))[-1]
        for headers in ([], [(METRICS[0], b"false")]):
            key = stage_key()
            for partition in range(FILES):
                assert not any(await metadata_of(worker, ticket(plan, partition, key=key), headers))


async def test_figures_are_of_the_nodes_that_the_plan_came_with(session: SessionContext) -> None:
    """A join that is rewritten to be executed by partitions has more nodes, and twice some of them."""
    query = "SELECT * FROM (SELECT * FROM t LIMIT 3) AS a LEFT JOIN t AS b ON a.v < b.v - 4990"
    executed = session.sql(query).execution_plan()
    names = [line.strip().partition(":")[0] for line in executed.display_indent().splitlines()]
    assert "NestedLoopJoinExec" in names
    async with running_worker() as worker:
        key = stage_key()
        plan = plan_proto.parse(executed.to_bytes())
        lasts = [
            (await metadata_of(worker, ticket(plan, partition, key=key), [METRICS]))[-1]
            for partition in range(executed.partition_count)
        ]
        assert not any(lasts[:-1])
        (task,) = plan_pb2.FlightAppMetadata.FromString(lasts[-1]).metrics_collection.tasks
        assert task.stage_key == key
        assert len(task.metrics) == len(names)
        join = task.metrics[names.index("NestedLoopJoinExec")]
        assert sum(metric.output_rows.value for metric in join.metrics) == session.sql(query).count()


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("query", ["SELECT v FROM t", "SELECT v + 1 AS w FROM t WHERE v % 2 = 0"])
async def test_an_isolator_leaves_a_task_its_group_of_partitions(
    session: SessionContext, query: str, tasks: int
) -> None:
    plan = _planned(session, query)
    async with running_worker() as worker:
        whole = await fetch(worker, [ticket(plan, partition) for partition in range(FILES)])
        each = -(-FILES // tasks)
        divided = isolated(plan, tasks)
        position = 0
        for task in range(tasks):
            key = stage_key()
            tables = await fetch(worker, [ticket(divided, k, task, tasks, key) for k in range(each)])
            mine = FILES // tasks + (task < FILES % tasks)
            assert [_rows(table) for table in tables[:mine]] == [_rows(t) for t in whole[position : position + mine]]
            assert [table.num_rows for table in tables[mine:]] == [0] * (each - mine)
            position += mine
        code, text = await _status(worker, ticket(divided, each, 0, tasks))
        assert (code, text) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"partition {each} not available: the plan has {each}",
        )
    assert position == FILES


async def test_an_isolator_divides_what_is_in_memory(session: SessionContext) -> None:
    batches = [[pa.record_batch({"x": [partition]})] for partition in range(5)]
    session.register_record_batches("m", batches)
    plan = isolated(_planned(session, "SELECT x FROM m"), 2)
    async with running_worker() as worker:
        tables = await fetch(worker, [ticket(plan, k, task, 2) for task in range(2) for k in range(3)])
    assert [table["x"].to_pylist() for table in tables] == [[0], [1], [2], [3], [4], []]


@pytest.mark.parametrize(
    ("query", "kind"), [(SUMS, "aggregate"), ("SELECT * FROM t AS a JOIN t AS b ON a.v = b.v", "hash_join")]
)
async def test_an_isolator_over_what_is_not_divided_is_refused_by_name(
    session: SessionContext, query: str, kind: str
) -> None:
    plan = isolated(_find(_planned(session, query), kind), 2)
    async with running_worker() as worker:
        code, text = await _status(worker, ticket(plan, 0, 0, 2))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"a partition_isolator is over a {kind} node: ")


async def test_a_task_that_would_lose_partitions_is_refused(session: SessionContext) -> None:
    plan = isolated(_planned(session, "SELECT v FROM t"), 2)
    async with running_worker() as worker:
        code, text = await _status(worker, ticket(plan))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == "a partition_isolator for 2 tasks has 3 partitions, and task 0 of 1 has 5 of its input's 5"


def _union(children: Sequence[Message], tasks: Sequence[Sequence[tuple[int, int, int]]]) -> Message:
    counts = {index: count for task in tasks for index, _, count in task}
    inputs = [isolated(child, counts[index]) if counts[index] > 1 else child for index, child in enumerate(children)]
    partitions = [-(-FILES // counts[index]) for index in range(len(children))]
    node = nodes_pb2.ChildrenIsolatorUnion(
        partition_count=max(sum(partitions[index] for index, _, _ in task) for task in tasks),
        task_idx_map=[
            nodes_pb2.Children(child_ctx=[nodes_pb2.Child(child_idx=i, task_idx=t, task_count=c) for i, t, c in task])
            for task in tasks
        ],
    )
    return distributed(nodes_pb2.Node(children_isolator_union=node), *inputs)


@pytest.mark.parametrize(
    "tasks",
    [
        [[(0, 0, 1)], [(1, 0, 1)], [(2, 0, 1)]],
        [[(0, 0, 1)], [(1, 0, 1), (2, 0, 1)]],
        [[(0, 0, 1), (1, 0, 1), (2, 0, 1)]],
        [[(0, 0, 2), (0, 1, 2)], [(1, 0, 2)], [(1, 1, 2), (2, 0, 1)]],
        [[(0, 0, 3)], [(0, 1, 3)], [(0, 2, 3), (1, 0, 2)], [(1, 1, 2), (2, 0, 1)]],
    ],
)
@pytest.mark.parametrize("is_old", [False, True])
async def test_a_union_of_inputs_that_are_each_some_tasks(
    session: SessionContext, tasks: list[list[tuple[int, int, int]]], is_old: bool
) -> None:
    queries = ["SELECT k, v FROM t", "SELECT k, v FROM t WHERE v < 100", "SELECT k, v FROM t WHERE k > '3'"]
    whole = " UNION ALL ".join(queries)
    query = uuid.uuid4()
    async with _two() as (one, other):
        union = _union([_planned(session, each, is_old=is_old) for each in queries], tasks)
        nodes_of_all = sum(1 for _ in plan_proto.nodes(union))
        urls = [url(worker) for worker, _ in zip([one, other] * 2, tasks, strict=False)]
        partitions = nodes_pb2.Node.FromString(
            nodes_pb2.Encoded.FromString(union.extension.node).blob
        ).children_isolator_union.partition_count
        schema = session.sql(whole).to_arrow_table().schema
        plan = coalesced(schema, partitions * len(tasks), stage(1, union, urls, query))
        assert _rows(await fetch_one(one, ticket(plan))) == _rows(session.sql(whole).to_arrow_table())

        # Each task tells of all nodes, in the plan's order, whether they are its own or not.
        last = (await metadata_of(one, ticket(plan, 0, 0, 1, stage_key()), [METRICS]))[-1]
        told = plan_pb2.FlightAppMetadata.FromString(last).metrics_collection.tasks
        below = [task.metrics for task in told if task.stage_key.query_id == query.bytes]
        assert [len(metrics) for metrics in below] == [nodes_of_all] * len(tasks)
        of_unions = [metric for metrics in below for metric in metrics[0].metrics]
        assert sum(metric.output_rows.value for metric in of_unions) == session.sql(whole).count()
        assert not {metric.WhichOneof("value") for metric in of_unions} & {"count", "gauge", "time"}


async def test_an_error_of_an_upstream_arrives_as_it_is_and_once(session: SessionContext) -> None:
    refusals = []

    async def refuse(ctx: WorkerQueryContext) -> SessionContext:
        if ctx.stage_key is not None and ctx.stage_key.stage_id == 1:
            refusals.append(ctx.headers["authorization"])
            raise PermissionDenied("nobody reads this")
        return ctx.builder.build()

    async with running_worker(refuse) as one, running_worker(refuse) as other:
        plan = _sums(session, [url(other), url(other)])
        async with stub(one.address) as service:
            call = service.DoGet(Flight_pb2.Ticket(ticket=ticket(plan)), metadata=[("authorization", "me")])
            assert await status(call) == (grpc.StatusCode.PERMISSION_DENIED, "nobody reads this")
        assert set(refusals) == {"me"}
        await until(lambda: other.worker.statistics().requests == 0)
        assert one.worker.statistics().tasks == 0


async def test_an_upstream_that_is_not_there_is_named(session: SessionContext) -> None:
    async with _two() as (one, other):
        dead = url(other)
        await other.worker.close()
        plan = _sums(session, ["http://127.0.0.1:1", url(one)])
        code, text = await _status(one, ticket(plan))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert text.startswith("worker http://127.0.0.1:1 is not available: ")
        assert text.count("not available") == 1

        code, text = await _status(one, ticket(_sums(session, [url(one), dead])))
        assert (code, text) == (grpc.StatusCode.UNAVAILABLE, f"worker {dead} is not available: the worker was closed")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda stage: setattr(stage, "query_id", b"short"), "with an id of 5 bytes"),
        (lambda stage: stage.ClearField("tasks"), "reads 6 partitions from 0 tasks"),
        (lambda stage: stage.tasks[0].ClearField("url_str"), "is to be read from ''"),
        (lambda stage: stage.ClearField("plan_proto"), "the ticket has no plan"),
    ],
)
async def test_a_stage_that_makes_no_sense_is_refused(session: SessionContext, change: object, text: str) -> None:
    async with _two() as (one, other):
        network = _sums(session, [url(other), url(other)]).merge.input
        encoded = nodes_pb2.Encoded.FromString(network.extension.node)
        node = nodes_pb2.Node.FromString(encoded.blob)
        change(node.coalesce.input_stage)  # type: ignore[operator]
        code, told = await _status(one, ticket(distributed(node)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text in told


async def test_a_partition_that_the_upstream_does_not_have_is_an_error(session: SessionContext) -> None:
    async with _two() as (one, other):
        below = _planned(session, "SELECT v FROM t")
        plan = coalesced(pa.schema([("v", pa.int64())]), FILES + 1, stage(1, below, [url(other)]))
        assert await _status(one, ticket(plan)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"partition {FILES} not available: the plan has {FILES}",
        )


async def test_nothing_is_left_of_a_cancelled_read(session: SessionContext, tmp_path: Path) -> None:
    """One input is large and has come, the other hangs in a session builder."""
    spill = tmp_path / "spill"
    spill.mkdir()
    hanging, ended = asyncio.Event(), asyncio.Event()

    async def hang(ctx: WorkerQueryContext) -> SessionContext:
        if ctx.stage_key is not None and ctx.stage_key.stage_id == 7:
            hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
        return ctx.builder.build()

    query = "SELECT k || repeat('y', 4000) AS k FROM t"
    schema = session.sql(query).to_arrow_table().schema
    settings = Settings(spill_folder=spill)
    async with running_worker(settings=settings) as one, running_worker(hang) as other:
        below = _planned(session, query)
        plan = PhysicalPlanNode()
        for number in (1, 7):
            read = coalesced(schema, FILES, stage(number, below, [url(other)]))
            plan.union.inputs.add().CopyFrom(read)
        async with stub(one.address) as service:
            call = service.DoGet(Flight_pb2.Ticket(ticket=ticket(plan, key=stage_key())))
            await hanging.wait()
            await until(lambda: other.worker.statistics().rows_sent == FILES * ROWS)
            await until(lambda: bool(list(spill.glob("*/*/*"))))
            call.cancel()
            await ended.wait()
            await until(lambda: one.worker.statistics().requests == other.worker.statistics().requests == 0)
            await until(lambda: not list(spill.glob("*/*/*")))
            assert one.worker.statistics().streams == 0
    assert not list(spill.iterdir())


async def test_input_that_comes_after_the_task_has_ended_is_deleted_too(
    session: SessionContext, tmp_path: Path
) -> None:
    """Who fetches learns of the end last."""
    spill = tmp_path / "spill"
    spill.mkdir()
    ended = asyncio.Event()

    async def wait(ctx: WorkerQueryContext) -> SessionContext:
        await ended.wait()
        return ctx.builder.build()

    query = "SELECT k || repeat('y', 4000) AS k FROM t"
    async with running_worker(settings=Settings(spill_folder=spill)) as one, running_worker(wait) as other:
        below = stage(1, _planned(session, query), [url(other)])
        asked = PlanTicket.from_bytes(ticket(coalesced(session.sql(query).to_arrow_table().schema, FILES, below)))
        read = one.worker._exchange.rewrite(asked, Headers(()))(SessionContext(), plan_proto.parse(asked.plan))
        fetching = asyncio.ensure_future(read.fetch())
        await until(lambda: other.worker.statistics().requests > 0)
        closing = asyncio.ensure_future(read.close())
        await asyncio.wait((closing,), timeout=0.1)
        ended.set()
        await asyncio.wait((fetching, closing))
        assert other.worker.statistics().rows_sent == FILES * ROWS
        assert not list(spill.rglob("*.arrow"))


async def test_a_read_that_failed_is_done_anew_by_the_next_to_ask(session: SessionContext) -> None:
    refuses = True

    async def refuse(ctx: WorkerQueryContext) -> SessionContext:
        if refuses:
            raise PermissionDenied("not yet")
        return ctx.builder.build()

    async with running_worker() as one, running_worker(refuse) as other:
        plan = _sums(session, [url(other), url(other)]).merge.input
        key = stage_key()
        part = partial(ticket, plan, index=0, count=1, key=key)
        assert await _status(one, part(0)) == (grpc.StatusCode.PERMISSION_DENIED, "not yet")
        refuses = False
        tables = await fetch(one, [part(partition) for partition in range(6)])
        assert _rows(pa.concat_tables(tables)) == _rows(session.sql(SUMS).to_arrow_table())


async def test_a_cancelled_partition_does_not_end_the_input_of_the_others(session: SessionContext) -> None:
    go, asked = asyncio.Event(), asyncio.Event()

    async def wait(ctx: WorkerQueryContext) -> SessionContext:
        asked.set()
        await go.wait()
        return ctx.builder.build()

    async with running_worker() as one, running_worker(wait) as other, stub(one.address) as service:
        plan = _sums(session, [url(other), url(other)]).merge.input
        key = stage_key()
        cancelled = service.DoGet(Flight_pb2.Ticket(ticket=ticket(plan, 0, 0, 1, key)))
        others = asyncio.ensure_future(fetch(one, [ticket(plan, partition, 0, 1, key) for partition in range(1, 6)]))
        await asked.wait()
        await until(lambda: one.worker.statistics().requests == 6)
        cancelled.cancel()
        await until(lambda: one.worker.statistics().requests == 5)
        go.set()
        tables = await others
        # Its partition is executed again, on another instance.
        tables += await fetch(one, [ticket(plan, 0, 0, 1, key)])
        assert _rows(pa.concat_tables(tables)) == _rows(session.sql(SUMS).to_arrow_table())


async def test_a_stage_key_stands_for_one_task(session: SessionContext) -> None:
    plan = isolated(_planned(session, "SELECT v FROM t"), 2)
    async with running_worker() as worker:
        key = stage_key()
        await fetch_one(worker, ticket(plan, 0, 0, 2, key))
        code, text = await _status(worker, ticket(plan, 0, 1, 2, key))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "already stands for task 0 of 2, this is 1 of 2" in text


def _extension(node: bytes) -> Message:
    plan = PhysicalPlanNode()
    plan.extension.node = node
    return plan


ISOLATOR = nodes_pb2.Node(partition_isolator=nodes_pb2.PartitionIsolator(n_tasks=2)).SerializeToString()


@pytest.mark.parametrize(
    "node",
    [
        b"",
        b"anything at all",
        nodes_pb2.Encoded(blob=b"anything").SerializeToString(),
        nodes_pb2.Encoded(blob=b"").SerializeToString(),
        # A node that nobody here knows, and ours with a field that it does not have.
        nodes_pb2.Encoded(blob=b"\x7a\x00").SerializeToString(),
        nodes_pb2.Encoded(blob=ISOLATOR + b"\x7a\x00").SerializeToString(),
        nodes_pb2.Encoded(blob=ISOLATOR).SerializeToString() + b"\x1a\x00",
    ],
)
@pytest.mark.parametrize("is_coordinated", [True, False])
def test_nodes_of_other_codecs_stay_as_they_are(node: bytes, is_coordinated: bool) -> None:
    plan = _extension(node)
    assert parse_in_ticket(plan, is_coordinated=is_coordinated) is None
    assert plan.extension.node == node


def test_what_a_coordinator_has_wrapped_is_unwrapped() -> None:
    wrapped = nodes_pb2.Encoded(encoder_position=1, blob=ISOLATOR).SerializeToString()
    plan = _extension(wrapped)
    assert parse_in_ticket(plan, is_coordinated=False) is None
    assert plan.extension.node == wrapped
    assert parse_in_ticket(plan, is_coordinated=True) is None
    assert plan.extension.node == ISOLATOR


@pytest.mark.parametrize("kind", ["network_broadcast", "broadcast", "sampler"])
def test_nodes_of_later_coordinators_are_refused_by_name(kind: str) -> None:
    node = nodes_pb2.Node()
    getattr(node, kind).SetInParent()
    with pytest.raises(InvalidPlan, match=f"the plan has a {kind} node, which is not for plans in tickets"):
        flight_rewrite.rewrite(distributed(node), Place(0, 1), lambda _: 1, is_coordinated=True)


def test_a_coalesce_node_is_for_the_first_task() -> None:
    node = nodes_pb2.Node()
    node.coalesce.SetInParent()
    with pytest.raises(InvalidPlan, match="so task 1 can have none"):
        flight_rewrite.rewrite(distributed(node), Place(1, 2), lambda _: 1, is_coordinated=True)
