"""Plans whose partitions can be executed one by one.

Some joins know only when *all* partitions of an instance have been read which rows of their left side found a match,
and give those that did (or did not) to whichever partition ends last: nested loop joins, and hash joins that collect
their left side, whose results have such rows (left, full, left semi, left anti and left mark joins). Executed alone,
no partition has them; read in another order, another one has. Plans are rewritten here so that a partition is a
function of the plan and the data alone.
"""

from collections.abc import Iterator

from datafusion import ExecutionPlan, SessionContext

from worker import plan, plan_proto
from worker.plan_proto import Message, PhysicalPlanNode

# Nodes that execute all partitions of their input themselves, whichever of their own are executed.
_EXCHANGES = frozenset({"repartition", "merge", "sort_preserving_merge"})

_GIVES_LEFT_ROWS = frozenset(
    plan_proto.JOIN_TYPES[name] for name in ("LEFT", "FULL", "LEFTSEMI", "LEFTANTI", "LEFTMARK")
)
_COLLECT_LEFT = plan_proto.PARTITION_MODES["COLLECT_LEFT"]
_PARTITIONED = plan_proto.PARTITION_MODES["PARTITIONED"]


def make_partitions_independent(session: SessionContext, message: Message) -> bool:
    """Rewrites a plan so that each of its partitions has the same rows however the others are executed.

    The number of partitions stays. Blocks for some milliseconds if there is something to rewrite, which it returns.

    Raises:
        InvalidPlan, EnginePanicked: as ``plan.decode``.
    """
    joins = list(_joins_over_partitions(message, ()))
    for join, subqueries in joins:
        _separate(session, join, subqueries)
    return bool(joins)


def counterparts(before: ExecutionPlan, after: ExecutionPlan) -> Iterator[ExecutionPlan | None]:
    """For each node of a plan, parents first, the node that it is in the plan that was made of it here.

    Nodes are only added, and copies stand behind what they are of: so it is the next one of the same kind.
    """
    nodes = list(plan.walk(after))
    place = 0
    for node in plan.walk(before):
        kind = _kind(node)
        found = next((index for index in range(place, len(nodes)) if _kind(nodes[index]) == kind), None)
        yield None if found is None else nodes[found]
        place = place if found is None else found + 1


def _kind(node: ExecutionPlan) -> str:
    return node.display().partition(":")[0]


def _joins_over_partitions(
    node: Message, subqueries: tuple[Message, ...]
) -> Iterator[tuple[Message, tuple[Message, ...]]]:
    """The joins to be rewritten, each with the ``scalar_subquery`` nodes around it that it may refer to."""
    match plan_proto.kind(node):
        case exchange if exchange in _EXCHANGES:
            return
        case "hash_join" if (
            node.hash_join.partition_mode == _COLLECT_LEFT and node.hash_join.join_type in _GIVES_LEFT_ROWS
        ):
            yield node, subqueries
        case "nested_loop_join" if node.nested_loop_join.join_type in _GIVES_LEFT_ROWS:
            yield node, subqueries
        case "scalar_subquery":
            yield from _joins_over_partitions(node.scalar_subquery.input, (*subqueries, node))
        case _:
            for child in plan_proto.children(node):
                yield from _joins_over_partitions(child, subqueries)


def _partition_count(session: SessionContext, node: Message, subqueries: tuple[Message, ...]) -> int:
    for subquery in reversed(subqueries):
        around = PhysicalPlanNode()
        around.CopyFrom(subquery)
        around.scalar_subquery.input.CopyFrom(node)
        node = around
    return plan.decode(session, node.SerializeToString()).partition_count


def _separate(session: SessionContext, node: Message, subqueries: tuple[Message, ...]) -> None:
    join = getattr(node, plan_proto.kind(node) or "")
    partitions = _partition_count(session, join.right, subqueries)
    if partitions == 1:
        return
    if plan_proto.kind(node) == "hash_join" and not join.null_aware:
        # As DataFusion joins what is too large to collect: each partition has the rows of its own keys, of both sides.
        join.partition_mode = _PARTITIONED
        _repartition(join.left, [on.left for on in join.on], partitions)
        _repartition(join.right, [on.right for on in join.on], partitions)
    else:
        # There is no such way: the first partition has all rows, and the others those of a copy that has none.
        plan_proto.wrap(join.right, lambda wrapper: wrapper.merge.input)
        nothing = PhysicalPlanNode()
        nothing.repartition.partitioning.round_robin = partitions - 1
        nothing.repartition.input.merge.input.CopyFrom(node)
        nothing.repartition.input.merge.fetch = 0
        plan.empty_leaves(nothing)
        plan_proto.wrap(node, lambda wrapper: wrapper.union.inputs.add())
        node.union.inputs.add().CopyFrom(nothing)


def _repartition(node: Message, expressions: list[Message], partitions: int) -> None:
    plan_proto.wrap(node, lambda wrapper: wrapper.repartition.input)
    node.repartition.partitioning.hash.partition_count = partitions
    node.repartition.partitioning.hash.hash_expr.extend(expressions)
