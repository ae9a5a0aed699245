"""Numbers of partitions and rows: memory is taken for each, before there is one."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from fuzz.building import (
    FILES,
    X,
    column,
    file_scan,
    fill,
    joined,
    node,
    numbers,
    planned,
    repeated,
    schema,
    series,
)
from fuzz.cases import Kind
from fuzz.recipes.recipe import I32, I64, U32, U64, Recipe, recipe
from worker import plan_proto


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _partitions()
    yield from _rows()


def _partitions() -> Iterator[Recipe]:
    """Memory is taken for each partition, before there is a row."""
    about = "memory for each of its partitions"
    empty = schema(pa.int64())
    for name, count in (("2_32", U32), ("2_24", 1 << 24)):
        yield recipe(f"empty_partitions_{name}", about, node("empty", schema=empty, partitions=count))
        yield recipe(
            f"placeholder_row_partitions_{name}", about, node("placeholder_row", schema=empty, partitions=count)
        )
        for kind in ("round_robin", "unknown"):
            plan = node("repartition", numbers(), partitioning={kind: count})
            yield recipe(f"repartition_{kind}_{name}", about, plan)
        hashed = {"hash": {"hash_expr": [X], "partition_count": count}}
        yield recipe(f"repartition_hash_{name}", about, node("repartition", numbers(), partitioning=hashed))
    for kind in ("round_robin", "unknown"):
        plan = node("repartition", numbers(), partitioning={kind: U64})
        yield recipe(f"repartition_{kind}_2_64", about, plan)
    hashed = {"hash": {"hash_expr": [X], "partition_count": U64}}
    yield recipe("repartition_hash_2_64", about, node("repartition", numbers(), partitioning=hashed))
    nested = numbers()
    for _ in range(4):
        nested = node("repartition", nested, partitioning={"round_robin": 1000})
    yield recipe("repartitions_in_each_other", "a channel for each pair of partitions, four times", nested)
    yield recipe("empty_partitions_0", "no partition, but one is read", node("empty", schema=empty, partitions=0))
    for kind in ("round_robin", "unknown"):
        plan = node("repartition", numbers(), partitioning={kind: 0})
        yield recipe(f"repartition_{kind}_0", "rows are dealt out to nobody", plan)
    hashed = {"hash": {"hash_expr": [X], "partition_count": 0}}
    yield recipe("repartition_hash_0", "a remainder by zero", node("repartition", numbers(), partitioning=hashed))
    for kind in ("repartition_hash", "coalesced_hash"):
        plan = node("repartition", numbers(), partitioning={"hash": {"hash_expr": [X], "partition_count": U32}})
        plan = plan if kind.startswith("repartition") else node("merge", plan)
        yield recipe(f"{kind}_2_32_as_task", about, plan, Kind.TASK)
    split = {"range": {"sort_expr": [{"expr": X}], "split_point": [{"value": [{"int64_value": at}]} for at in (3, 1)]}}
    yield recipe(
        "repartition_range_unsorted", "split points out of order", node("repartition", numbers(), partitioning=split)
    )
    split = {"range": {"sort_expr": [{"expr": X}], "split_point": [{"value": []}] * 50_000}}
    yield recipe(
        "repartition_range_50_000", "split points without values", node("repartition", numbers(), partitioning=split)
    )
    plan = file_scan(
        "csv_scan", FILES["csv_scan"], output_partitioning={"hash": {"hash_expr": [X], "partition_count": U64}}
    )
    yield recipe("scan_says_2_64_partitions", about, plan)


def _rows() -> Iterator[Recipe]:
    """Sizes of batches, and of what is kept of them."""
    about = "memory for a batch of so many rows"
    for name, rows in (("2_32", U32), ("0", 0)):
        plan = node("coalesce_batches", numbers(), target_batch_size=rows)
        yield recipe(f"coalesce_batches_of_{name}_rows", about, plan)
        plan = node("filter", numbers(), expr={"is_not_null_expr": {"expr": X}}, projection=[0], batch_size=rows)
        yield recipe(f"filter_batches_of_{name}_rows", about, plan)
        yield recipe(f"series_batches_of_{name}_rows", about, series(1, 100, 1, rows))
    for name, rows in (("2_64", U64), ("2_40", 1 << 40), ("0", 0)):
        for kind, path in FILES.items():
            plan = file_scan(kind, path, batch_size=rows)
            yield recipe(f"{kind}_batches_of_{name}_rows", "no rows, or memory for all of them", plan)
    for name, rows in (("2_63", I64), ("2_32", U32)):
        yield recipe(
            f"sort_fetch_{name}", "a heap of so many rows", node("sort", numbers(), expr=[_key(0)], fetch=rows)
        )
        plan = node("sort_preserving_merge", repeated(numbers(), 2), expr=[_key(0)], fetch=rows)
        yield recipe(f"merge_fetch_{name}", "rows kept", plan)
        plan = node("global_limit", numbers(), skip=U32, fetch=rows)
        yield recipe(f"limit_fetch_{name}", "a sum that overflows", plan)
    yield recipe("limit_fetch_negative", "a limit below nothing", node("global_limit", numbers(), fetch=-(1 << 63)))
    yield recipe(
        "sort_fetch_negative", "a limit below nothing", node("sort", numbers(), expr=[_key(0)], fetch=-(1 << 63))
    )
    plan = joined(planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=column([1, 2])), fetch=U64)
    yield recipe("join_fetch_2_64", "a limit that overflows", plan)
    yield recipe("buffer_2_64", "a buffer of so many bytes", node("buffer", numbers(), capacity=U64))
    yield recipe("buffer_0", "a buffer for nothing", node("buffer", numbers(), capacity=0))
    plan = planned("SELECT DISTINCT x FROM t LIMIT 3", t=column([1, 2]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "aggregate":
            fill(each.aggregate, {"limit": {"limit": U64}})
    yield recipe("aggregate_limit_2_64", "a limit that overflows", plan)
    yield recipe("series_endless", "rows without end", series(0, I64, 1, 8192))
    yield recipe("series_step_0", "rows without end, all the same", series(0, 1, 0, 8192))
    yield recipe("series_overflow", "a step over the largest number", series(I64 - 1, I64, I64, 8192))
    yield recipe("series_step_negative", "a step over the least number", series(0, -I64, -(1 << 63), 8192))
    step = {"months": I32, "days": -I32, "nanos": I64}
    stamps = {"timestamp_args": {"start": 0, "end": I64, "step": step, "tz": "Europe/Rome", "name": 1}}
    plan = node("generate_series", schema=schema(pa.timestamp("ns", "Europe/Rome")), target_batch_size=8192, **stamps)
    yield recipe("series_of_times_overflow", "a step beyond all times", plan)
    dates = {"date_args": {"start": -(1 << 63), "end": I64, "step": {"days": 1}, "name": 1}}
    plan = node("generate_series", schema=schema(pa.date32()), target_batch_size=8192, **dates)
    yield recipe("series_of_dates_overflow", "dates that are none", plan)
    plan = numbers()
    plan.memory_scan.fetch = U32
    plan.memory_scan.projection.extend([0, 7, U32])
    yield recipe("memory_scan_columns_out_of_range", "columns that are not there", plan)


def _key(index: int) -> dict[str, Any]:
    return {"sort": {"expr": {"column": {"name": "x", "index": index}}, "asc": True}}
