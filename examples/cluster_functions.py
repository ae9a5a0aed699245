"""Python functions for a cluster of Distributed DataFusion: every worker has them, a coordinator knows their types.

    python -m worker --port 8001 --session-builder examples.cluster_functions:build_state
    python -m worker --port 8002 --session-builder examples.cluster_functions:build_state

The coordinator, a Rust program, plans ``SELECT city, mysum(twice(amount)) … GROUP BY city`` over these workers once it
has registered functions of the same names and types. It never calls them, so they may do nothing but fail. ``mysum`` is
computed in two steps, the second of which may be on another worker: what travels is ``state``.
"""

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import Accumulator, SessionContext, udaf, udf

from worker import WorkerQueryContext


class Sum(Accumulator):
    """Adds up; 0 for no rows."""

    def __init__(self) -> None:
        self._sum = 0.0

    def update(self, *values: pa.Array) -> None:
        """Takes rows."""
        self._sum += pc.sum(values[0]).as_py() or 0.0

    def merge(self, states: list[pa.Array]) -> None:
        """Takes what other accumulators gave as their state, one a row."""
        self.update(states[0])

    def state(self) -> list[pa.Scalar]:
        """What ``merge`` takes, of the types that the function was declared with."""
        return [pa.scalar(self._sum)]

    def evaluate(self) -> pa.Scalar:
        """The result."""
        return pa.scalar(self._sum)


TWICE = udf(lambda values: pc.multiply(values, 2), [pa.int64()], pa.int64(), "immutable", "twice")
MYSUM = udaf(Sum, [pa.float64()], pa.float64(), [pa.float64()], "immutable", "mysum")


async def build_state(ctx: WorkerQueryContext) -> SessionContext:
    """A session that has both."""
    return ctx.builder.with_scalar_functions([TWICE]).with_aggregate_functions([MYSUM]).build()
