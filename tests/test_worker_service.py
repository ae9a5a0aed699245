"""The WorkerService, as coordinators and other workers see it on the wire."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import SessionConfig, SessionContext, udf
from support import read_messages, status, until
from worker_service import (
    CONFIG,
    INVALID,
    NONE,
    NUMBERS,
    Head,
    all_values,
    coordinated,
    execute_request,
    files,
    hashed,
    messages,
    plan_of,
    read,
    refusal,
    refused_read,
    repartition,
    service,
    task_key,
    values,
)

from worker import PermissionDenied, Settings, WorkerQueryContext, plan_proto
from worker.cluster import tasks
from worker.cluster.nodes import parse
from worker.message import Message
from worker.proto import nodes_pb2, worker_pb2
from worker.testing import running_worker


def endless() -> bytes:
    """A plan of one partition that does not end."""
    return SessionContext().sql("SELECT value AS x FROM generate_series(1, 1000000000000)").execution_plan().to_bytes()


async def test_a_task_that_is_asked_for_before_its_plan_has_come_is_waited_for() -> None:
    asked = asyncio.Event()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        asked.set()
        return ctx.builder.build()

    async with running_worker(build) as running:
        key = task_key()
        reading = asyncio.ensure_future(read(running, key, range(2)))
        await asked.wait()
        async with coordinated(running, plan_of([1, 2], [3]), key=key):
            tables = await reading
        assert [values(tables[partition]) for partition in (0, 1)] == [[1, 2], [3]]


async def test_a_plan_that_does_not_come_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.PLAN_SECONDS == 10
    monkeypatch.setattr(tasks, "PLAN_SECONDS", 0.01)
    async with running_worker() as running:
        code, text = await refused_read(running, task_key(7))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert text.startswith("no plan has been set for task ")
        assert running.worker.statistics().tasks == 0


async def test_the_version_is_what_the_settings_or_the_worker_say() -> None:
    request = worker_pb2.GetWorkerInfoRequest()
    async with running_worker() as running, service(running) as client:
        assert (await client.GetWorkerInfo(request)).version == ""
        running.worker.with_version("second")
        assert (await client.GetWorkerInfo(request)).version == "second"
    async with running_worker(settings=Settings(version="first")) as running, service(running) as client:
        assert (await client.GetWorkerInfo(request)).version == "first"


async def test_without_a_head_partitions_are_the_plans_own() -> None:
    async with running_worker() as running, coordinated(running, plan_of([1, 2], [], [3])) as task:
        tables = await task.read(range(1, 3)) | await task.read(range(1))
        assert [values(tables[partition]) for partition in range(3)] == [[1, 2], [], [3]]
        assert {table.schema for table in tables.values()} == {NUMBERS}


@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("method", ["hash", "round_robin"])
async def test_a_repartitioned_task_has_all_rows_once(method: str, partitions: int) -> None:
    rows = list(range(100))
    partitioning = hashed(0, partitions) if method == "hash" else plan_proto.Partitioning(round_robin=partitions)
    async with running_worker() as running, coordinated(running, plan_of(rows[:50], rows[50:] * 2)) as task:
        first = await task.read(range(partitions // 2), repartition(partitioning)) if partitions > 1 else {}
        tables = first | await task.read(range(partitions // 2, partitions), repartition(partitioning))
    found = [values(tables[partition]) for partition in range(partitions)]
    assert all_values(tables.values()) == sorted([*rows, *rows[50:]])
    # By the hash, equal rows are in one place. In turn, each gets whole batches.
    if method == "hash":
        assert all(found)
        assert sum(len(set(each)) for each in found) == len(rows)
    else:
        assert sum(map(bool, found)) == min(2, partitions)


async def test_a_broadcast_task_sends_each_partition_to_all_and_computes_it_once() -> None:
    called: Counter[int] = Counter()

    def seen(column: pa.Array) -> pa.Array:
        called.update(column.to_pylist())
        return column

    function = udf(seen, [pa.int64()], pa.int64(), "volatile", "seen")
    session = SessionContext()
    session.register_udf(function)
    session.register_record_batches("t", [[pa.record_batch({"x": [1, 2]})], [pa.record_batch({"x": [3]})]])
    plan = session.sql("SELECT seen(x) AS x FROM t").execution_plan().to_bytes()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_scalar_functions([function]).build()

    head = worker_pb2.BroadcastExecHead(output_partitions=6)
    async with running_worker(build) as running, coordinated(running, plan) as task:
        assert running.worker.statistics().plans_decoded == 0
        parts = await asyncio.gather(*(task.read(range(first, first + 2), head) for first in (0, 2, 4)))
        tables = parts[0] | parts[1] | parts[2]
        assert [values(tables[partition]) for partition in range(6)] == [[1, 2], [3]] * 3
        assert called == {1: 1, 2: 1, 3: 1}
        assert running.worker.statistics().plans_decoded == 1
        code, text = await refused_read(running, task.key, range(6, 7), head)
        assert (code, text) == (INVALID, "partitions 6 to 7 were asked for of a task that has 6")


async def test_messages_say_which_partition_they_are_of_and_when_they_were_made() -> None:
    async with running_worker() as running, coordinated(running, plan_of([1], [], [2])) as task:
        before = time.time_ns()
        sent = await messages(running, task.key, range(3))
        after = time.time_ns()
        for partition, of_partition in sent.items():
            assert len(of_partition) == (1 if partition == 1 else 2)
            for data in of_partition:
                about = worker_pb2.FlightAppMetadata.FromString(data.app_metadata)
                assert about.partition == partition
                assert before <= about.created_timestamp_unix_nanos <= after


async def test_a_task_without_rows_has_a_schema_for_every_partition() -> None:
    async with running_worker() as running, coordinated(running, plan_of([], [])) as task:
        tables = await task.read(range(2))
        assert [(table.num_rows, table.schema) for table in tables.values()] == [(0, NUMBERS)] * 2


# How a frame of either begins.
MAGIC = {"lz4": b"\x04\x22\x4d\x18", "zstd": b"\x28\xb5\x2f\xfd"}


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", None])
async def test_bodies_are_compressed_as_the_coordinator_says(compression: str | None) -> None:
    metadata = [(f"{CONFIG}distributed.compression", compression)] if compression else []
    plan = plan_of(range(10_000))
    async with running_worker() as running, coordinated(running, plan, metadata=metadata) as task:
        # What the reader says does not count.
        (sent,) = (await messages(running, task.key, range(1))).values()
    body = b"".join(data.data_body for data in sent)
    assert {name for name, magic in MAGIC.items() if magic in body} == {compression or "lz4"} - {"none"}
    assert (len(body) < 60_000) == (compression != "none")
    table = read_messages(Message(data.data_header, [data.data_body]) for data in sent)
    assert values(table) == list(range(10_000))


def scan(folder: Path, rows: int = 100) -> bytes:
    """A plan that reads a file, in batches of as many rows as the session says."""
    pq.write_table(pa.table({"x": pa.array(range(rows), pa.int64())}), folder / "t.parquet")
    session = SessionContext(SessionConfig().with_target_partitions(1))
    session.register_parquet("t", folder / "t.parquet")
    return session.sql("SELECT x FROM t").execution_plan().to_bytes()


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, 1),
        ({"distributed.shuffle_batch_size": "0"}, 1),
        ({"distributed.shuffle_batch_size": "10"}, 10),
        ({"datafusion.execution.batch_size": "20"}, 5),
        ({"datafusion.execution.batch_size": "20", "distributed.shuffle_batch_size": "0"}, 5),
        ({"datafusion.execution.batch_size": "20", "distributed.shuffle_batch_size": "10"}, 10),
    ],
    ids=str,
)
async def test_batches_have_as_many_rows_as_the_coordinator_says(
    tmp_path: Path, settings: dict[str, str], batches: int
) -> None:
    metadata = [(CONFIG + name, value) for name, value in settings.items()]
    async with running_worker() as running, coordinated(running, scan(tmp_path), metadata=metadata) as task:
        tables = await task.read(range(1))
        assert values(tables[0]) == list(range(100))
        (scanned,) = await task.figures()
    (found,) = (metric.output_batches.value for metric in scanned.metrics if metric.HasField("output_batches"))
    assert found == batches


async def test_options_are_applied_as_far_as_datafusion_has_them_and_all_are_seen_by_the_session_builder() -> None:
    sent = {
        "datafusion.execution.time_zone": "+05:00",
        "datafusion.execution.of_another_version": "1",
        "distributed.of_another_version": "2",
        "mine.option": "3",
    }
    seen: list[dict[str, object]] = []
    zones: list[object] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append({name.removeprefix(CONFIG): ctx.headers[name] for name in ctx.headers if CONFIG in name})
        session = ctx.builder.with_config_option("datafusion.catalog.information_schema", True).build()
        query = "SELECT value FROM information_schema.df_settings WHERE name = 'datafusion.execution.time_zone'"
        zones.extend(session.sql(query).to_pydict()["value"])
        return session

    metadata = [(CONFIG + name, value) for name, value in sent.items()]
    async with running_worker(build) as running, coordinated(running, plan_of([1]), metadata=metadata):
        assert seen == [sent]
        assert zones == ["+05:00"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("datafusion.execution.batch_size", "many"),
        ("distributed.compression", "gzip"),
        ("distributed.collect_metrics", "perhaps"),
        ("distributed.shuffle_batch_size", "-1"),
        ("distributed.worker_connection_buffer_budget_bytes", "1MB"),
    ],
)
async def test_a_setting_of_no_sense_is_refused_by_name(name: str, value: str) -> None:
    async with running_worker() as running:
        code, text = await refusal(running, plan_of([1]), metadata=[(CONFIG + name, value)])
        assert code is INVALID
        assert text.startswith(f"header '{CONFIG}{name}' is '{value}': ")
        assert running.worker.statistics().tasks == 0


@pytest.mark.parametrize("collect", ["true", "false", None])
async def test_figures_come_last_unless_the_coordinator_does_not_want_them(collect: str | None) -> None:
    metadata = [(f"{CONFIG}distributed.collect_metrics", collect)] if collect else []
    async with running_worker() as running, coordinated(running, plan_of([1]), metadata=metadata) as task:
        await task.read(range(1))
        last = [message.WhichOneof("inner") for message in await task.end()]
        assert last == ([] if collect == "false" else ["task_metrics"])
        assert running.worker.statistics().tasks == 0


async def test_the_figures_of_the_task_are_times_since_the_query_began() -> None:
    start = time.time_ns()
    async with running_worker() as running:
        async with coordinated(running, plan_of([1]), query_start_time_ns=start) as task:
            await task.read(range(1))
            (last,) = await task.end()
        took = time.time_ns() - start
    times = [metric.custom_max_latency for metric in last.task_metrics.task_metrics.metrics]
    assert [figure.name for figure in times] == ["plan_added_at", "plan_executed_at", "plan_finished_at"]
    added, executed, finished = (figure.value for figure in times)
    assert 0 < added < executed < finished < took


async def test_nodes_that_are_fed_while_they_run_are_refused() -> None:
    declaration = worker_pb2.SetPlanRequest.WorkUnitFeedDeclaration(id=task_key().query_id, partitions=1)
    async with running_worker() as running:
        key = task_key()
        code, text = await refusal(running, plan_of([1]), key=key, work_unit_feed_declarations=[declaration])
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text.startswith("1 nodes of the plan are fed with work units, which this worker has no nodes for")
        # Whoever reads the task is told as well, and need not wait.
        assert await refused_read(running, key) == (code, text)


async def test_work_units_that_no_plan_needs_are_read_and_left() -> None:
    async with running_worker() as running, coordinated(running, plan_of([1])) as task:
        await task.call.write(worker_pb2.CoordinatorToWorkerMsg(work_unit_batch=worker_pb2.WorkUnitBatch()))
        await task.call.write(worker_pb2.CoordinatorToWorkerMsg(work_unit_eos=True))
        assert values((await task.read(range(1)))[0]) == [1]
        assert len(await task.end()) == 1


def extension(node: nodes_pb2.Encoded | bytes) -> plan_proto.Message:
    """A plan of a node that DataFusion does not know."""
    plan = plan_proto.PhysicalPlanNode()
    plan.extension.node = node if isinstance(node, bytes) else node.SerializeToString()
    return plan


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            nodes_pb2.Encoded(blob=b"\x4a\x00"),
            "a node that this worker does not know: number 9 of Distributed DataFusion's",
        ),
        (nodes_pb2.Encoded(), "a node that this worker does not know: one without content"),
        (b"rubbish", "an extension node of the plan is not encoded as Distributed DataFusion does"),
        (
            nodes_pb2.Encoded(
                blob=nodes_pb2.Node(partition_isolator=nodes_pb2.PartitionIsolator(n_tasks=1)).SerializeToString()
            ),
            "the plan has a partition_isolator node, which coordinators of DataFusion 55 do not make",
        ),
        (
            nodes_pb2.Encoded(blob=nodes_pb2.Node(sampler=nodes_pb2.Sampler()).SerializeToString()),
            "a sampler node has 0 inputs: it must have one",
        ),
        (
            nodes_pb2.Encoded(
                blob=nodes_pb2.Node(shuffle=nodes_pb2.Network(partitioning=b"rubbish")).SerializeToString()
            ),
            "7 bytes of the plan are not a datafusion.Partitioning",
        ),
    ],
    ids=["unknown", "empty", "rubbish", "of old", "no input", "no partitioning"],
)
async def test_a_node_that_nobody_knows_is_refused_by_name(node: nodes_pb2.Encoded | bytes, text: str) -> None:
    async with running_worker() as running:
        code, told = await refusal(running, extension(node))
        assert code is INVALID
        assert text in told


async def test_a_node_of_a_users_codec_goes_to_the_sessions_codecs() -> None:
    plan = extension(nodes_pb2.Encoded(encoder_position=1, blob=b"a node of mine"))
    async with running_worker() as running, coordinated(running, plan) as task:
        code, text = await refused_read(running, task.key)
        assert code is INVALID
        assert "PhysicalExtensionCodec" in text
    # It gets what it has written, without what the composed codec put around it.
    assert parse(plan) is None
    assert plan.extension.node == b"a node of mine"


async def test_a_plan_is_set_once_for_a_key() -> None:
    async with running_worker() as running, coordinated(running, plan_of([1])) as task:
        code, text = await refusal(running, plan_of([2]), key=task.key)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text.endswith(" has been set already")
        assert values((await task.read(range(1)))[0]) == [1]


async def test_a_plan_is_set_by_the_first_message_alone() -> None:
    async with running_worker() as running:
        async with service(running) as client:
            call = client.CoordinatorChannel(iter([worker_pb2.CoordinatorToWorkerMsg(work_unit_eos=True)]))
            refused = (INVALID, "the first message of a CoordinatorChannel must be a set_plan_request")
            assert await status(call) == refused
            assert await status(client.CoordinatorChannel(iter([]))) == refused
        async with coordinated(running, plan_of([1])) as task:
            again = worker_pb2.CoordinatorToWorkerMsg(set_plan_request=worker_pb2.SetPlanRequest(task_key=task.key))
            await task.call.write(again)
            with pytest.raises(grpc.aio.AioRpcError, match="sets one plan, with its first message"):
                await task.end()
        assert running.worker.statistics().tasks == 0


@pytest.mark.parametrize("head", [NONE, worker_pb2.BroadcastExecHead(output_partitions=2)], ids=["none", "broadcast"])
@pytest.mark.parametrize("partitions", [range(2, 3), range(3), range(1, 1), range(2, 1), range(2**64 - 1)], ids=str)
async def test_partitions_that_a_task_does_not_have_are_refused(head: Head, partitions: range) -> None:
    async with running_worker() as running, coordinated(running, plan_of([1], [2])) as task:
        assert await refused_read(running, task.key, partitions, head) == (
            INVALID,
            f"partitions {partitions.start} to {partitions.stop} were asked for of a task that has 2",
        )
        tables = await task.read(range(2), head)
        assert [values(table) for table in tables.values()] == [[1], [2]]


@pytest.mark.parametrize("head", [NONE, worker_pb2.BroadcastExecHead(output_partitions=2)], ids=["none", "broadcast"])
async def test_a_partition_is_read_once(head: Head) -> None:
    async with running_worker() as running, coordinated(running, plan_of([1], [2])) as task:
        await task.read(range(1), head)
        assert await refused_read(running, task.key, range(2), head) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "partition 0 was asked for before: each can be read once",
        )
        assert values((await task.read(range(1, 2), head))[1]) == [2]


async def test_the_head_of_a_task_is_that_of_its_first_request() -> None:
    heads: list[Head] = [worker_pb2.BroadcastExecHead(output_partitions=4), NONE, repartition(hashed(0, 3))]
    async with running_worker() as running:
        for first, partitions, rows in zip(heads, (4, 2, 3), ([1, 1, 2, 2], [1, 2], [1, 2]), strict=True):
            for other in heads:
                async with coordinated(running, plan_of([1], [2])) as task:
                    tables = await task.read(range(1), first) | await task.read(range(1, partitions), other)
                    assert all_values(tables.values()) == rows


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (None, "the request has no producer_head: none, broadcast or repartition is right"),
        (worker_pb2.RepartitionExecHead(), "the task's head has no partitioning: it must be a datafusion.Partitioning"),
        (
            worker_pb2.RepartitionExecHead(partitioning=b"rubbish"),
            "7 bytes of the plan are not a datafusion.Partitioning",
        ),
        (worker_pb2.BroadcastExecHead(), "partitions 0 to 1 were asked for of a task that has 0"),
        (repartition(plan_proto.Partitioning(round_robin=0)), "partitions 0 to 1 were asked for of a task that has 0"),
    ],
    ids=["missing", "empty", "rubbish", "broadcast to nobody", "into nothing"],
)
async def test_a_head_that_makes_no_sense_is_refused(head: Head | None, text: str) -> None:
    async with running_worker() as running, coordinated(running, plan_of([1])) as task:
        code, told = await refused_read(running, task.key, head=head)
        assert code is INVALID
        assert told.startswith(text)


async def test_keys_that_make_no_sense_are_refused() -> None:
    async with running_worker() as running:
        short = worker_pb2.TaskKey(query_id=b"abc")
        refused = (INVALID, "the task key's query_id has 3 bytes: a UUID of 16 is right")
        assert await refusal(running, plan_of([1]), key=short) == refused
        assert await refused_read(running, short) == refused
        for number, count in ((2, 2), (0, 0)):
            assert await refusal(running, plan_of([1]), key=task_key(number), task_count=count) == (
                INVALID,
                f"task {number} is none of a stage of {count} tasks",
            )


async def test_the_session_builder_is_awaited_for_every_read_and_may_refuse_it() -> None:
    seen: list[tuple[object, int, int, int]] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        await asyncio.sleep(0)
        assert ctx.stage_key is not None
        seen.append((ctx.headers.get("x-user"), ctx.stage_key.stage_id, ctx.task_index, ctx.task_count))
        if ctx.headers.get("x-user") == "bob":
            raise PermissionDenied("bob may not")
        return ctx.builder.build()

    key = task_key(1, stage=5)
    ada, bob = (("x-user", "ada"),), (("x-user", "bob"),)
    async with running_worker(build) as running:
        async with coordinated(running, plan_of([1], [2]), key=key, task_count=3, metadata=ada) as task:
            await task.read(range(1), metadata=ada)
            refused = (grpc.StatusCode.PERMISSION_DENIED, "bob may not")
            assert await refused_read(running, key, range(1, 2), metadata=bob) == refused
            await task.read(range(1, 2), metadata=ada)
        assert await refusal(running, plan_of([1]), metadata=bob) == refused
    asked = [("ada", 5, 1, 3), ("ada", 5, 1, 0), ("bob", 5, 1, 0), ("ada", 5, 1, 0), ("bob", 1, 0, 1)]
    assert seen == asked


async def test_a_task_is_found_by_its_own_authorization_and_without_any_by_its_key() -> None:
    own, other = (("authorization", "mine"),), (("authorization", "another"),)
    async with running_worker() as running, coordinated(running, plan_of([1], [2]), metadata=own) as task:
        code, text = await refused_read(running, task.key, metadata=other)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert text.startswith("no plan has been set for task ")
        assert values((await task.read(range(1), metadata=own))[0]) == [1]
        assert values((await task.read(range(1, 2)))[1]) == [2]


@pytest.mark.parametrize("head", [NONE, worker_pb2.BroadcastExecHead(output_partitions=1)], ids=["none", "broadcast"])
async def test_a_cancelled_coordinator_ends_whoever_reads_the_task(head: Head, tmp_path: Path) -> None:
    settings = Settings(spill_folder=tmp_path)
    async with (
        running_worker(settings=settings) as running,
        service(running) as client,
        coordinated(running, endless()) as task,
    ):
        reading = client.ExecuteTask(execute_request(task.key, range(1), head))
        await anext(aiter(reading))
        assert running.worker.statistics().streams == 1
        task.call.cancel()
        ended = await asyncio.wait_for(status(reading), 2)
        assert ended == (grpc.StatusCode.CANCELLED, "the coordinator ended the query")
        held = running.worker.statistics
        await until(lambda: not (held().requests + held().tasks + held().streams))
        assert files(tmp_path) == {"lock"}


async def test_a_reader_that_goes_away_leaves_the_task_for_others() -> None:
    async with running_worker() as running, service(running) as client:
        plan = plan_proto.PhysicalPlanNode()
        for part in (endless(), plan_of([7])):
            plan.union.inputs.add().CopyFrom(plan_proto.parse(part))
        async with coordinated(running, plan) as task:
            reading = client.ExecuteTask(execute_request(task.key, range(1)))
            await anext(aiter(reading))
            reading.cancel()
            await until(lambda: running.worker.statistics().streams == 0)
            assert values((await task.read(range(1, 2)))[1]) == [7]
