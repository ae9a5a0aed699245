"""Distributed plans into plans that DataFusion executes, and back: which node of the one is which of the other.

A network node becomes a scan of what was fetched for it, which is put there once it has come.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from datafusion import ExecutionPlan

from worker import plan, plan_proto
from worker.check import check, check_partitioning
from worker.cluster.nodes import MAX_COPIES, MAX_PARTITIONS, Head, Leaf, Place, distributed_kind, leaf, parse
from worker.config import PlanLimits
from worker.errors import InvalidPlan
from worker.plan_proto import Message
from worker.proto import nodes_pb2, worker_pb2


class Origin(Enum):
    """What became of a node."""

    KEPT = auto()
    """It is the next of those that are executed, parents before their children."""
    GONE = auto()
    """It is not executed here."""
    PASSED = auto()
    """It is not executed either, and would give what its one input gives."""
    ADDED = auto()
    """It is none of the coordinator's, but the next of those that are executed."""


# The nodes of a plan, as the coordinator knows them or as they are executed, parents before their children. A leaf is
# the network node of the coordinator, and the scan that is executed in its place.
Origins: TypeAlias = list[Origin | Leaf]


@dataclass(slots=True)
class Rewritten:
    """A plan without nodes of Distributed DataFusion."""

    plan: Message
    """The head that the coordinator planned with is left out, as is a sampler below it."""
    partitions: int = 0
    """How many partitions it has at most."""
    leaves: list[Leaf] = field(default_factory=list)
    origins: Origins = field(default_factory=list)
    is_sampled: bool = False
    """Whether the coordinator wants to know how much there is before it plans what reads it."""


def rewrite(message: Message, place: Place, count_partitions: Callable[[Message], int]) -> Rewritten:
    """The plan of a task. The message is changed.

    Args:
        message: the plan as the coordinator sent it.
        place: which task it is.
        count_partitions: how many partitions a part of the plan has, whose leaves are empty.

    Raises:
        InvalidPlan: a node is not known, or makes no sense.
    """
    _strip_head(message)
    rewritten = Rewritten(message)
    rewritten.is_sampled = distributed_kind(message) == "sampler"
    Rewriter(rewritten, count_partitions, parse).rewrite(message, place)
    return rewritten


def check_rewritten(rewritten: Rewritten, limits: PlanLimits) -> None:
    """Looks at a plan again, now that it has what was in nodes that are none of DataFusion's.

    Raises:
        InvalidPlan, PlanTooLarge: as ``check``.
    """
    rewritten.partitions = check(rewritten.plan, limits)
    for read in rewritten.leaves:
        # It is put into the plan with the input.
        check_partitioning(read.partitioning, 1, limits)


def with_head(message: Message, head: Head) -> tuple[Message, Origins]:
    """A copy of a plan below its head, and what the coordinator's head node is in it."""
    headed = plan_proto.PhysicalPlanNode()
    if isinstance(head, worker_pb2.RepartitionExecHead):
        headed.repartition.partitioning.MergeFromString(head.partitioning)
        headed.repartition.input.CopyFrom(message)
        return headed, [Origin.KEPT]
    headed.CopyFrom(message)
    return headed, [Origin.GONE] if isinstance(head, worker_pb2.BroadcastExecHead) else []


def executed(
    nodes: Sequence[ExecutionPlan | None], origins: Origins
) -> Iterator[tuple[ExecutionPlan | None, Origin | Leaf]]:
    """For each of the coordinator's nodes: the node that was executed, if there is one, and what became of it.

    Args:
        nodes: those that were executed, parents before their children.
        origins: of the plan.
    """
    place = 0
    for origin in origins:
        node = nodes[place] if place < len(nodes) and origin is not Origin.GONE else None
        if origin is not Origin.ADDED:
            yield node, origin
        place += origin not in _NOT_EXECUTED


_NOT_EXECUTED = frozenset({Origin.GONE, Origin.PASSED})
_NETWORK = frozenset({"shuffle", "coalesce", "network_broadcast"})


class Rewriter:
    """Rewrites plans of one dialect, node by node."""

    lists_all_inputs = False
    """Whether a coordinator knows all inputs of a union as nodes of a task, not only those that are the task's."""

    def __init__(
        self,
        rewritten: Rewritten,
        count_partitions: Callable[[Message], int],
        parse: Callable[[Message], nodes_pb2.Node | None],
    ) -> None:
        """
        Args:
            rewritten: what is added to.
            count_partitions: how many partitions a part of the plan has.
            parse: reads an extension node; None for one that a codec of the session knows.
        """
        self._rewritten = rewritten
        self._count_partitions = count_partitions
        self._parse = parse
        self._interleaves = 0
        self._copied = 0

    def rewrite(self, node: Message, place: Place) -> None:
        """Rewrites a node and those below it, in place."""
        distributed = self._parse(node) if plan_proto.kind(node) == "extension" else None
        if distributed is None:
            self._rewritten.origins.append(Origin.KEPT)
            is_interleave = plan_proto.kind(node) == "interleave"
            self._interleaves += is_interleave
            for child in plan_proto.children(node):
                self.rewrite(child, place)
            self._interleaves -= is_interleave
        else:
            self._replace(node, distributed, place)

    def _replace(self, node: Message, distributed: nodes_pb2.Node, place: Place) -> None:
        match kind := distributed.WhichOneof("node"):
            case "shuffle" | "coalesce" | "network_broadcast":
                self._leave(node, kind, getattr(distributed, kind), place)
            case "children_isolator_union":
                self._unite(node, distributed.children_isolator_union, place)
            case "broadcast":
                self._repeat(node, distributed.broadcast.consumer_task_count, place)
            case "sampler":
                self._rewritten.origins.append(Origin.GONE)
                replace(node, only_input(node, "sampler"))
                self.rewrite(node, place)
            case _:
                raise InvalidPlan(f"the plan has a {kind} node, which coordinators of DataFusion 55 do not make")

    def _leave(self, node: Message, kind: str, network: nodes_pb2.Network, place: Place) -> None:
        found = leaf(node, kind, network, place, shows_partitioning=self._interleaves > 0)
        # Until the input has come, the plan has partitions, and no rows.
        found.node.empty.schema.CopyFrom(found.schema)
        found.node.empty.partitions = found.partitions
        self._rewritten.leaves.append(found)
        self._rewritten.origins.append(found)

    def _unite(self, node: Message, union: nodes_pb2.ChildrenIsolatorUnion, place: Place) -> None:
        """Makes a union of those inputs that are this task's, and of empty partitions, up to the node's number."""
        if place.index >= len(union.task_idx_map):
            raise InvalidPlan(f"a union has inputs for {len(union.task_idx_map)} tasks, none for task {place.index}")
        inputs = list(node.extension.inputs)
        chosen = union.task_idx_map[place.index].child_ctx
        if not inputs or any(child.child_idx >= len(inputs) for child in chosen):
            raise InvalidPlan(f"a union of {len(inputs)} inputs wants input {[child.child_idx for child in chosen]}")
        if union.partition_count > MAX_PARTITIONS:
            raise InvalidPlan(f"a union has {union.partition_count} partitions: {MAX_PARTITIONS} is the most")
        self._count_copies(sum(inputs[child.child_idx].ByteSize() for child in chosen) - node.ByteSize())
        empty = plan_proto.PhysicalPlanNode()
        empty.CopyFrom(inputs[0])
        sizes = [self._size(child) for child in inputs] if self.lists_all_inputs else [0] * len(inputs)
        united = plan_proto.PhysicalPlanNode()
        united.union.SetInParent()
        for child in chosen:
            united.union.inputs.add().CopyFrom(inputs[child.child_idx])
        replace(node, united)
        origins = self._rewritten.origins
        start = len(origins)
        partitions = 0
        listed = 0
        for child, part in zip(chosen, node.union.inputs, strict=True):
            origins += [Origin.GONE] * sum(sizes[listed : child.child_idx])
            first = len(origins)
            self.rewrite(part, Place(child.task_idx, child.task_count))
            if self.lists_all_inputs and child.child_idx < listed:
                origins[first:] = [Origin.ADDED for origin in origins[first:] if origin not in _NOT_EXECUTED]
            listed = max(listed, child.child_idx + 1)
            partitions += self._count_partitions(part)
        origins += [Origin.GONE] * sum(sizes[listed:])
        if partitions < union.partition_count:
            if chosen:
                empty.CopyFrom(node.union.inputs[0])
            else:
                end, leaves = len(origins), len(self._rewritten.leaves)
                self.rewrite(empty, Place(0, 1))
                del origins[end:], self._rewritten.leaves[leaves:]
            # One without rows, repartitioned: what is missing may be no multiple of what an input has.
            nothing = node.union.inputs.add()
            nothing.repartition.partitioning.round_robin = union.partition_count - partitions
            nothing.repartition.input.merge.input.CopyFrom(empty)
            nothing.repartition.input.merge.fetch = 0
            plan.empty_leaves(nothing)
            origins += [Origin.ADDED] * sum(1 for _ in plan_proto.nodes(nothing))
        if len(node.union.inputs) > 1:
            origins.insert(start, Origin.KEPT)
        else:
            # DataFusion makes none of a union of one.
            origins.insert(start, Origin.PASSED)

    def _size(self, node: Message) -> int:
        """How many nodes of a plan have figures."""
        return sum(distributed_kind(part) not in _NETWORK for part in plan_proto.nodes(node))

    def _repeat(self, node: Message, times: int, place: Place) -> None:
        """Makes a union of copies of a node: each is computed anew, where a coordinator left a broadcast in a plan."""
        self._rewritten.origins.append(Origin.GONE if times == 1 else Origin.KEPT)
        repeated = only_input(node, "broadcast")
        if not times:
            raise InvalidPlan("a broadcast node is for 0 tasks: one is the least")
        if times == 1:
            replace(node, repeated)
            self.rewrite(node, place)
            return
        self._count_copies((times - 1) * repeated.ByteSize())
        united = plan_proto.PhysicalPlanNode()
        for _ in range(times):
            united.union.inputs.add().CopyFrom(repeated)
        replace(node, united)
        for index, part in enumerate(node.union.inputs):
            start = len(self._rewritten.origins)
            self.rewrite(part, place)
            if index:
                self._rewritten.origins[start:] = [Origin.ADDED] * (len(self._rewritten.origins) - start)

    def _count_copies(self, size: int) -> None:
        """Adds bytes that the plan is about to get more."""
        self._copied += max(0, size)
        if self._copied > MAX_COPIES:
            raise InvalidPlan(f"the plan repeats its inputs too often: {MAX_COPIES} bytes of copies are the most")


def _strip_head(message: Message) -> None:
    """Takes away the head that a plan was made with: the tasks that read it say which it is to have."""
    if plan_proto.kind(message) == "repartition":
        replace(message, message.repartition.input)
    elif distributed_kind(message) == "broadcast":
        replace(message, only_input(message, "broadcast"))


def only_input(node: Message, kind: str) -> Message:
    """The input of an extension node that has one.

    Raises:
        InvalidPlan: it has none, or several.
    """
    if len(node.extension.inputs) != 1:
        raise InvalidPlan(f"a {kind} node has {len(node.extension.inputs)} inputs: it must have one")
    return node.extension.inputs[0]


def replace(node: Message, other: Message) -> None:
    """Makes a node what another is, which may be one of its parts."""
    copy = plan_proto.PhysicalPlanNode()
    copy.CopyFrom(other)
    node.CopyFrom(copy)
