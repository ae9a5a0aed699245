"""Partitions that nobody will read, dropped so that nothing is buffered for them."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from datafusion import ExecutionPlan, RecordBatchStream

from worker.execution.stream import let_go

# A partition that nobody will read is polled before it is dropped: only then does a RepartitionExec know that nobody
# reads it, and stops to buffer for it. The poll happens in DataFusion's runtime, at once unless that is busy.
ABANDON_SECONDS = 0.2


def repartitions(node: ExecutionPlan, first: int = 0) -> Iterator[tuple[ExecutionPlan, int]]:
    """The nodes whose partitions go through to those of the root, and which of those their partition 0 goes to.

    Only those that buffer: a ``RepartitionExec`` sends to all its partitions, read or not. A ``ScalarSubqueryExec``
    stands for those below it, which fail when they are executed before its subqueries are.
    """
    name = node.display().partition(":")[0]
    if name in {"RepartitionExec", "ScalarSubqueryExec"}:
        yield node, first
    elif name == "UnionExec":
        for child in node.children():
            yield from repartitions(child, first)
            first += child.partition_count
    elif name not in {"CoalescePartitionsExec", "SortPreservingMergeExec"}:
        for child in node.children():
            # An input with another number of partitions is one that the node collects.
            if child.partition_count == node.partition_count:
                yield from repartitions(child, first)


async def drop_unread(executions: Sequence[asyncio.Future[RecordBatchStream]]) -> None:
    """Drops streams that nobody will read, so that nothing is kept for them."""
    await asyncio.wait(executions)
    reads: list[asyncio.Future[Any]] = [
        execution.result().rbs.__anext__()
        for execution in executions
        if not execution.cancelled() and execution.exception() is None
    ]
    try:
        if reads:
            await asyncio.wait(reads, timeout=ABANDON_SECONDS)
    finally:
        for read in reads:
            let_go(read)
