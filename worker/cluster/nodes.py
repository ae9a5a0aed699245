"""The network nodes of distributed plans, as which partitions of which upstream tasks they read. Pure parsing."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from worker import plan, plan_proto
from worker.check import check_partitioning
from worker.config import MEBIBYTE, PlanLimits
from worker.errors import InvalidPlan, InvalidRequest
from worker.plan_proto import Message
from worker.proto import nodes_pb2, worker_pb2
from worker.ticket import QUERY_ID_BYTES, StageKey

# The most partitions of a task, over all tasks that read it: each costs memory here, also when it stays empty.
MAX_PARTITIONS = 1 << 16

# What a rewritten plan may have more than what came: bytes of copies, which in each other get many fast.
MAX_COPIES = 32 * MEBIBYTE

# What stands above the plan of a task, which whoever reads it says.
Head: TypeAlias = worker_pb2.NoneHead | worker_pb2.BroadcastExecHead | worker_pb2.RepartitionExecHead


@dataclass(frozen=True, slots=True)
class Place:
    """Which task of how many."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a leaf reads of one task of its input stage: successive partitions."""

    key: StageKey
    url: str
    first: int
    slots: range
    """The leaf's own partitions that they go to."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A leaf that other tasks' output is to take the place of."""

    node: Message
    """The ``PhysicalPlanNode``; it is changed when the input has come."""
    schema: Message
    partitioning: Message
    partitions: int
    shows_partitioning: bool
    """Whether a node above it needs to see that its rows are distributed as they are."""
    reads: tuple[Read, ...]
    head: Head
    stage_plan: bytes
    """The plan of the tasks that it reads, with DataFusion 51 only."""


def parse(node: Message) -> nodes_pb2.Node | None:
    """The node of an extension node; None if that is for one of the user's codecs, which then sees what it has written.

    Raises:
        InvalidPlan: it is of no kind that is known here.
    """
    try:
        encoded = nodes_pb2.Encoded.FromString(node.extension.node)
        if encoded.encoder_position:
            node.extension.node = encoded.blob
            return None
        parsed = nodes_pb2.Node.FromString(encoded.blob)
    except DecodeError as error:
        raise InvalidPlan("an extension node of the plan is not encoded as Distributed DataFusion does") from error
    if parsed.WhichOneof("node") is None:
        raise InvalidPlan(f"the plan has a node that this worker does not know: {_describe(encoded.blob)}")
    return parsed


def parse_in_ticket(node: Message, *, is_coordinated: bool) -> nodes_pb2.Node | None:
    """The node of an extension node in a ticket's plan; None if that is for one of the session's codecs.

    Clients that are no coordinators have codecs of their own too, whose nodes stay as they are.

    Args:
        node: the extension node.
        is_coordinated: whether the ticket is a coordinator's, whose composed codec has wrapped what it has written.
    """
    try:
        encoded = nodes_pb2.Encoded.FromString(node.extension.node)
        # What is not ours may look like it, but for fields that ours do not have.
        if encoded.ByteSize() != _known_size(encoded):
            return None
        if encoded.encoder_position:
            if is_coordinated:
                node.extension.node = encoded.blob
            return None
        parsed = nodes_pb2.Node.FromString(encoded.blob)
    except DecodeError:
        return None
    return parsed if parsed.WhichOneof("node") and parsed.ByteSize() == _known_size(parsed) else None


def _known_size(message: ProtobufMessage) -> int:
    """The size of what is known of a message."""
    known = type(message).FromString(message.SerializeToString())
    known.DiscardUnknownFields()
    return known.ByteSize()


def distributed_kind(node: Message) -> str | None:
    """Which node of Distributed DataFusion's it is, by its field's name; None for others."""
    if plan_proto.kind(node) != "extension":
        return None
    try:
        encoded = nodes_pb2.Encoded.FromString(node.extension.node)
        return None if encoded.encoder_position else nodes_pb2.Node.FromString(encoded.blob).WhichOneof("node")
    except DecodeError:
        return None


def leaf(node: Message, kind: str, network: nodes_pb2.Network, place: Place, *, shows_partitioning: bool) -> Leaf:
    """What a network node is to a task.

    Raises:
        InvalidPlan: the node makes no sense.
    """
    partitioning = decoded(plan_proto.Partitioning, network.partitioning)
    partitions = plan_proto.partition_count(partitioning)
    stage = network.input_stage
    if len(stage.query_id) != QUERY_ID_BYTES or not stage.tasks or not partitions or place.index >= place.count:
        raise InvalidPlan(
            f"a {kind} node of task {place.index} of {place.count} reads {partitions} partitions from "
            f"{len(stage.tasks)} tasks of a query with an id of {len(stage.query_id)} bytes"
        )
    if partitions * place.count > MAX_PARTITIONS:
        raise InvalidPlan(
            f"a {kind} node has {partitions} partitions for each of {place.count} tasks: {MAX_PARTITIONS} is the most"
        )
    head: Head
    if kind == "coalesce":
        reads, head = list(_coalesced(stage, partitions, place)), worker_pb2.NoneHead()
    else:
        reads = [
            Read(_key(stage, task), stage.tasks[task].url_str, partitions * place.index, range(partitions))
            for task in range(len(stage.tasks))
        ]
        if kind == "shuffle":
            head = worker_pb2.RepartitionExecHead(partitioning=_scaled(partitioning, place.count).SerializeToString())
        else:
            head = worker_pb2.BroadcastExecHead(output_partitions=partitions * place.count)
    schema = decoded(plan_proto.Schema, network.schema)
    return Leaf(node, schema, partitioning, partitions, shows_partitioning, tuple(reads), head, stage.plan_proto)


def decoded(kind: Message, data: bytes) -> Message:
    """A message of DataFusion's that is bytes in one of Distributed DataFusion's.

    Raises:
        InvalidPlan: the bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidPlan(f"{len(data)} bytes of the plan are not a {kind.DESCRIPTOR.full_name}") from error


def check_head(head: Head, inputs: int, limits: PlanLimits) -> None:
    """Looks at a head before a task gets it, which it then has for good.

    Args:
        head: what is to stand above the plan.
        inputs: how many partitions the plan has at most.
        limits: what a plan may hold, of which it is a part.

    Raises:
        InvalidRequest: it is none.
        InvalidPlan, PlanTooLarge: as ``check``.
    """
    match head:
        case worker_pb2.RepartitionExecHead():
            partitioning = decoded(plan_proto.Partitioning, head.partitioning)
            if partitioning.WhichOneof("partition_method") is None:
                raise InvalidRequest("the task's head has no partitioning: it must be a datafusion.Partitioning")
            check_partitioning(partitioning, inputs, limits)
        case worker_pb2.BroadcastExecHead():
            # It is none of DataFusion's nodes: every so many partitions are those of the plan again.
            check_partitioning(plan_proto.Partitioning(unknown=head.output_partitions), 1, limits)


def without_python_udfs(head: Head) -> Head:
    """A head whose pickled Python functions are dropped.

    It is decoded in the session of who has set the task, which may have some run; who reads the task may not be.

    Raises:
        InvalidPlan: it is none.
    """
    if not isinstance(head, worker_pb2.RepartitionExecHead):
        return head
    partitioning = decoded(plan_proto.Partitioning, head.partitioning)
    plan.drop_python_udfs(partitioning)
    return worker_pb2.RepartitionExecHead(partitioning=partitioning.SerializeToString())


def _coalesced(stage: nodes_pb2.Stage, partitions: int, place: Place) -> Iterator[Read]:
    """The reads of a coalesce node: its task's contiguous group of input tasks, each with all of its partitions."""
    tasks = len(stage.tasks)
    size, larger = divmod(tasks, place.count)
    first = place.index * size + min(place.index, larger)
    each = partitions // max(1, -(-tasks // place.count))
    if not each:
        raise InvalidPlan(f"a coalesce node has {partitions} partitions for {tasks} tasks in {place.count} groups")
    for offset in range(size + (place.index < larger)):
        task = first + offset
        yield Read(_key(stage, task), stage.tasks[task].url_str, 0, range(offset * each, (offset + 1) * each))


def _key(stage: nodes_pb2.Stage, task: int) -> StageKey:
    return StageKey(uuid.UUID(bytes=stage.query_id), stage.num, task)


def _scaled(partitioning: Message, factor: int) -> Message:
    """The partitioning with so many times as many partitions."""
    scaled = plan_proto.Partitioning()
    scaled.CopyFrom(partitioning)
    method = partitioning.WhichOneof("partition_method")
    if method == "hash":
        scaled.hash.partition_count *= factor
    elif method != "range":
        setattr(scaled, method, getattr(scaled, method) * factor)
    elif factor > 1:
        raise InvalidPlan(
            f"a shuffle by ranges is read by {factor} tasks: ranges cannot be divided further, one task is right"
        )
    return scaled


def _describe(blob: bytes) -> str:
    return f"number {blob[0] >> 3} of Distributed DataFusion's" if blob else "one without content"
