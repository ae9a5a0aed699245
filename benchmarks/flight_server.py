"""``python -m benchmarks.flight_server``: the least that serves the worker's tickets with ``pyarrow.flight``."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
from datafusion import ExecutionPlan, RecordBatchStream
from pyarrow import flight

from worker import PlanTicket, SessionStateBuilder


class FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """Executes a partition of a plan. A C++ thread of its own pulls, encodes and sends each stream."""

    def do_get(self, context: Any, ticket: Any) -> flight.GeneratorStream:
        request = PlanTicket.from_bytes(ticket.ticket)
        # The same two options as the worker's sessions have: without them, partitions have each other's rows.
        session = SessionStateBuilder().build()
        plan = ExecutionPlan.from_bytes(session, request.plan)
        batches = _batches(session.execute(plan, request.partition))
        # Nothing but a batch tells the schema. Every plan of these benchmarks has one.
        first = next(batches)
        # Measured to be as fast as a RecordBatchStream over a RecordBatchReader, or faster.
        return flight.GeneratorStream(first.schema, chain((first,), batches))


def _batches(stream: RecordBatchStream) -> Iterator[pa.RecordBatch]:
    return (batch.to_pyarrow() for batch in stream)


def main() -> None:
    server = FlightServer("grpc://127.0.0.1:0")
    print(f"listening on grpc://127.0.0.1:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
