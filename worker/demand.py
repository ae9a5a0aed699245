"""What a task needs to be admitted, told from its plan."""

from worker import plan_proto
from worker.admission import Demand
from worker.errors import InvalidPlan
from worker.executor import SMALL_PLAN
from worker.ticket import StageKey

# Of a pool without a limit: more than any worker has, so that such a task runs alone.
NO_LIMIT = 1 << 64

# Nodes that pass on what they read and take nothing from the memory pool. A plan of these alone needs no place in
# memory, so that readers that are slow keep no others away.
STREAMING_NODES = frozenset(
    {
        "arrow_scan",
        "avro_scan",
        "coalesce_batches",
        "cooperative",
        "csv_scan",
        "empty",
        "filter",
        "generate_series",
        "global_limit",
        "json_scan",
        "local_limit",
        "memory_scan",
        "merge",
        "parquet_scan",
        "placeholder_row",
        "projection",
        "union",
    }
)


def demand_of(principal: str, key: StageKey | None, plan_bytes: bytes, memory: int | None, age: int | None) -> Demand:
    """What a task needs to run.

    Args:
        principal: who asks.
        key: which task of which query it is; without one, it is of none.
        plan_bytes: its plan.
        memory: bytes of its pool; None for one without a limit.
        age: when its query began, the less the longer ago, if tasks on other workers depend on it.
    """
    size = len(plan_bytes)
    if size <= SMALL_PLAN and _is_streaming(plan_bytes):
        return Demand(principal, object(), 0, size)
    pool = NO_LIMIT if memory is None else memory
    if key is None:
        return Demand(principal, object(), pool, size)
    return Demand(principal, (principal, key.query_id), pool, size, None if age is None else (age, key.query_id.int))


def _is_streaming(plan_bytes: bytes) -> bool:
    try:
        message = plan_proto.parse(plan_bytes)
    except InvalidPlan:
        # Whoever is to decode it says so.
        return False
    return all(plan_proto.kind(node) in STREAMING_NODES for node in plan_proto.nodes(message))
