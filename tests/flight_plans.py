"""Distributed plans in tickets, as a coordinator of Distributed DataFusion made them when its workers spoke Flight."""

import uuid
from collections.abc import Sequence

import pyarrow as pa
from datafusion import SessionContext

from worker import plan, plan_proto
from worker.cluster import flight_rewrite
from worker.cluster.nodes import Place
from worker.config import PlanLimits
from worker.plan_proto import Message, PhysicalPlanNode
from worker.proto import nodes_pb2, plan_pb2
from worker.testing import RunningWorker

METRICS = (b"x-datafusion-distributed-config-distributed.collect_metrics", b"true")


def url(worker: RunningWorker) -> str:
    """How a coordinator knows a worker."""
    return f"http://{worker.address}"


def ticket(
    message: Message, partition: int = 0, index: int = 0, count: int = 0, key: plan_pb2.StageKey | None = None
) -> bytes:
    """A ticket of a task."""
    return plan_pb2.DoGet(
        plan_proto=message.SerializeToString(),
        target_partition=partition,
        target_task_index=index,
        target_task_count=count,
        stage_key=key,
    ).SerializeToString()


def copy(message: Message) -> Message:
    """A plan that can be changed without changing the other."""
    copied = PhysicalPlanNode()
    copied.CopyFrom(message)
    return copied


def distributed(node: nodes_pb2.Node, *inputs: Message) -> Message:
    """A node of Distributed DataFusion's as an extension node."""
    message = PhysicalPlanNode()
    message.extension.node = nodes_pb2.Encoded(blob=node.SerializeToString()).SerializeToString()
    message.extension.inputs.extend(inputs)
    return message


def isolated(message: Message, tasks: int) -> Message:
    """A plan of whose partitions each task has its own."""
    return distributed(nodes_pb2.Node(partition_isolator=nodes_pb2.PartitionIsolator(n_tasks=tasks)), message)


def network(kind: str, schema: Message, partitioning: Message, stage: nodes_pb2.Stage) -> Message:
    """A shuffle or coalesce node."""
    node = nodes_pb2.Network(
        schema=schema.SerializeToString(), partitioning=partitioning.SerializeToString(), input_stage=stage
    )
    return distributed(nodes_pb2.Node(**{kind: node}))  # type: ignore[arg-type]


def stage(number: int, message: Message, urls: Sequence[str], query: uuid.UUID | None = None) -> nodes_pb2.Stage:
    """A stage with a task on each of the workers."""
    return nodes_pb2.Stage(
        query_id=(query or uuid.uuid4()).bytes,
        num=number,
        tasks=[nodes_pb2.Task(url_str=worker) for worker in urls],
        plan_proto=message.SerializeToString(),
    )


def coalesced(schema: pa.Schema, partitions: int, read: nodes_pb2.Stage) -> Message:
    """All partitions of a stage, in one."""
    message = PhysicalPlanNode()
    partitioning = plan_proto.Partitioning(unknown=partitions)
    message.merge.input.CopyFrom(network("coalesce", plan.schema_message(schema), partitioning, read))
    return message


class Coordinator:
    """Cuts plans into stages, whose tasks are spread over workers."""

    def __init__(self, session: SessionContext, urls: Sequence[str]) -> None:
        self.query = uuid.uuid4()
        self.sizes: dict[tuple[int, int], int] = {}
        """How many nodes that are no network nodes each task has, by stage and task."""
        self._session = session
        self._urls = urls
        self._stages = 0

    def distribute(self, message: Message) -> Message:
        """The plan of the one task of the last stage, which has number 0."""
        message = copy(message)
        self._cut(message, 1)
        self.sizes[0, 0] = _size(message)
        return message

    def _cut(self, node: Message, tasks: int) -> None:
        match kind := plan_proto.kind(node):
            case "repartition" if node.repartition.partitioning.HasField("hash"):
                below = copy(node)
                below.repartition.partitioning.hash.partition_count *= tasks
                self._read("shuffle", node, node.repartition.partitioning, below)
            case "merge" | "sort_preserving_merge" if self._can_be_spread(source := getattr(node, kind).input):
                below = copy(source)
                self._read("coalesce", source, None, below)
            case "parquet_scan" if tasks > 1:
                node.CopyFrom(isolated(copy(node), tasks))
            case _:
                for child in plan_proto.children(node):
                    self._cut(child, tasks)

    def _read(self, kind: str, node: Message, partitioning: Message | None, below: Message) -> None:
        """Makes a node one that reads a stage with the plan ``below``."""
        schema = self._schema(node)
        self._stages += 1
        number = self._stages
        spread = below.repartition.input if plan_proto.kind(below) == "repartition" else below
        urls = self._urls if self._can_be_spread(spread) else self._urls[:1]
        self._cut(spread, len(urls))
        if partitioning is None:
            partitioning = plan_proto.Partitioning(unknown=self._partitions(below, len(urls)) * len(urls))
        self.sizes |= {(number, task): _size(below) for task in range(len(urls))}
        node.CopyFrom(network(kind, schema, partitioning, stage(number, below, urls, self.query)))

    def _can_be_spread(self, node: Message) -> bool:
        match plan_proto.kind(node):
            case "merge" | "sort_preserving_merge" | "global_limit" | "nested_loop_join":
                return False
            case "repartition" if node.repartition.partitioning.HasField("hash"):
                return True
            case _:
                return all(map(self._can_be_spread, plan_proto.children(node)))

    def _upgraded(self, message: Message) -> bytes:
        parsed = plan.parse(message.SerializeToString(), PlanLimits())
        plan.upgrade_filters(self._session, parsed.message)
        upgraded: bytes = parsed.message.SerializeToString()
        return upgraded

    def _schema(self, node: Message) -> Message:
        return plan.schema_message(plan.schema_of(self._session, self._upgraded(node)))

    def _partitions(self, message: Message, tasks: int) -> int:
        rewritten = flight_rewrite.rewrite(copy(message), Place(0, tasks), lambda _: 0, is_coordinated=True)
        return plan.decode(self._session, self._upgraded(rewritten.plan)).partition_count


def _size(message: Message) -> int:
    networks = {"shuffle", "coalesce"}
    kinds = [
        nodes_pb2.Node.FromString(nodes_pb2.Encoded.FromString(node.extension.node).blob).WhichOneof("node")
        for node in plan_proto.nodes(message)
        if plan_proto.kind(node) == "extension"
    ]
    return sum(1 for _ in plan_proto.nodes(message)) - sum(kind in networks for kind in kinds)
