"""Nodes that do not fit each other, that never end, or that few plans have."""

from collections.abc import Iterator

import pyarrow as pa

from fuzz.building import (
    X,
    column,
    joined,
    node,
    numbers,
    planned,
    projected,
    repeated,
    scan,
    schema,
    series,
)
from fuzz.recipes.recipe import U32, U64, Recipe, recipe
from worker import plan_proto
from worker.plan_proto import Message


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _joins()
    yield from _odd_nodes()


def _joins() -> Iterator[Recipe]:
    """Joins and unions that do not fit, or never end."""
    batch = column(list(range(3)))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    yield recipe("join_on_columns_out_of_range", "keys that are not there", _joined_on(plan, U32))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    yield recipe("join_keeps_columns_out_of_range", "columns that are not there", joined(plan, projection=[U32, 9]))
    for kind in (8, 9, 77):
        plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
        yield recipe(f"join_type_{kind}", "another kind of join over the same columns", joined(plan, join_type=kind))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    plan = joined(plan, partition_mode=1)
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            each.hash_join.left.CopyFrom(repeated(numbers(), 3))
    yield recipe("join_of_3_partitions_with_1", "sides with other numbers of partitions", plan)
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x < b.x", t=batch)
    million = series(1, 1_000_000, 1, 8192)
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "nested_loop_join":
            each.nested_loop_join.left.CopyFrom(million)
            each.nested_loop_join.right.CopyFrom(million)
    yield recipe("nested_loop_join_of_10_12", "a loop that does not let go of its thread", plan)
    crossed = node("cross_join", million, node("cross_join", million, million))
    yield recipe("cross_join_of_10_18", "rows without end", crossed)
    yield recipe("cross_join_counted", "rows without end, of which none is sent", _counted(crossed))
    yield recipe("union_of_nothing", "a union without inputs", node("union"))
    yield recipe("interleave_of_nothing", "an interleave without inputs", node("interleave"))
    yield recipe(
        "interleave_of_different_partitions",
        "inputs that do not fit",
        node("interleave", numbers(), repeated(numbers(), 2)),
    )
    other = scan(column(["a"]))
    yield recipe("union_of_other_types", "inputs that do not fit", node("union", numbers(), other))
    wider = projected(X, X)
    yield recipe("union_of_other_widths", "inputs that do not fit", node("union", numbers(), wider))
    row = node("placeholder_row", schema=schema(pa.int64()), partitions=1)
    yield recipe("union_of_50_000", "many small inputs", repeated(row, 50_000))
    nested = row
    for _ in range(12):
        nested = node("union", nested, nested)
    yield recipe("unions_in_each_other", "4,096 inputs", nested)
    deep = row
    for _ in range(46):
        deep = node("cooperative", deep)
    yield recipe("nodes_46_deep", "as deep as protobuf takes", deep)
    for _ in range(60):
        deep = node("cooperative", deep)
    yield recipe("nodes_106_deep", "deeper than protobuf takes", deep)
    yield recipe("node_of_nothing", "a node that is none", b"")
    yield recipe("node_without_input", "a filter of nothing", b"\x62\x00")
    yield recipe("node_unknown", "a node of another version", b"\xfa\x3e\x00")
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            each.hash_join.filter.SetInParent()
    yield recipe("join_filter_of_nothing", "a filter without expression", plan)


def _odd_nodes() -> Iterator[Recipe]:
    """Nodes that few plans have."""
    plan = planned("SELECT unnest([x, 2]) AS u FROM t", t=column([1]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "unnest":
            for listed in each.unnest.list_type_columns:
                listed.depth = U32
    yield recipe("unnest_2_32_deep", "lists in lists that are none", plan)
    plan = planned("SELECT unnest([x, 2]) AS u FROM t", t=column([1]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "unnest":
            each.unnest.struct_type_columns.append(U64)
            each.unnest.list_type_columns.add(index_in_input_schema=U32, depth=1)
    yield recipe("unnest_columns_out_of_range", "columns that are not there", plan)
    plan = node(
        "explain", schema=schema(pa.string(), pa.string()), stringified_plans=[{"plan": "x"}] * 1_000, verbose=True
    )
    yield recipe("explain_of_nothing", "plans without a kind", plan)
    plan = node(
        "analyze",
        numbers(),
        schema=schema(pa.string()),
        format=99,
        has_metric_categories=True,
        metric_categories=["\0"],
    )
    yield recipe("analyze_in_no_format", "formats that are none", plan)
    yield recipe(
        "async_call_of_no_function",
        "no asynchronous function",
        node("async_func", numbers(), async_exprs=[X], async_expr_names=[]),
    )
    windows = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
    for each in plan_proto.nodes(windows):
        if plan_proto.kind(each) == "window":
            for window in each.window.window_expr:
                window.window_frame.start_bound.bound_value.uint64_value = U64
                window.window_frame.bound.bound_value.uint64_value = U64
    yield recipe("window_bounds_2_64", "bounds beyond all rows", windows)
    windows = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
    for each in plan_proto.nodes(windows):
        if plan_proto.kind(each) == "window":
            del each.window.window_expr[0].args[:]
    yield recipe("window_without_arguments", "a sum of nothing", windows)
    groups = planned("SELECT x, sum(x) AS s FROM t GROUP BY x", t=column([1]))
    for each in plan_proto.nodes(groups):
        if plan_proto.kind(each) == "aggregate":
            each.aggregate.groups.extend([True] * 5_000)
    yield recipe("aggregate_with_5_000_groupings", "more groupings than expressions", groups)
    groups = planned("SELECT x, sum(x) AS s FROM t GROUP BY x", t=column([1]))
    for each in plan_proto.nodes(groups):
        if plan_proto.kind(each) == "aggregate":
            each.aggregate.mode = 77
    yield recipe("aggregate_in_no_mode", "a mode that is none", groups)
    for kind in ("symmetric_hash_join", "sort_merge_join"):
        yield recipe(f"{kind}_of_nothing", "a join without keys", node(kind, numbers(), numbers()))
    yield recipe("subquery_in_itself", "subqueries in each other", _subqueries(6))
    yield recipe("sort_without_keys", "no order", node("sort", numbers()))
    yield recipe("merge_without_keys", "no order", node("sort_preserving_merge", repeated(numbers(), 2)))


def _joined_on(plan: Message, index: int) -> Message:
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            for on in each.hash_join.on:
                on.left.column.index = on.right.column.index = index
    return plan


def _counted(plan: Message) -> Message:
    counting = planned("SELECT count(*) AS n FROM t", t=column([1]))
    counting = (
        planned("SELECT count(x) AS n FROM t", t=column([1])) if plan_proto.kind(counting) != "aggregate" else counting
    )
    for each in plan_proto.nodes(counting):
        if plan_proto.kind(each) == "memory_scan":
            each.CopyFrom(node("merge", plan))
            break
    return counting


def _subqueries(depth: int) -> Message:
    plan = projected({"scalar_subquery": {"data_type": {"INT64": {}}, "index": 0}})
    for _ in range(depth):
        plan = node("scalar_subquery", plan, subqueries=[plan, numbers()])
    return plan
