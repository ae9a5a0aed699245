"""What comes from coordinators and workers that are broken, or mean harm: each is told, and the worker goes on."""

import asyncio
import itertools
import socket
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext
from flight_plans import distributed
from support import status, until

from worker import plan_proto
from worker.cluster.channels import Channels
from worker.cluster.merge import Replay, interleaved
from worker.encoding.encode import Encoder
from worker.errors import QueryEnded
from worker.message import Message as IpcMessage
from worker.plan import schema_message
from worker.plan_proto import Message, Partitioning, PhysicalPlanNode
from worker.proto import nodes_pb2, worker_pb2, worker_pb2_grpc
from worker.testing import RunningWorker, running_worker

MANY = 1 << 40
SECONDS = 5

SCHEMA = pa.schema({"number": pa.int64()})

Coordinating = grpc.aio.StreamStreamCall[worker_pb2.CoordinatorToWorkerMsg, worker_pb2.WorkerToCoordinatorMsg]
Stub = worker_pb2_grpc.WorkerServiceStub


@asynccontextmanager
async def connected(running: RunningWorker) -> AsyncIterator[Stub]:
    async with asyncio.timeout(4 * SECONDS), grpc.aio.insecure_channel(running.address) as channel:
        yield Stub(channel)


def key(query: uuid.UUID, stage: int = 1) -> worker_pb2.TaskKey:
    return worker_pb2.TaskKey(query_id=query.bytes, stage_id=stage, task_number=0)


async def set_plan(
    service: Stub, plan: Message, query: uuid.UUID, *, metadata: tuple[tuple[str, str], ...] = (), url: str = ""
) -> Coordinating:
    """A coordinator that has sent its plan."""
    request = worker_pb2.SetPlanRequest(
        task_key=key(query), task_count=1, plan_proto=plan.SerializeToString(), target_worker_url=url
    )
    call: Coordinating = service.CoordinatorChannel(metadata=metadata)
    await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=request))
    return call


async def refusal(service: Stub, plan: Message, metadata: tuple[tuple[str, str], ...] = ()) -> tuple[str, str]:
    """What a coordinator is told whose plan is refused."""
    code, details = await status(await set_plan(service, plan, uuid.uuid4(), metadata=metadata))
    return code.name, details


def read(service: Stub, query: uuid.UUID, head: Message = None, end: int = 1) -> grpc.aio.UnaryStreamCall:  # type: ignore[type-arg]
    """A reader of a task's first partitions."""
    request = worker_pb2.ExecuteTaskRequest(task_key=key(query), target_partition_end=end)
    match head:
        case worker_pb2.RepartitionExecHead():
            request.repartition.CopyFrom(head)
        case worker_pb2.BroadcastExecHead():
            request.broadcast.CopyFrom(head)
        case _:
            request.none.SetInParent()
    return service.ExecuteTask(request)


def numbers() -> Message:
    """A plan of three rows in a partition."""
    batch = pa.RecordBatch.from_pydict({"number": [1, 2, 3]}, schema=SCHEMA)
    return plan_proto.parse(SessionContext().create_dataframe([[batch]]).execution_plan().to_bytes())


def merged(below: Message) -> Message:
    plan = PhysicalPlanNode()
    plan.merge.input.CopyFrom(below)
    return plan


def network(
    urls: list[str], query: uuid.UUID, partitioning: bytes | None = None, schema: bytes | None = None
) -> Message:
    """A plan that reads a task of stage 2 of each worker."""
    node = nodes_pb2.Network(
        schema=schema_message(SCHEMA).SerializeToString() if schema is None else schema,
        partitioning=Partitioning(unknown=1).SerializeToString() if partitioning is None else partitioning,
        input_stage=nodes_pb2.Stage(query_id=query.bytes, num=2, tasks=[nodes_pb2.Task(url_str=url) for url in urls]),
    )
    return distributed(nodes_pb2.Node(shuffle=node))


HEADS = {
    "a broadcast": worker_pb2.BroadcastExecHead(output_partitions=MANY),
    "a repartition": worker_pb2.RepartitionExecHead(partitioning=Partitioning(round_robin=MANY).SerializeToString()),
}


@pytest.mark.parametrize("head", HEADS)
async def test_heads_with_more_partitions_than_can_be_are_refused(head: str) -> None:
    query = uuid.uuid4()
    async with running_worker() as running, connected(running) as service:
        call = await set_plan(service, numbers(), query)
        assert await status(read(service, query, HEADS[head], MANY)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the plan's repartition has {MANY} partitions: max_plan_partitions is 65536",
        )
        # The first who asks decides on the head: not if it was refused.
        assert await status(read(service, query)) == (grpc.StatusCode.OK, "")
        call.cancel()


async def test_heads_are_checked_with_the_plan_below() -> None:
    """Each partition below sends to each of the head's: 600 times 600 is more than 262,144."""
    query = uuid.uuid4()
    plan = PhysicalPlanNode()
    plan.empty.schema.CopyFrom(schema_message(SCHEMA))
    plan.empty.partitions = 600
    async with running_worker() as running, connected(running) as service:
        call = await set_plan(service, merged(plan), query)
        head = worker_pb2.RepartitionExecHead(partitioning=Partitioning(round_robin=600).SerializeToString())
        assert await status(read(service, query, head)) == (grpc.StatusCode.OK, "")
        call.cancel()

        query = uuid.uuid4()
        call = await set_plan(service, plan, query)
        assert await status(read(service, query, head)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the plan has 360000 channels from partition to partition: max_plan_channels is 262144",
        )
        nul = Partitioning()
        nul.hash.partition_count = 1
        nul.hash.hash_expr.add().literal.null_value.TIMESTAMP.timezone = "\0"
        head = worker_pb2.RepartitionExecHead(partitioning=nul.SerializeToString())
        code, details = await status(read(service, query, head))
        assert (code, details[:45]) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "the plan's repartition has the time zone '\\x0",
        )
        call.cancel()


async def test_what_network_nodes_have_is_checked() -> None:
    """Their bytes are none of DataFusion's, until they are put into its plan."""
    schema = schema_message(SCHEMA)
    schema.columns[0].arrow_type.FIXED_SIZE_LIST.list_size = (1 << 31) - 1
    schema.columns[0].arrow_type.FIXED_SIZE_LIST.field_type.arrow_type.INT64.SetInParent()
    leaf = network(["http://other"], uuid.uuid4(), schema=schema.SerializeToString())
    async with running_worker() as running, connected(running) as service:
        code, details = await refusal(service, merged(leaf))
        assert code == "RESOURCE_EXHAUSTED"
        assert details.startswith("the plan's empty has a type whose nulls take 17179869176 bytes: max_plan_value_size")
        nul = Partitioning()
        nul.hash.partition_count = 1
        nul.hash.hash_expr.add().literal.null_value.TIMESTAMP.timezone = "\0"
        code, details = await refusal(service, merged(network(["http://other"], uuid.uuid4(), nul.SerializeToString())))
        assert (code, details[:45]) == ("INVALID_ARGUMENT", "the plan's repartition has the time zone '\\x0")
        many = network(["http://other"], uuid.uuid4(), Partitioning(unknown=1 << 10).SerializeToString())
        plan = PhysicalPlanNode()
        plan.merge.input.repartition.partitioning.round_robin = 1 << 10
        plan.merge.input.repartition.input.CopyFrom(many)
        assert await refusal(service, plan) == (
            "RESOURCE_EXHAUSTED",
            "the plan has 1048576 channels from partition to partition: max_plan_channels is 262144",
        )


async def test_heads_that_are_none_are_refused_and_leave_the_task_as_it_was() -> None:
    query = uuid.uuid4()
    async with running_worker() as running, connected(running) as service:
        call = await set_plan(service, numbers(), query)
        for rubbish in (b"\xff", b""):
            code, details = await status(read(service, query, worker_pb2.RepartitionExecHead(partitioning=rubbish)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "datafusion.Partitioning" in details
        assert await status(read(service, query)) == (grpc.StatusCode.OK, "")
        call.cancel()


@pytest.mark.parametrize(
    ("partitioning", "schema", "reason"),
    [
        (b"\xff", None, "1 bytes of the plan are not a datafusion.Partitioning"),
        (None, b"\xff", "1 bytes of the plan are not a datafusion_common.Schema"),
        (
            Partitioning(unknown=MANY).SerializeToString(),
            None,
            f"a shuffle node has {MANY} partitions for each of 1 tasks: 65536 is the most",
        ),
    ],
)
async def test_network_nodes_that_make_no_sense_are_refused(
    partitioning: bytes | None, schema: bytes | None, reason: str
) -> None:
    async with running_worker() as running, connected(running) as service:
        plan = network(["http://127.0.0.1:1"], uuid.uuid4(), partitioning, schema)
        assert await refusal(service, plan) == ("INVALID_ARGUMENT", reason)


def flight_data(header: bytes, body: bytes = b"", metadata: bytes = b"") -> bytes:
    return worker_pb2.FlightData(data_header=header, data_body=body, app_metadata=metadata).SerializeToString()


@asynccontextmanager
async def upstream(*answer: bytes) -> AsyncIterator[str]:
    """The URL of a worker that gives every reader the same answer."""

    async def execute_task(request: bytes, context: object) -> AsyncIterator[bytes]:
        for message in answer:
            yield message

    server = grpc.aio.server()
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "ExecuteTask": grpc.unary_stream_rpc_method_handler(execute_task)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("worker.WorkerService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)


def encoded(schema: pa.Schema = SCHEMA) -> list[worker_pb2.FlightData]:
    """What a worker sends of three rows: their schema and a batch."""
    batch = pa.RecordBatch.from_pydict({"number": [1, 2, 3]}, schema=schema)
    encoder = Encoder(schema, 1 << 20)
    return [
        worker_pb2.FlightData(data_header=header, data_body=b"".join(body))
        for header, body in (encoder.schema(), *encoder.encode([batch]))
    ]


def claiming(size: int) -> list[bytes]:
    """The messages of a batch whose compressed buffer says what it likes about its size."""
    plain = bytes(4000)
    batch = pa.RecordBatch.from_pydict({"number": pa.array([0] * 500)}, schema=SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    schema, compressed = pa.ipc.MessageReader.open_stream(sink.getvalue())
    body = compressed.body.to_pybytes()
    assert body.startswith(len(plain).to_bytes(8, "little"))
    return [
        flight_data(schema.metadata.to_pybytes()),
        flight_data(compressed.metadata.to_pybytes(), size.to_bytes(8, "little") + body[8:]),
    ]


ANSWERS = {
    "no FlightData": [b"\xff"],
    "no flatbuffer": [flight_data(b"these are no metadata of Arrow's")],
    "no metadata": [flight_data(b"")],
    "no schema": [flight_data(encoded()[0].data_header[:60] + bytes(100))],
    "a batch before the schema": [encoded()[1].SerializeToString()],
    "a body that is cut off": [encoded()[0].SerializeToString(), flight_data(encoded()[1].data_header, b"1")],
    "a buffer of more memory than there is": claiming(1 << 60),
    "a schema that no machine has the memory for": [
        flight_data(pa.schema({"number": pa.binary(1 << 30)}).serialize().to_pybytes()[8:])
    ],
    "a partition that is no number": [flight_data(encoded()[0].data_header, metadata=b"\xff")],
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_worker_that_does_not_answer_rightly_is_named(answer: str) -> None:
    query = uuid.uuid4()
    async with running_worker() as running, upstream(*ANSWERS[answer]) as url, connected(running) as service:
        call = await set_plan(service, network([url], query), query)
        code, details = await status(read(service, query))
        assert (code.name, details.partition(": ")[0]) == ("INTERNAL", f"worker {url} does not answer rightly")
        call.cancel()


async def test_more_to_a_dictionary_that_is_not_there_is_an_error() -> None:
    schema = pa.schema({"number": pa.dictionary(pa.int32(), pa.int64())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for values in ([1, 2], [1, 2, 3]):
            column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(values, pa.int64()))
            writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
    first, _, _, delta, batch = (
        flight_data(message.metadata.to_pybytes(), message.body.to_pybytes() if message.body else b"")
        for message in pa.ipc.MessageReader.open_stream(sink.getvalue())
    )
    query = uuid.uuid4()
    async with running_worker() as running, upstream(first, delta, batch) as url, connected(running) as service:
        call = await set_plan(service, network([url], query, schema=schema_message(schema).SerializeToString()), query)
        code, details = await status(read(service, query))
        assert (code.name, "ictionary" in details) == ("INVALID_ARGUMENT", True), details
        call.cancel()


@pytest.mark.parametrize("value", ["-1", "9" * 5000, str(1 << 64)])
async def test_settings_that_are_no_numbers_are_refused(value: str) -> None:
    name = "x-datafusion-distributed-config-distributed.shuffle_batch_size"
    async with running_worker() as running, connected(running) as service:
        code, details = await refusal(service, numbers(), ((name, value),))
        assert (code, details.startswith(f"header '{name}' is '{value[:100]}")) == ("INVALID_ARGUMENT", True)


def broadcast(times: int, below: Message) -> Message:
    return distributed(nodes_pb2.Node(broadcast=nodes_pb2.Broadcast(consumer_task_count=times)), below)


def union(partitions: int, chosen: int, below: Message) -> Message:
    """A union that has its one input so many times."""
    children = nodes_pb2.Children(child_ctx=[nodes_pb2.Child(child_idx=0, task_idx=0, task_count=1)] * chosen)
    node = nodes_pb2.ChildrenIsolatorUnion(partition_count=partitions, task_idx_map=[children])
    return distributed(nodes_pb2.Node(children_isolator_union=node), below)


def nested(wrap: Callable[[Message], Message]) -> Message:
    """A small plan that would be of 10^18 nodes."""
    plan = numbers()
    for _ in range(9):
        plan = wrap(plan)
    return plan


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (broadcast(MANY, numbers()), "the plan repeats its inputs too often: 33554432 bytes of copies are the most"),
        (
            nested(lambda plan: broadcast(100, plan)),
            "the plan repeats its inputs too often: 33554432 bytes of copies are the most",
        ),
        (
            nested(lambda plan: union(100, 100, plan)),
            "the plan repeats its inputs too often: 33554432 bytes of copies are the most",
        ),
        (broadcast(0, numbers()), "a broadcast node is for 0 tasks: one is the least"),
        (union(MANY, 1, numbers()), f"a union has {MANY} partitions: 65536 is the most"),
    ],
)
async def test_plans_that_grow_beyond_measure_are_refused(plan: Message, reason: str) -> None:
    async with running_worker() as running, connected(running) as service:
        assert await refusal(service, merged(plan)) == ("INVALID_ARGUMENT", reason)


def endless() -> Message:
    """A plan of 10^15 rows."""
    session = SessionContext(SessionConfig().with_target_partitions(1))
    batch = pa.RecordBatch.from_pydict({"number": range(8192)}, schema=SCHEMA)
    session.register_record_batches("numbers", [[batch]])
    joins = "cross join numbers b cross join numbers c cross join numbers d"
    return plan_proto.parse(session.sql(f"SELECT a.number FROM numbers a {joins}").execution_plan().to_bytes())


async def test_readers_that_stay_are_told_that_the_coordinator_has_gone() -> None:
    query = uuid.uuid4()
    async with running_worker() as running, connected(running) as service:
        call = await set_plan(service, endless(), query)
        messages = aiter(read(service, query))
        await anext(messages)
        call.cancel()
        await until(lambda: running.worker.statistics().tasks == 0)
        assert await status(messages) == (grpc.StatusCode.CANCELLED, "the coordinator ended the query")
        await until(lambda: running.worker.statistics().streams == running.worker.statistics().requests == 0)


async def test_a_coordinator_that_sends_no_message_at_first_is_told_what_is_right() -> None:
    reason = "the first message of a CoordinatorChannel must be a set_plan_request"
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        channel_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        channel_call = channel.stream_stream("/worker.WorkerService/CoordinatorChannel")
        for first in (b"\xff", b""):
            call = channel_call(iter([first]))
            assert await status(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_what_was_cancelled_is_no_end_for_its_readers() -> None:
    waiting = asyncio.Event()

    async def never() -> AsyncGenerator[IpcMessage, None]:
        waiting.set()
        await asyncio.Event().wait()
        yield IpcMessage(b"", [])

    replay = Replay(never())
    running = asyncio.ensure_future(replay.run())
    reading = asyncio.ensure_future(anext(interleaved({0: replay.messages()})))
    await waiting.wait()
    running.cancel()
    with pytest.raises(QueryEnded):
        await reading


async def test_channels_that_lead_to_nobody_are_not_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    channels = Channels()
    async with running_worker() as running, asyncio.timeout(SECONDS):
        somebody = f"http://{running.address}"
        for url in (somebody, nobody, somebody):
            async with channels.to(url) as channel, channels.to(url) as other:
                assert channel is other
                answer = Stub(channel).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
                expected = grpc.StatusCode.OK if url == somebody else grpc.StatusCode.UNAVAILABLE
                assert (await status(answer))[0] is expected
            is_kept = channel.get_state() is not grpc.ChannelConnectivity.SHUTDOWN
            assert is_kept == (url == somebody)
        await channels.close()


async def test_no_more_channels_are_kept_than_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cluster.channels.MAX_KEPT", 1)
    channels = Channels()
    async with channels.to("http://127.0.0.1:1") as first, channels.to("http://127.0.0.1:2") as second:
        assert first is not second
    states = [channel.get_state() for channel in (first, second)]
    assert states == [grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.SHUTDOWN]
    await channels.close()


@pytest.mark.parametrize("head", [worker_pb2.NoneHead(), worker_pb2.BroadcastExecHead(output_partitions=1)])
async def test_the_end_is_told_rightly_whenever_it_comes(head: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cluster.tasks.PLAN_SECONDS", 0.01)
    codes = set()
    async with running_worker() as running, connected(running) as service:
        for turns in range(300):
            query = uuid.uuid4()
            call = await set_plan(service, numbers(), query)
            await call.read()
            reading = asyncio.ensure_future(status(read(service, query, head)))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            codes.add((await reading)[0].name)
        await until(lambda: running.worker.statistics().requests == running.worker.statistics().tasks == 0)
    assert "CANCELLED" in codes
    assert codes <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("distributed.shuffle_batch_size", "rows"),
        ("datafusion.execution.batch_size", "rows"),
        ("datafusion.execution.minimum_parallel_output_files", "files"),
    ],
)
async def test_settings_that_take_more_than_there_is_are_refused(name: str, what: str) -> None:
    header = f"x-datafusion-distributed-config-{name}"
    async with running_worker() as running, connected(running) as service:
        code, details = await refusal(service, numbers(), ((header, str(MANY)),))
        assert (code, details) == ("INVALID_ARGUMENT", f"header '{header}' is '{MANY}': 1048576 {what} are the most")


@pytest.mark.parametrize("partitions", [1, 3])
async def test_what_was_made_ahead_of_a_reader_that_goes_away_holds_up_nothing(partitions: int) -> None:
    made: set[int] = set()
    closed: set[int] = set()

    async def numbered(partition: int) -> AsyncGenerator[IpcMessage, None]:
        try:
            for number in itertools.count():
                made.add(number)
                yield IpcMessage(b"", [])
        finally:
            closed.add(partition)

    messages = interleaved({partition: numbered(partition) for partition in range(partitions)})
    await anext(messages)
    while True:
        before = len(made)
        for _ in range(10):
            await asyncio.sleep(0)
        if len(made) == before:
            break
    async with asyncio.timeout(SECONDS):
        await messages.aclose()
    assert closed == set(range(partitions))


async def test_a_task_that_reads_itself_is_refused() -> None:
    query = uuid.uuid4()
    plan = network(["http://127.0.0.1:1"], query)
    async with running_worker() as running, connected(running) as service:
        request = worker_pb2.SetPlanRequest(
            task_key=key(query, stage=2), task_count=1, plan_proto=plan.SerializeToString()
        )
        call = service.CoordinatorChannel()
        await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=request))
        code, details = await status(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "reads that very task" in details


async def test_readers_of_a_task_whose_settings_are_refused_are_told_so() -> None:
    query = uuid.uuid4()
    name = "x-datafusion-distributed-config-distributed.compression"
    async with running_worker() as running, connected(running) as service:
        reader = read(service, query)
        call = await set_plan(service, numbers(), query, metadata=((name, "tar"),))
        assert await status(call) == await status(reader)
        assert await reader.code() is grpc.StatusCode.INVALID_ARGUMENT
