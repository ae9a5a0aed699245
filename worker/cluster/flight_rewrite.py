"""Distributed plans of tickets into plans that DataFusion executes.

They are those of Distributed DataFusion when its workers spoke Arrow Flight (datafusion-contrib/datafusion-distributed,
commit 9509b85d, ``src/execution_plans``). All tasks of a stage have one plan there, whose nodes look at which task runs
them.
"""

from collections.abc import Callable
from functools import partial

from worker import plan_proto
from worker.cluster import nodes
from worker.cluster.nodes import Place
from worker.cluster.rewrite import Origin, Rewriter, Rewritten, only_input, replace
from worker.errors import InvalidPlan
from worker.plan_proto import Message
from worker.proto import nodes_pb2

# Nodes whose partitions are those of their input, row by row: without input they have no rows.
_KEEPS_PARTITIONS = frozenset(
    {"projection", "filter", "coalesce_batches", "cooperative", "buffer", "local_limit", "unnest"}
)


def rewrite(
    message: Message, place: Place, count_partitions: Callable[[Message], int], *, is_coordinated: bool
) -> Rewritten:
    """The plan of a task. The message is changed.

    Args:
        message: the ticket's plan.
        place: which task it is.
        count_partitions: how many partitions a part of the plan has, whose leaves are empty.
        is_coordinated: whether a coordinator has made the ticket, which wraps what users' codecs have written.

    Raises:
        InvalidPlan: a node makes no sense, or not in a ticket.
    """
    rewritten = Rewritten(message)
    _Rewriter(rewritten, count_partitions, partial(nodes.parse_in_ticket, is_coordinated=is_coordinated)).rewrite(
        message, place
    )
    return rewritten


class _Rewriter(Rewriter):
    lists_all_inputs = True

    def _replace(self, node: Message, distributed: nodes_pb2.Node, place: Place) -> None:
        match distributed.WhichOneof("node"):
            case "shuffle":
                self._leave(node, "shuffle", distributed.shuffle, place)
            case "coalesce":
                if place.index:
                    raise InvalidPlan(f"a coalesce node reads all of its input, so task {place.index} can have none")
                self._leave(node, "coalesce", distributed.coalesce, Place(0, 1))
            case "partition_isolator":
                self._isolate(node, distributed.partition_isolator.n_tasks, place)
            case "children_isolator_union":
                self._unite(node, distributed.children_isolator_union, place)
            case kind:
                raise InvalidPlan(f"the plan has a {kind} node, which is not for plans in tickets")

    def _isolate(self, node: Message, tasks: int, place: Place) -> None:
        """Leaves a node's input with those partitions that are this task's, and empty ones after them."""
        isolated = only_input(node, "partition_isolator")
        source = isolated
        while (kind := plan_proto.kind(source)) in _KEEPS_PARTITIONS:
            source = getattr(source, kind).input
        count = _partition_count(source)
        if not tasks or place.index >= place.count:
            raise InvalidPlan(f"a partition_isolator for {tasks} tasks is in task {place.index} of {place.count}")
        size, larger = divmod(count, place.count)
        first = place.index * size + min(place.index, larger)
        chosen = range(first, first + size + (place.index < larger))
        partitions = -(-count // tasks)
        if len(chosen) > partitions:
            raise InvalidPlan(
                f"a partition_isolator for {tasks} tasks has {partitions} partitions, and task {place.index} of "
                f"{place.count} has {len(chosen)} of its input's {count}"
            )
        _keep(source, chosen, partitions)
        self._rewritten.origins.append(Origin.GONE)
        replace(node, isolated)
        self.rewrite(node, place)


def _partition_count(source: Message) -> int:
    match plan_proto.kind(source):
        case scan if scan in plan_proto.FILE_SCANS:
            return len(getattr(source, scan).base_conf.file_groups)
        case "memory_scan":
            return len(source.memory_scan.partitions)
        case "empty":
            return int(source.empty.partitions)
        case kind:
            name = nodes.distributed_kind(source) or kind
            raise InvalidPlan(
                f"a partition_isolator is over a {name} node: this worker divides scans, and what leaves their "
                "partitions as they are"
            )


def _keep(source: Message, chosen: range, partitions: int) -> None:
    """Leaves a source with some of its partitions, and so many empty ones after them that it has ``partitions``."""
    missing = partitions - len(chosen)
    match plan_proto.kind(source):
        case scan if scan in plan_proto.FILE_SCANS:
            conf = getattr(source, scan).base_conf
            del conf.file_groups[chosen.stop :]
            del conf.file_groups[: chosen.start]
            for _ in range(missing):
                conf.file_groups.add()
            conf.ClearField("output_partitioning")
        case "memory_scan":
            kept = source.memory_scan.partitions[chosen.start : chosen.stop]
            source.memory_scan.partitions[:] = [*kept, *[b""] * missing]
        case "empty":
            source.empty.partitions = partitions
