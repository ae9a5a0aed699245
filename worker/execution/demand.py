"""What a task needs to be admitted, told from its plan."""

from collections.abc import Set

from worker.execution.admission import Demand
from worker.execution.executor import SMALL_PLAN
from worker.ticket import StageKey

# Of a pool without a limit: more than any worker has, so that such a task runs alone.
NO_LIMIT = 1 << 64

# Tickets do not say when their query began: those of coordinators count as younger than all others.
LAST_AGE = 1 << 64

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


def demand_of(
    principal: str, key: StageKey | None, size: int, nodes: Set[str] | None, memory: int | None, age: int | None
) -> Demand:
    """What a task needs to run.

    Args:
        principal: who asks.
        key: which task of which query it is; without one, it is of none.
        size: of its plan, in bytes.
        nodes: the kinds of nodes that the plan has; None if they are not known.
        memory: bytes of its pool; None for one without a limit.
        age: when its query began, the less the longer ago, if tasks on other workers depend on it.
    """
    if size <= SMALL_PLAN and nodes is not None and nodes <= STREAMING_NODES:
        return Demand(principal, object(), 0, size)
    pool = NO_LIMIT if memory is None else memory
    if key is None:
        return Demand(principal, object(), pool, size)
    return Demand(principal, (principal, key.query_id), pool, size, None if age is None else (age, key.query_id.int))
