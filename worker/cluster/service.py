"""The WorkerService servicer: one handler an RPC."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Self

import grpc
from datafusion import SessionContext
from google.protobuf.message import DecodeError

from worker import plan
from worker.check import check
from worker.cluster.channels import Channels
from worker.cluster.fetch import Source
from worker.cluster.flight import Exchange
from worker.cluster.folder import ExchangeFolder
from worker.cluster.intake import Store
from worker.cluster.members import Members
from worker.cluster.nodes import Head, Place, without_python_udfs
from worker.cluster.process import CpuUsage
from worker.cluster.rewrite import Rewritten, check_rewritten, rewrite
from worker.cluster.settings import ClusterSettings, passed_on
from worker.cluster.task import ClusterTask, Orders
from worker.cluster.tasks import ClusterTasks
from worker.config import PlanLimits, Settings
from worker.ending import end, this_request
from worker.errors import FailedPrecondition, InvalidPlan, InvalidRequest
from worker.execution.demand import demand_of
from worker.execution.executor import SMALL_PLAN
from worker.handlers import adding, sending_bytes
from worker.message import Message
from worker.plan_proto import Message as PlanMessage
from worker.policy import PlanPolicyLike
from worker.proto import worker_pb2, worker_pb2_grpc
from worker.requests import Request
from worker.servicer import Context, Servicer, Statistics
from worker.session import SessionBuilderLike
from worker.supervision.journal import Journal, Noted
from worker.ticket import QUERY_ID_BYTES, StageKey
from worker.tls import Certificates

SERVICE: str = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name


class ClusterServicer(Servicer, worker_pb2_grpc.WorkerServiceServicer):
    """A worker that coordinators of Distributed DataFusion know how to drive."""

    def __init__(
        self,
        session_builder: SessionBuilderLike | None = None,
        *,
        settings: Settings | None = None,
        plan_policy: PlanPolicyLike | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(session_builder, settings=settings, plan_policy=plan_policy, journal=journal)
        self._version = self._settings.version
        self._channels = Channels()
        certificates = Certificates.of(self._settings)
        if certificates and self._settings.tls_client_ca:
            self._channels.credentials = certificates.channel_credentials
        self._folder = ExchangeFolder(self._settings.spill_folder, self._settings.max_spill)
        self._cluster_tasks = ClusterTasks()
        self._members = Members()
        self._cpu_usage = CpuUsage()
        self._exchange = Exchange(self._channels, self._folder, self._executor)

    def with_version(self, version: str) -> Self:
        """Sets what ``GetWorkerInfo`` says: coordinators may use workers of one version alone."""
        self._version = version
        return self

    def with_channel_credentials(self, credentials: grpc.ChannelCredentials) -> Self:
        """Sets how other workers are trusted, and this one shown to them, where their URLs are ``https``."""
        self._channels.credentials = lambda: credentials
        return self

    def statistics(self) -> Statistics:
        """What is held now and was done so far."""
        statistics = super().statistics()
        return replace(statistics, tasks=statistics.tasks + len(self._cluster_tasks))

    async def close(self) -> None:
        """Drops all tasks. Stop the server first."""
        await super().close()
        await self._channels.close()
        self._folder.close()

    async def GetWorkerInfo(self, request: Any, context: Context) -> worker_pb2.GetWorkerInfoResponse:
        """The worker's version."""
        async with self._answering(context, "GetWorkerInfo"):
            return worker_pb2.GetWorkerInfoResponse(version=self._version)
        return worker_pb2.GetWorkerInfoResponse()  # not sent

    async def CoordinatorChannel(  # type: ignore[override]  # it writes, so that a cancel ends it at once
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> None:
        """A task's life: from its plan until the coordinator says that the query has ended."""
        # The place in memory is given back after the task has ended.
        async with self._answering(context, "CoordinatorChannel") as answered, AsyncExitStack() as held:
            request = await _set_plan_request(request_iterator)
            key = _stage_key(request.task_key)
            query = self._query_context(
                answered,
                context,
                task_index=request.task_key.task_number,
                task_count=request.task_count,
                stage_key=key,
            )

            async def make() -> tuple[str, ClusterTask]:
                settings = ClusterSettings.from_headers(query.headers)
                settings.apply(query.headers, query.builder)
                session = await self._session_builder.build_session_state(query)
                nodes = await self._permit(query, request.plan_proto)
                if request.work_unit_feed_declarations:
                    raise FailedPrecondition(
                        f"{len(request.work_unit_feed_declarations)} nodes of the plan are fed with work units, "
                        "which this worker has no nodes for: run such plans on workers written in Rust"
                    )
                demand = demand_of(
                    query.principal,
                    key,
                    len(request.plan_proto),
                    nodes,
                    query.builder.memory_limit,
                    request.query_start_time_ns,
                )
                claim = held.enter_context(await self._tasks.admit(demand))
                claim.end = partial(end, this_request())
                place = Place(query.task_index, query.task_count)
                noted, rewritten = await self._executor.in_thread_if(
                    len(request.plan_proto) > SMALL_PLAN,
                    _rewritten,
                    self._executor.journal,
                    key,
                    session,
                    request.plan_proto,
                    place,
                    self._settings,
                    query.builder.python_udf_inlining,
                )
                reads = [read for leaf in rewritten.leaves for read in leaf.reads]
                if any(read.key == key for read in reads):
                    raise InvalidPlan(f"the plan of task {key} reads that very task")
                self._members.named(query.principal, (request.target_worker_url, *(read.url for read in reads)))
                orders = Orders(key, request.task_count, settings, request.query_start_time_ns)
                source = Source(
                    self._channels,
                    request.target_worker_url,
                    self._own_output(query.principal, query.builder.python_udf_inlining),
                    passed_on(query.headers),
                )
                folder = await self._executor.in_thread_if(not self._folder.is_made, self._folder.new)
                store = Store(folder, session, self._folder)
                return query.principal, ClusterTask(orders, self._executor, session, noted, rewritten, source, store)

            async with self._cluster_tasks.task(key, make) as task:
                async for load in task.load_infos():
                    await context.write(worker_pb2.WorkerToCoordinatorMsg(load_info=load))
                await context.write(worker_pb2.WorkerToCoordinatorMsg(load_info_eos=True))
                async for message in request_iterator:
                    if message.WhichOneof("inner") == "set_plan_request":
                        raise InvalidRequest("a CoordinatorChannel sets one plan, with its first message")
                if task.orders.settings.collect_metrics:
                    figures = await self._executor.in_thread(task.figures)
                    await context.write(worker_pb2.WorkerToCoordinatorMsg(task_metrics=figures))

    async def ExecuteTask(
        self, request: worker_pb2.ExecuteTaskRequest, context: Context
    ) -> AsyncIterator[worker_pb2.FlightData]:
        """The record batches of a range of a task's partitions, interleaved."""
        async with (
            self._answering(context, "ExecuteTask") as answered,
            aclosing(self._execute(request, context, answered)) as messages,
        ):
            async for (header, body), metadata in messages:
                yield worker_pb2.FlightData(data_header=header, app_metadata=metadata, data_body=b"".join(body))

    async def _execute_bytes(self, request: worker_pb2.ExecuteTaskRequest, context: Context) -> None:
        await self._send(context, "ExecuteTask", partial(self._execute, request, context))

    async def _execute(
        self, request: worker_pb2.ExecuteTaskRequest, context: Context, answered: Request
    ) -> AsyncGenerator[tuple[Message, bytes], None]:
        """A request's life: messages, each with its ``app_metadata``."""
        key, head = _stage_key(request.task_key), _head(request)
        answered.partitions = partitions = range(request.target_partition_start, request.target_partition_end)
        query = self._query_context(answered, context, task_index=key.task_number, task_count=0, stage_key=key)
        principal = query.principal
        await self._session_builder.admit(query)
        if not query.builder.python_udf_inlining:
            head = without_python_udfs(head)
        # A certificate says which worker reads, and not for whom. A session builder that names somebody does.
        is_known = "authorization" in query.headers or query.principal != principal
        task = await self._cluster_tasks.find(key, query.principal if is_known else None)
        schemas: dict[int, Message] = {}
        async with aclosing(task.output(partitions, head, task.orders.settings.compression)) as output:
            async for partition, message in output:
                schemas.setdefault(partition, message)
                yield self._requests.sent(answered, message), _app_metadata(partition)
        for partition in partitions:
            if partition not in schemas:
                schema = next(iter(schemas.values()), None) or await task.schema()
                schemas[partition] = schema
                yield self._requests.sent(answered, schema), _app_metadata(partition)

    def _own_output(self, principal: str, python_udf_inlining: bool) -> Any:
        async def output(key: StageKey, partitions: range, head: Head) -> AsyncGenerator[tuple[int, Message], None]:
            if not python_udf_inlining:
                head = without_python_udfs(head)
            task = await self._cluster_tasks.find(key, principal)
            async with aclosing(task.output(partitions, head, "none")) as messages:
                async for partition, message in messages:
                    yield partition, message

        return output


def add_WorkerServiceServicer_to_server(
    servicer: worker_pb2_grpc.WorkerServiceServicer, server: grpc.aio.Server
) -> None:
    """Adds a servicer to a server, like the generated function of this name, but so that a ``Worker`` sends bytes.

    A class that overrides ``ExecuteTask`` is served as it is.
    """
    ready = {}
    if isinstance(servicer, ClusterServicer) and type(servicer).ExecuteTask is ClusterServicer.ExecuteTask:
        ready["ExecuteTask"] = sending_bytes(servicer._execute_bytes, worker_pb2.ExecuteTaskRequest)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, adding(server, SERVICE, ready))


async def _set_plan_request(requests: AsyncIterator[worker_pb2.CoordinatorToWorkerMsg]) -> worker_pb2.SetPlanRequest:
    try:
        first = await anext(aiter(requests), None)
    except DecodeError:
        first = None
    if first is None or first.WhichOneof("inner") != "set_plan_request":
        raise InvalidRequest("the first message of a CoordinatorChannel must be a set_plan_request")
    request = first.set_plan_request
    if request.task_key.task_number >= request.task_count:
        raise InvalidRequest(f"task {request.task_key.task_number} is none of a stage of {request.task_count} tasks")
    return request


def _rewritten(
    journal: Journal,
    key: StageKey,
    session: SessionContext,
    plan_bytes: bytes,
    place: Place,
    limits: PlanLimits,
    python_udf_inlining: bool,
) -> tuple[Noted, Rewritten]:
    noted = journal.admit(plan_bytes, key)
    if not python_udf_inlining:
        plan_bytes = plan.without_python_udfs(plan_bytes)

    def count_partitions(part: PlanMessage) -> int:
        check(part, limits)
        return plan.decode(session, part.SerializeToString()).partition_count

    with journal.decoding(noted):
        rewritten = rewrite(plan.parse(plan_bytes, limits).message, place, count_partitions)
        check_rewritten(rewritten, limits)
        return noted, rewritten


def _stage_key(key: worker_pb2.TaskKey) -> StageKey:
    if len(key.query_id) != QUERY_ID_BYTES:
        raise InvalidRequest(
            f"the task key's query_id has {len(key.query_id)} bytes: a UUID of {QUERY_ID_BYTES} is right"
        )
    return StageKey(uuid.UUID(bytes=key.query_id), key.stage_id, key.task_number)


def _head(request: worker_pb2.ExecuteTaskRequest) -> Head:
    name = request.WhichOneof("producer_head")
    if name is None:
        raise InvalidRequest("the request has no producer_head: none, broadcast or repartition is right")
    head: Head = getattr(request, name)
    return head


def _app_metadata(partition: int) -> bytes:
    return worker_pb2.FlightAppMetadata(
        partition=partition, created_timestamp_unix_nanos=time.time_ns()
    ).SerializeToString()
