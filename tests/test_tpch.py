"""The 22 queries of TPC-H: what the worker streams is what DataFusion answers in process."""

from typing import Any

import pyarrow as pa
import pytest
from conftest import tpch_query
from datafusion import DataFrame, ExecutionPlan, SessionContext
from support import do_get, fetch, fetch_one, stage_key

from worker import plan_proto
from worker.testing import running_worker

PARTITIONS = 4

QUERIES = [pytest.param(number, id=f"q{number}") for number in range(1, 23)]
AGGREGATES_OF_EVERYTHING = {6, 14, 17, 19}
GROUPED_QUERIES = [pytest.param(n, id=f"q{n}") for n in range(1, 23) if n not in AGGREGATES_OF_EVERYTHING]
# Those whose ORDER BY leaves open in which order rows with equal sums or prices come.
WITHOUT_TOTAL_ORDER = {3, 5, 10, 11, 18}

KEYED = pytest.mark.parametrize("keyed", [True, False], ids=["stage key", "no key"])


def frame(session: SessionContext, number: int, *, ordered: bool) -> DataFrame:
    """A query with or without its ORDER BY, which makes DataFusion merge all partitions into one."""
    *before, query = (statement for statement in tpch_query(number) if not statement.strip().startswith("drop"))
    for statement in before:
        session.sql(statement).collect()
    return session.sql(query if ordered else query.partition("order by")[0])


def many_partitions(query: DataFrame) -> ExecutionPlan:
    """The query's plan or, where it merges all partitions, the node below that does not."""
    plan = query.execution_plan()
    while plan.partition_count < PARTITIONS:
        (plan,) = plan.children()
    return plan


def executed(session: SessionContext, plan: ExecutionPlan) -> list[pa.RecordBatch]:
    """The batches of all partitions of a plan, executed here."""
    return [
        batch.to_pyarrow() for partition in range(plan.partition_count) for batch in session.execute(plan, partition)
    ]


def rows(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def in_any_order(table: pa.Table) -> list[tuple[Any, ...]]:
    return sorted(rows(table), key=repr)


@KEYED
@pytest.mark.parametrize("number", QUERIES)
async def test_a_query_has_the_answer_of_datafusion(tpch: SessionContext, number: int, keyed: bool) -> None:
    query = frame(tpch, number, ordered=True)
    plan = query.execution_plan()
    expected = query.to_arrow_table()
    assert plan.partition_count == 1
    assert expected.num_rows > 0
    async with running_worker() as worker:
        table = await fetch_one(worker, do_get(plan.to_bytes(), 0, stage_key() if keyed else None))
    assert table.schema.equals(query.schema(), check_metadata=True)
    order = in_any_order if number in WITHOUT_TOTAL_ORDER else rows
    assert order(table) == order(expected)


@KEYED
@pytest.mark.parametrize("number", QUERIES)
async def test_partitions_fetched_in_parallel_are_together_the_answer_of_datafusion(
    tpch: SessionContext, number: int, keyed: bool
) -> None:
    query = frame(tpch, number, ordered=False)
    plan = many_partitions(query)
    # The plan is made with DataFusion's defaults; these are for its execution here, one partition after the other.
    tpch.sql("SET datafusion.execution.enable_file_stream_work_stealing = false")
    tpch.sql("SET datafusion.optimizer.enable_dynamic_filter_pushdown = false")
    expected = pa.Table.from_batches(executed(tpch, many_partitions(query)))
    if number not in AGGREGATES_OF_EVERYTHING:
        assert expected.schema.equals(query.schema(), check_metadata=True)
    assert plan.partition_count == PARTITIONS
    key = stage_key() if keyed else None
    async with running_worker() as worker:
        tables = await fetch(worker, [do_get(plan.to_bytes(), partition, key) for partition in range(PARTITIONS)])
        assert worker.worker.statistics().plans_decoded == (1 if keyed else PARTITIONS)
    for table in tables:
        assert table.schema.equals(expected.schema, check_metadata=True)
    assert in_any_order(pa.concat_tables(tables)) == in_any_order(expected)


@pytest.mark.parametrize("number", GROUPED_QUERIES)
async def test_empty_partitions_arrive_as_their_exact_schema(tpch: SessionContext, number: int) -> None:
    query = frame(tpch, number, ordered=False)
    message = plan_proto.parse(query.execution_plan().to_bytes())
    for node in plan_proto.nodes(message):
        if plan_proto.kind(node) == "parquet_scan":
            for group in node.parquet_scan.base_conf.file_groups:
                group.ClearField("files")
    plan, key = message.SerializeToString(), stage_key()
    async with running_worker() as worker:
        tables = await fetch(worker, [do_get(plan, partition, key) for partition in range(PARTITIONS)])
    for table in tables:
        assert table.num_rows == 0
        assert table.schema.equals(query.schema(), check_metadata=True)


async def test_a_ticket_is_read_whoever_encoded_it(tpch: SessionContext) -> None:
    """The bytes are written down here, so that no protobuf library has a part in them."""
    query = frame(tpch, 1, ordered=True)
    plan = query.execution_plan().to_bytes()
    length = bytes([len(plan) & 0x7F | 0x80, len(plan) >> 7])
    assert 128 <= len(plan) < 128**2
    key = b"\x0a\x10" + bytes(range(16)) + b"\x10\x05\x18\x03"
    ticket = b"\x0a" + length + plan + b"\x10\x03\x18\x07\x20\x00\x2a" + bytes([len(key)]) + key
    async with running_worker() as worker:
        table = await fetch_one(worker, ticket)
    assert rows(table) == rows(query.to_arrow_table())
