"""Tasks of distributed plans that come in tickets: what they read of others, by ``DoGet``, and their figures."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from datafusion import SessionContext
from google.protobuf.message import DecodeError

from worker import output, plan
from worker.check import check
from worker.cluster import flight_rewrite, metrics
from worker.cluster.channels import Channels
from worker.cluster.fetch import Answering, read_answer, received
from worker.cluster.folder import ExchangeFolder
from worker.cluster.intake import Intake, Store
from worker.cluster.merge import together
from worker.cluster.nodes import Leaf, Place, Read
from worker.cluster.rewrite import Origin, Rewritten, check_rewritten, executed
from worker.cluster.settings import passed_on
from worker.cluster.task import HELD_BYTES
from worker.encoding import flight_data
from worker.errors import InvalidRequest
from worker.execution.executor import Executor
from worker.execution.prepare import Input, Rewrite
from worker.execution.task import Task
from worker.headers import Headers
from worker.plan_proto import Message as PlanMessage
from worker.plan_proto import PhysicalPlanNode
from worker.proto import Flight_pb2, plan_pb2, worker_pb2
from worker.ticket import PlanTicket, StageKey

DO_GET = "/arrow.flight.protocol.FlightService/DoGet"

COLLECT_METRICS = output.CONFIG_PREFIX + "distributed.collect_metrics"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a worker reads from others with."""

    channels: Channels
    folder: ExchangeFolder
    executor: Executor

    def rewrite(self, ticket: PlanTicket, headers: Headers) -> Rewrite:
        """How the plan of a ticket that came with headers is rewritten, and fetched what it reads."""
        return partial(self._rewrite, ticket, headers)

    def _rewrite(self, ticket: PlanTicket, headers: Headers, session: SessionContext, message: PlanMessage) -> Input:
        def count_partitions(part: PlanMessage) -> int:
            check(part, limits)
            plan.upgrade_filters(session, part)
            return plan.decode(session, part.SerializeToString()).partition_count

        limits = self.executor.limits
        # A client that is no coordinator does not say which task it is.
        place = Place(ticket.task_index, max(1, ticket.task_count))
        is_coordinated = ticket.task_count > 0
        rewritten = flight_rewrite.rewrite(message, place, count_partitions, is_coordinated=is_coordinated)
        check_rewritten(rewritten, limits)
        return FlightInput(self, session, rewritten, _passed_on(headers))


class FlightInput:
    """What the network nodes of a plan read, and what became of its nodes."""

    def __init__(
        self,
        exchange: Exchange,
        session: SessionContext,
        rewritten: Rewritten,
        headers: Sequence[tuple[str, str | bytes]],
    ) -> None:
        self.rewritten = rewritten
        self.figures: dict[bytes, plan_pb2.TaskMetrics] = {}
        """Those of tasks below, by their keys; as far as they came."""
        self._exchange = exchange
        self._session = session
        self._headers = headers
        self._store: Store | None = None
        # A fetch that was cancelled goes on for a moment: it would write again what is deleted meanwhile.
        self._using_store = asyncio.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether the plan reads nothing of others."""
        return not self.rewritten.leaves

    async def fetch(self) -> PlanMessage:
        """The plan with scans of everything that it reads.

        Raises:
            WorkerError: a worker that it reads from failed.
        """
        async with self._using_store:
            # There was an attempt, whose input came in vain: whoever waited for it went away.
            await self._close_store()
            folder = self._exchange.folder
            self._store = store = Store(folder.new(), self._session, folder)
            try:
                await together(
                    self._fetch_leaf(leaf, store, str(number)) for number, leaf in enumerate(self.rewritten.leaves)
                )
            except BaseException:
                await self._close_store()
                raise
        # A copy, which may be changed: the leaves are parts of the other.
        fed: PlanMessage = PhysicalPlanNode()
        fed.CopyFrom(self.rewritten.plan)
        return fed

    async def close(self) -> None:
        """Deletes what was fetched, and lets go of the session: errors keep frames that have this."""
        async with self._using_store:
            await self._close_store()
        del self._session

    async def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def _fetch_leaf(self, leaf: Leaf, store: Store, name: str) -> None:
        with closing(Intake(leaf.schema, leaf.partitions, store, name, self._exchange.executor, HELD_BYTES)) as intake:
            # All at once: a worker holds back everything of a repartitioning for partitions that are not read yet.
            await together(
                self._read(leaf, source, read, offset, intake)
                for source, read in enumerate(leaf.reads)
                for offset in range(len(read.slots))
            )
            leaf.node.CopyFrom(await intake.scan(leaf.partitioning if leaf.shows_partitioning else None))

    async def _read(self, leaf: Leaf, source: int, read: Read, offset: int, intake: Intake) -> None:
        async def take(data: bytes) -> None:
            header, metadata, body = flight_data.parse(data)
            if metadata:
                self._keep_figures(bytes(metadata))
            if header:
                await intake.add(read.slots[offset], source, *received(header, body))

        ticket = PlanTicket(
            plan=leaf.stage_plan,
            partition=read.first + offset,
            task_index=read.key.task_number,
            task_count=len(leaf.reads),
            stage_key=read.key,
        )
        request = Flight_pb2.Ticket(ticket=ticket.to_bytes()).SerializeToString()
        async with self._exchange.channels.to(read.url) as channel:
            do_get: Answering = channel.unary_stream(DO_GET)
            await read_answer(read.url, do_get(request, metadata=self._headers), take)

    def _keep_figures(self, metadata: bytes) -> None:
        try:
            told = plan_pb2.FlightAppMetadata.FromString(metadata)
        except DecodeError as error:
            raise InvalidRequest("it sent metadata that is no worker.plan.FlightAppMetadata") from error
        for task in told.metrics_collection.tasks:
            self.figures[task.stage_key.SerializeToString(deterministic=True)] = task


def collects_metrics(headers: Headers) -> bool:
    """Whether the request wants the figures of its task.

    Raises:
        InvalidHeader: it says neither yes nor no.
    """
    return output.one_of({"true": True, "false": False}, headers, COLLECT_METRICS, "true or false") or False


def app_metadata(task: Task, key: StageKey) -> bytes:
    """The figures of a task that has been executed, and of those below it. Blocks for some milliseconds."""
    collection = plan_pb2.MetricsCollection()
    figures = []
    if isinstance(task.input, FlightInput):
        collection.tasks.extend(task.input.figures.values())
        for node, origin in executed(task.executed(), task.input.rewritten.origins):
            # Network nodes have none: those of the tasks that they read are in their place.
            if not isinstance(origin, Leaf):
                of_node = metrics.of_node(node.metrics() if node else None)
                figures.append(metrics.of_output(of_node) if origin is Origin.PASSED else of_node)
    else:
        figures = [metrics.of_node(node.metrics() if node else None) for node in task.executed()]
    collection.tasks.add(stage_key=key.to_proto(), metrics=map(_in_ticket_dialect, figures))
    return plan_pb2.FlightAppMetadata(metrics_collection=collection).SerializeToString()


def _in_ticket_dialect(figures: worker_pb2.MetricsSet) -> plan_pb2.MetricsSet:
    """Figures with the numbers of tickets' days, which had fewer kinds."""
    converted = plan_pb2.MetricsSet()
    for figure in figures.metrics:
        kind = figure.WhichOneof("value")
        if kind and kind in plan_pb2.Metric.DESCRIPTOR.fields_by_name:
            value = getattr(converted.metrics.add(), kind)
            value.SetInParent()
            value.MergeFromString(getattr(figure, kind).SerializeToString())
    return converted


def _passed_on(headers: Headers) -> list[tuple[str, str | bytes]]:
    """The headers that go on to other workers, which are to send views as they are, whatever the client here wants."""
    return [(name, value) for name, value in passed_on(headers) if name != output.EXPAND_VIEWS] + [
        (output.EXPAND_VIEWS, "false")
    ]
