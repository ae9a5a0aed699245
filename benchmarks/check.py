"""What the check of a plan costs, beside reading and decoding it: all queries of TPC-H, and plans of other shapes.

Run with ``python -m benchmarks.check``; it takes some seconds.
"""

import time
from collections.abc import Callable
from statistics import median

from datafusion import SessionContext

from benchmarks.plans import tpch_plans
from benchmarks.report import print_table
from worker import plan, plan_proto
from worker.check import check
from worker.config import PlanLimits

ROUNDS = 50


def main() -> None:
    session = SessionContext()
    session.sql("CREATE TABLE t AS VALUES (1, 'a')").collect()
    print_table(
        f"The check of plans: ms, medians of {ROUNDS}",
        ("plan", "bytes", "protobuf", "check", "decode"),
        [_row(session, name, data) for name, data in {**tpch_plans(), **_others(session)}.items()],
    )


def _others(session: SessionContext) -> dict[str, bytes]:
    numbers = ", ".join(map(str, range(20_000)))
    conditions = " OR ".join(f"(column1 = {number} AND column2 = '{number}')" for number in range(500))
    queries = {
        "20,000 in a list": f"SELECT * FROM t WHERE column1 IN ({numbers})",
        "500 ORs": f"SELECT * FROM t WHERE {conditions}",
        "1,000 columns": "SELECT " + ", ".join(f"column1 + {number}" for number in range(1000)) + " FROM t",
    }
    return {name: session.sql(query).execution_plan().to_bytes() for name, query in queries.items()}


def _row(session: SessionContext, name: str, data: bytes) -> tuple[str, ...]:
    message = plan_proto.parse(data)
    limits = PlanLimits()
    times = (
        _milliseconds(lambda: plan_proto.parse(data)),
        _milliseconds(lambda: check(message, limits)),
        _milliseconds(lambda: plan.decode(session, data)),
    )
    return name, f"{len(data):,}", *(f"{each:.3f}" for each in times)


def _milliseconds(call: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    return median(once() for _ in range(ROUNDS))


if __name__ == "__main__":
    main()
