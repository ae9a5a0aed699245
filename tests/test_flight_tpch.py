"""The 22 queries of TPC-H in stages that two workers read from each other by ``DoGet``."""

import pyarrow as pa
import pytest
from conftest import tpch_query
from datafusion import SessionContext
from flight_plans import METRICS, Coordinator, ticket, url
from support import fetch_one, metadata_of

from worker import plan_proto
from worker.plan_proto import Message
from worker.proto import plan_pb2
from worker.testing import running_worker

# As those coordinators planned: joins that repartition both sides, and subqueries that are joins.
OPTIONS = {
    "hash_join_single_partition_threshold": "0",
    "hash_join_single_partition_threshold_rows": "0",
    "enable_physical_uncorrelated_scalar_subquery": "false",
}


def _planned(session: SessionContext, number: int) -> tuple[Message, pa.Table]:
    """The plan of a query, and its answer."""
    for option, value in OPTIONS.items():
        session.sql(f"SET datafusion.optimizer.{option} = {value}")
    *before, query = (statement for statement in tpch_query(number) if not statement.strip().startswith("drop"))
    for statement in before:
        session.sql(statement).collect()
    frame = session.sql(query)
    return plan_proto.parse(frame.execution_plan().to_bytes()), frame.to_arrow_table()


def _rows(table: pa.Table) -> list[str]:
    return sorted(map(str, table.to_pylist()))


@pytest.mark.parametrize("number", range(1, 23))
async def test_two_workers_answer_as_datafusion_does(tpch: SessionContext, number: int) -> None:
    planned, expected = _planned(tpch, number)
    async with running_worker() as one, running_worker() as other:
        for headers in ([], [METRICS]):
            coordinator = Coordinator(tpch, [url(one), url(other)])
            plan = coordinator.distribute(planned)
            assert len(coordinator.sizes) > 2
            key = plan_pb2.StageKey(query_id=coordinator.query.bytes)
            head = ticket(plan, 0, 0, 1, key)
            assert _rows(await fetch_one(one, head, headers)) == _rows(expected)
            assert one.worker.statistics().tasks == other.worker.statistics().tasks == 0

        told = plan_pb2.FlightAppMetadata.FromString((await metadata_of(one, head, [METRICS]))[-1])
        tasks = told.metrics_collection.tasks
        sizes = {(task.stage_key.stage_id, task.stage_key.task_number): len(task.metrics) for task in tasks}
        assert sizes == coordinator.sizes
        assert {task.stage_key.query_id for task in tasks} == {coordinator.query.bytes}
