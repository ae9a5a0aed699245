"""Distributed plans into plans that DataFusion executes, and back: which node of the one is which of the other.

A network node becomes a scan of what was fetched for it, which is put there once it has come.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from datafusion import ExecutionPlan

from worker import plan, plan_proto
from worker.cluster.nodes import Head, Leaf, Place, distributed_kind, leaf, parse
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
    _Rewriter(rewritten, count_partitions).rewrite(message, place)
    return rewritten


def with_head(message: Message, head: Head) -> tuple[Message, Origins]:
    """A copy of a plan below its head, and what the coordinator's head node is in it."""
    headed = plan_proto.PhysicalPlanNode()
    if isinstance(head, worker_pb2.RepartitionExecHead):
        partitioning = plan_proto.Partitioning.FromString(head.partitioning)
        if partitioning.WhichOneof("partition_method") is None:
            raise InvalidPlan("the task's head has no partitioning: it must be a datafusion.Partitioning")
        headed.repartition.partitioning.CopyFrom(partitioning)
        headed.repartition.input.CopyFrom(message)
        return headed, [Origin.KEPT]
    headed.CopyFrom(message)
    return headed, [Origin.GONE] if isinstance(head, worker_pb2.BroadcastExecHead) else []


def executed(instance: ExecutionPlan, origins: Origins) -> Iterator[tuple[ExecutionPlan | None, Origin | Leaf]]:
    """For each of the coordinator's nodes: the node that was executed, if there is one, and what became of it."""
    nodes = list(_walk(instance))
    place = 0
    for origin in origins:
        node = nodes[place] if place < len(nodes) and origin is not Origin.GONE else None
        if origin is not Origin.ADDED:
            yield node, origin
        if origin not in {Origin.GONE, Origin.PASSED}:
            place += 1


def _walk(instance: ExecutionPlan) -> Iterator[ExecutionPlan]:
    yield instance
    for child in instance.children():
        yield from _walk(child)


class _Rewriter:
    def __init__(self, rewritten: Rewritten, count_partitions: Callable[[Message], int]) -> None:
        self._rewritten = rewritten
        self._count_partitions = count_partitions
        self._interleaves = 0

    def rewrite(self, node: Message, place: Place) -> None:
        """Rewrites a node and those below it, in place."""
        distributed = parse(node) if plan_proto.kind(node) == "extension" else None
        if distributed is None:
            self._rewritten.origins.append(Origin.KEPT)
            is_interleave = plan_proto.kind(node) == "interleave"
            self._interleaves += is_interleave
            for child in plan_proto.children(node):
                self.rewrite(child, place)
            self._interleaves -= is_interleave
            return
        match kind := distributed.WhichOneof("node"):
            case "shuffle" | "coalesce" | "network_broadcast":
                self._leave(
                    leaf(node, kind, getattr(distributed, kind), place, shows_partitioning=self._interleaves > 0)
                )
            case "children_isolator_union":
                self._unite(node, distributed.children_isolator_union, place)
            case "broadcast":
                self._repeat(node, distributed.broadcast.consumer_task_count, place)
            case "sampler":
                self._rewritten.origins.append(Origin.GONE)
                _replace(node, _only_input(node, "sampler"))
                self.rewrite(node, place)
            case _:
                raise InvalidPlan(f"the plan has a {kind} node, which coordinators of DataFusion 55 do not make")

    def _leave(self, found: Leaf) -> None:
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
        empty = plan_proto.PhysicalPlanNode()
        empty.CopyFrom(inputs[0])
        united = plan_proto.PhysicalPlanNode()
        united.union.SetInParent()
        for child in chosen:
            united.union.inputs.add().CopyFrom(inputs[child.child_idx])
        _replace(node, united)
        origins = self._rewritten.origins
        start = len(origins)
        partitions = 0
        for child, part in zip(chosen, node.union.inputs, strict=True):
            self.rewrite(part, Place(child.task_idx, child.task_count))
            partitions += self._count_partitions(part)
        if partitions < union.partition_count:
            nothing = Rewritten(empty)
            _Rewriter(nothing, self._count_partitions).rewrite(empty, Place(0, 1))
            plan.empty_leaves(empty)
            each = self._count_partitions(empty)
            while partitions < union.partition_count:
                node.union.inputs.add().CopyFrom(empty)
                origins += [Origin.ADDED] * sum(1 for _ in plan_proto.nodes(empty))
                partitions += each
        if len(node.union.inputs) > 1:
            origins.insert(start, Origin.KEPT)
        else:
            # DataFusion makes none of a union of one.
            origins.insert(start, Origin.PASSED)

    def _repeat(self, node: Message, times: int, place: Place) -> None:
        """Makes a union of copies of a node: each is computed anew, where a coordinator left a broadcast in a plan."""
        self._rewritten.origins.append(Origin.GONE if times == 1 else Origin.KEPT)
        repeated = _only_input(node, "broadcast")
        if times == 1:
            _replace(node, repeated)
            self.rewrite(node, place)
            return
        united = plan_proto.PhysicalPlanNode()
        for _ in range(times):
            united.union.inputs.add().CopyFrom(repeated)
        _replace(node, united)
        for index, part in enumerate(node.union.inputs):
            start = len(self._rewritten.origins)
            self.rewrite(part, place)
            if index:
                self._rewritten.origins[start:] = [Origin.ADDED] * (len(self._rewritten.origins) - start)


def _strip_head(message: Message) -> None:
    """Takes away the head that a plan was made with: the tasks that read it say which it is to have."""
    if plan_proto.kind(message) == "repartition":
        _replace(message, message.repartition.input)
    elif distributed_kind(message) == "broadcast":
        _replace(message, _only_input(message, "broadcast"))


def _only_input(node: Message, kind: str) -> Message:
    if len(node.extension.inputs) != 1:
        raise InvalidPlan(f"a {kind} node has {len(node.extension.inputs)} inputs: it must have one")
    return node.extension.inputs[0]


def _replace(node: Message, other: Message) -> None:
    """Makes a node what another is, which may be one of its parts."""
    copy = plan_proto.PhysicalPlanNode()
    copy.CopyFrom(other)
    node.CopyFrom(copy)
