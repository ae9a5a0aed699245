"""What tests of the WorkerService need: tasks set as a coordinator does it, and read as other workers do it."""

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pyarrow as pa
from datafusion import SessionConfig, SessionContext
from flight_plans import distributed, url
from support import read_messages

from worker import plan_proto
from worker.message import HeaderType, Message, header_type
from worker.plan import schema_message
from worker.proto import nodes_pb2, worker_pb2, worker_pb2_grpc
from worker.testing import RunningWorker

CONFIG = "x-datafusion-distributed-config-"
NONE = worker_pb2.NoneHead()
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NUMBERS = pa.schema([pa.field("x", pa.int64())])

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Head: TypeAlias = worker_pb2.NoneHead | worker_pb2.BroadcastExecHead | worker_pb2.RepartitionExecHead
Sent: TypeAlias = dict[int, list[worker_pb2.FlightData]]


@asynccontextmanager
async def service(running: RunningWorker) -> AsyncIterator[worker_pb2_grpc.WorkerServiceStub]:
    """The generated client of a worker."""
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(running.address, options=options) as channel:
        yield worker_pb2_grpc.WorkerServiceStub(channel)


def task_key(number: int = 0, query: bytes | None = None, stage: int = 1) -> worker_pb2.TaskKey:
    """A key, of a query that no other test has unless one is given."""
    return worker_pb2.TaskKey(query_id=query or uuid.uuid4().bytes, stage_id=stage, task_number=number)


@dataclass
class Coordination:
    """A task, from its coordinator's side."""

    running: RunningWorker
    key: worker_pb2.TaskKey
    call: Any
    loads: list[worker_pb2.LoadInfo] = field(default_factory=list)
    """What the worker told before it said that there is no more."""

    async def end(self) -> list[worker_pb2.WorkerToCoordinatorMsg]:
        """Ends the query; returns what the worker says then.

        Raises:
            grpc.aio.AioRpcError: the RPC has failed.
        """
        await self.call.done_writing()
        # gRPC does not allow to iterate over what was read from before.
        return [message async for message in _rest(self.call)]

    async def figures(self) -> list[worker_pb2.MetricsSet]:
        """Ends the query; returns the figures of its nodes."""
        (last,) = await self.end()
        return list(last.task_metrics.pre_order_plan_metrics)

    async def read(self, partitions: range, head: Head = NONE, metadata: Metadata = ()) -> dict[int, pa.Table]:
        """The tables of partitions, by their numbers."""
        return await read(self.running, self.key, partitions, head, metadata)


@asynccontextmanager
async def coordinated(
    running: RunningWorker,
    plan: bytes | plan_proto.Message,
    *,
    key: worker_pb2.TaskKey | None = None,
    task_count: int = 1,
    metadata: Metadata = (),
    timeout: float | None = None,
    **request: Any,
) -> AsyncIterator[Coordination]:
    """A task that has its plan, for as long as the block lasts.

    Raises:
        grpc.aio.AioRpcError: the plan is refused.
    """
    key = key or task_key()
    set_plan = worker_pb2.SetPlanRequest(
        task_key=key,
        task_count=task_count,
        plan_proto=plan if isinstance(plan, bytes) else plan.SerializeToString(),
        target_worker_url=url(running),
        **request,
    )
    async with service(running) as client:
        call = client.CoordinatorChannel(metadata=metadata, timeout=timeout)
        await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=set_plan))
        coordination = Coordination(running, key, call)
        async for message in _rest(call):
            if message.load_info_eos:
                break
            coordination.loads.append(message.load_info)
        else:
            raise AssertionError("the worker did not say that there is no more load information")
        yield coordination
        if not call.done():
            await coordination.end()


async def _rest(call: Any) -> AsyncIterator[worker_pb2.WorkerToCoordinatorMsg]:
    while isinstance(message := await call.read(), worker_pb2.WorkerToCoordinatorMsg):
        yield message


async def refusal(running: RunningWorker, plan: bytes | plan_proto.Message, **options: Any) -> tuple[Any, str]:
    """The status and the text that a plan is refused with."""
    try:
        async with coordinated(running, plan, **options):
            raise AssertionError("the plan was not refused")
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""


def execute_request(
    key: worker_pb2.TaskKey, partitions: range, head: Head | None = NONE
) -> worker_pb2.ExecuteTaskRequest:
    """A request for partitions of a task."""
    request = worker_pb2.ExecuteTaskRequest(
        task_key=key, target_partition_start=partitions.start, target_partition_end=partitions.stop
    )
    match head:
        case worker_pb2.NoneHead():
            request.none.SetInParent()
        case worker_pb2.BroadcastExecHead():
            request.broadcast.CopyFrom(head)
        case worker_pb2.RepartitionExecHead():
            request.repartition.CopyFrom(head)
    return request


async def messages(
    running: RunningWorker,
    key: worker_pb2.TaskKey,
    partitions: range,
    head: Head | None = NONE,
    metadata: Metadata = (),
) -> Sent:
    """What is sent for partitions, each of which must begin with its schema."""
    sent: Sent = {}
    async with service(running) as client:
        async for data in client.ExecuteTask(execute_request(key, partitions, head), metadata=metadata):
            about = worker_pb2.FlightAppMetadata.FromString(data.app_metadata)
            is_first = about.partition not in sent
            assert (header_type(data.data_header) == HeaderType.SCHEMA) == is_first
            sent.setdefault(about.partition, []).append(data)
    assert sorted(sent) == list(partitions)
    return sent


async def read(
    running: RunningWorker,
    key: worker_pb2.TaskKey,
    partitions: range,
    head: Head | None = NONE,
    metadata: Metadata = (),
) -> dict[int, pa.Table]:
    """The tables of partitions, by their numbers."""
    sent = await messages(running, key, partitions, head, metadata)
    return {
        partition: read_messages(Message(data.data_header, [data.data_body]) for data in sent[partition])
        for partition in partitions
    }


async def refused_read(
    running: RunningWorker,
    key: worker_pb2.TaskKey,
    partitions: range = range(1),
    head: Head | None = NONE,
    metadata: Metadata = (),
) -> tuple[grpc.StatusCode, str]:
    """The status and the text that a request for partitions is refused with."""
    try:
        await messages(running, key, partitions, head, metadata)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the request was not refused")


def hashed(column: int, partitions: int) -> plan_proto.Message:
    """A partitioning by the hash of a column."""
    partitioning = plan_proto.Partitioning()
    partitioning.hash.hash_expr.add().column.index = column
    partitioning.hash.partition_count = partitions
    return partitioning


def repartition(partitioning: plan_proto.Message) -> worker_pb2.RepartitionExecHead:
    """A head of a partitioning."""
    return worker_pb2.RepartitionExecHead(partitioning=partitioning.SerializeToString())


def reads(
    kind: str, schema: pa.Schema, partitioning: plan_proto.Message, urls: Iterable[str], query: bytes, stage: int = 1
) -> plan_proto.Message:
    """A network node that reads a stage with a task on each worker; its kind is a field of ``nodes_pb2.Node``."""
    network = nodes_pb2.Network(
        schema=schema_message(schema).SerializeToString(),
        partitioning=partitioning.SerializeToString(),
        input_stage=nodes_pb2.Stage(query_id=query, num=stage, tasks=[nodes_pb2.Task(url_str=each) for each in urls]),
    )
    return distributed(nodes_pb2.Node(**{kind: network}))  # type: ignore[arg-type]


def plan_of(*partitions: Sequence[int], query: str = "SELECT x + 0 AS x FROM t", executions: str = "1") -> bytes:
    """A plan over a table in memory of one column, ``x``."""
    session = SessionContext(SessionConfig({"datafusion.execution.target_partitions": executions}))
    session.register_record_batches("t", [[pa.record_batch({"x": pa.array(each, pa.int64())})] for each in partitions])
    return session.sql(query).execution_plan().to_bytes()


def values(table: pa.Table) -> list[int]:
    """What is in the column of a table, in order."""
    return sorted(table["x"].to_pylist())


def all_values(tables: Iterable[pa.Table]) -> list[int]:
    """What is in the columns of tables, in order."""
    return values(pa.concat_tables(tables))


def files(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {file.name for file in folder.rglob("*") if file.is_file()}
