"""Functions in Python for SQL that a coordinator of a cluster plans.

``python -m worker --session-builder examples.cluster_functions:build_state``, on every worker of the cluster. The coordinator
knows ``twice(Int64) -> Int64``, and ``mysum(Float64) -> Float64`` with a state of one ``Float64``, by names and types alone.
"""

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import SessionContext, udaf, udf
from datafusion.user_defined import Accumulator

from worker import PermissionDenied, WorkerQueryContext


class Sum(Accumulator):
    """Adds up: partial sums on the workers that read, their sums on those that they are shuffled to."""

    def __init__(self) -> None:
        self._sum = 0.0

    def update(self, *values: pa.Array) -> None:
        """Adds rows."""
        self._sum += pc.sum(values[0]).as_py() or 0.0

    def merge(self, states: list[pa.Array]) -> None:
        """Adds the sums of others."""
        self.update(states[0])

    def state(self) -> list[pa.Scalar]:
        """What others are to add."""
        return [pa.scalar(self._sum, pa.float64())]

    def evaluate(self) -> pa.Scalar:
        """The sum."""
        return pa.scalar(self._sum, pa.float64())


twice = udf(lambda values: pc.multiply(values, 2), [pa.int64()], pa.int64(), "volatile", "twice")
mysum = udaf(Sum, [pa.float64()], pa.float64(), [pa.float64()], "immutable", "mysum")


async def build_state(ctx: WorkerQueryContext) -> SessionContext:
    """Adds both, for whoever does not send a wrong token: headers that the coordinator passes through come here."""
    if ctx.headers.get("authorization", "Bearer right") != "Bearer right":
        raise PermissionDenied("nobody has this token")
    return ctx.builder.with_scalar_functions([twice]).with_aggregate_functions([mysum]).build()
