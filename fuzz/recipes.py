"""The hostile plans that are made by hand: what is known to hurt an engine, or a worker that trusts whoever asks.

``python -m fuzz.recipes`` writes those that are small into the corpus; the others are made whenever they are needed.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa

from fuzz import arrow
from fuzz.building import (
    NUMBERS,
    X,
    call,
    column,
    distributed,
    extension,
    file_scan,
    fill,
    literal,
    network,
    node,
    numbers,
    planned,
    projected,
    scan,
    schema,
    sink,
    typed_schema,
)
from fuzz.cases import EXECUTE_QUERY, Case, Kind
from worker import plan_proto
from worker.plan_proto import Message
from worker.proto import nodes_pb2, plan_pb2, worker_pb2

# The name of a case, what it is about, and what is sent.
Recipe: TypeAlias = tuple[str, str, Case]

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
I32 = (1 << 31) - 1
I64 = (1 << 63) - 1

NOBODY = "http://127.0.0.1:1"
QUERY = bytes(range(16))

_GROUPS: list[Callable[[], Iterator[Recipe]]] = []


def recipes() -> Iterator[Recipe]:
    """All of them; their names differ."""
    for group in _GROUPS:
        yield from group()


def _group(make: Callable[[], Iterator[Recipe]]) -> Callable[[], Iterator[Recipe]]:
    _GROUPS.append(make)
    return make


def _plan(name: str, about: str, message: Message | bytes, kind: Kind = Kind.PLAN) -> Recipe:
    return name, about, Case(kind, message if isinstance(message, bytes) else message.SerializeToString())


@_group
def _partitions() -> Iterator[Recipe]:
    """Memory is taken for each partition, before there is a row."""
    about = "memory for each of its partitions"
    empty = schema(pa.int64())
    for name, count in (("2_32", U32), ("2_24", 1 << 24)):
        yield _plan(f"empty_partitions_{name}", about, node("empty", schema=empty, partitions=count))
        yield _plan(f"placeholder_row_partitions_{name}", about, node("placeholder_row", schema=empty, partitions=count))
        for kind in ("round_robin", "unknown"):
            plan = node("repartition", numbers(), partitioning={kind: count})
            yield _plan(f"repartition_{kind}_{name}", about, plan)
        hashed = {"hash": {"hash_expr": [X], "partition_count": count}}
        yield _plan(f"repartition_hash_{name}", about, node("repartition", numbers(), partitioning=hashed))
    for kind in ("round_robin", "unknown"):
        plan = node("repartition", numbers(), partitioning={kind: U64})
        yield _plan(f"repartition_{kind}_2_64", about, plan)
    hashed = {"hash": {"hash_expr": [X], "partition_count": U64}}
    yield _plan("repartition_hash_2_64", about, node("repartition", numbers(), partitioning=hashed))
    nested = numbers()
    for _ in range(4):
        nested = node("repartition", nested, partitioning={"round_robin": 1000})
    yield _plan("repartitions_in_each_other", "a channel for each pair of partitions, four times", nested)
    yield _plan("empty_partitions_0", "no partition, but one is read", node("empty", schema=empty, partitions=0))
    for kind in ("round_robin", "unknown"):
        plan = node("repartition", numbers(), partitioning={kind: 0})
        yield _plan(f"repartition_{kind}_0", "rows are dealt out to nobody", plan)
    hashed = {"hash": {"hash_expr": [X], "partition_count": 0}}
    yield _plan("repartition_hash_0", "a remainder by zero", node("repartition", numbers(), partitioning=hashed))
    for kind in ("repartition_hash", "coalesced_hash"):
        plan = node("repartition", numbers(), partitioning={"hash": {"hash_expr": [X], "partition_count": U32}})
        plan = plan if kind.startswith("repartition") else node("merge", plan)
        yield _plan(f"{kind}_2_32_as_task", about, plan, Kind.TASK)
    split = {"range": {"sort_expr": [{"expr": X}], "split_point": [{"value": [{"int64_value": at}]} for at in (3, 1)]}}
    yield _plan("repartition_range_unsorted", "split points out of order", node("repartition", numbers(), partitioning=split))
    split = {"range": {"sort_expr": [{"expr": X}], "split_point": [{"value": []}] * 50_000}}
    yield _plan("repartition_range_50_000", "split points without values", node("repartition", numbers(), partitioning=split))
    plan = file_scan("csv_scan", "/nowhere.csv", output_partitioning={"hash": {"hash_expr": [X], "partition_count": U64}})
    yield _plan("scan_says_2_64_partitions", about, plan)


@_group
def _rows() -> Iterator[Recipe]:
    """Sizes of batches, and of what is kept of them."""
    about = "memory for a batch of so many rows"
    for name, rows in (("2_32", U32), ("0", 0)):
        plan = node("coalesce_batches", numbers(), target_batch_size=rows)
        yield _plan(f"coalesce_batches_of_{name}_rows", about, plan)
        plan = node("filter", numbers(), expr={"is_not_null_expr": {"expr": X}}, projection=[0], batch_size=rows)
        yield _plan(f"filter_batches_of_{name}_rows", about, plan)
        yield _plan(f"series_batches_of_{name}_rows", about, _series(1, 100, 1, rows))
    for name, rows in (("2_64", U64), ("2_40", 1 << 40), ("0", 0)):
        for kind in ("csv_scan", "json_scan", "parquet_scan"):
            plan = file_scan(kind, "/dev/null", batch_size=rows)
            yield _plan(f"{kind}_batches_of_{name}_rows", "no rows, or memory for all of them", plan)
    for name, rows in (("2_63", I64), ("2_32", U32)):
        yield _plan(f"sort_fetch_{name}", "a heap of so many rows", node("sort", numbers(), expr=[_key(0)], fetch=rows))
        plan = node("sort_preserving_merge", _repeated(numbers(), 2), expr=[_key(0)], fetch=rows)
        yield _plan(f"merge_fetch_{name}", "rows kept", plan)
        plan = node("global_limit", numbers(), skip=U32, fetch=rows)
        yield _plan(f"limit_fetch_{name}", "a sum that overflows", plan)
    yield _plan("limit_fetch_negative", "a limit below nothing", node("global_limit", numbers(), fetch=-(1 << 63)))
    yield _plan("sort_fetch_negative", "a limit below nothing", node("sort", numbers(), expr=[_key(0)], fetch=-(1 << 63)))
    joined = _joined(planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=column([1, 2])), fetch=U64)
    yield _plan("join_fetch_2_64", "a limit that overflows", joined)
    yield _plan("buffer_2_64", "a buffer of so many bytes", node("buffer", numbers(), capacity=U64))
    yield _plan("buffer_0", "a buffer for nothing", node("buffer", numbers(), capacity=0))
    plan = planned("SELECT DISTINCT x FROM t LIMIT 3", t=column([1, 2]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "aggregate":
            fill(each.aggregate, {"limit": {"limit": U64}})
    yield _plan("aggregate_limit_2_64", "a limit that overflows", plan)
    yield _plan("series_endless", "rows without end", _series(0, I64, 1, 8192))
    yield _plan("series_step_0", "rows without end, all the same", _series(0, 1, 0, 8192))
    yield _plan("series_overflow", "a step over the largest number", _series(I64 - 1, I64, I64, 8192))
    yield _plan("series_step_negative", "a step over the least number", _series(0, -I64, -(1 << 63), 8192))
    step = {"months": I32, "days": -I32, "nanos": I64}
    stamps = {"timestamp_args": {"start": 0, "end": I64, "step": step, "tz": "Europe/Rome", "name": 1}}
    plan = node("generate_series", schema=schema(pa.timestamp("ns", "Europe/Rome")), target_batch_size=8192, **stamps)
    yield _plan("series_of_times_overflow", "a step beyond all times", plan)
    dates = {"date_args": {"start": -(1 << 63), "end": I64, "step": {"days": 1}, "name": 1}}
    plan = node("generate_series", schema=schema(pa.date32()), target_batch_size=8192, **dates)
    yield _plan("series_of_dates_overflow", "dates that are none", plan)
    plan = numbers()
    plan.memory_scan.fetch = U32
    plan.memory_scan.projection.extend([0, 7, U32])
    yield _plan("memory_scan_columns_out_of_range", "columns that are not there", plan)


def _series(start: int, end: int, step: int, rows: int) -> Message:
    arguments = {"start": start, "end": end, "step": step, "include_end": True, "name": 1}
    return node("generate_series", schema=schema(pa.int64()), target_batch_size=rows, int64_args=arguments)


def _key(index: int) -> dict[str, Any]:
    return {"sort": {"expr": {"column": {"name": "x", "index": index}}, "asc": True}}


def _repeated(plan: Message, times: int) -> Message:
    return node("union", *[plan] * times)


def _joined(plan: Message, **fields: Any) -> Message:
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            fill(each.hash_join, fields)
    return plan


TYPES: Mapping[str, Mapping[str, Any]] = {
    "fixed_size_binary_2_31": {"FIXED_SIZE_BINARY": I32},
    "fixed_size_binary_negative": {"FIXED_SIZE_BINARY": -1},
    "fixed_size_binary_2_24": {"FIXED_SIZE_BINARY": 1 << 24},
    "fixed_size_list_2_31": {
        "FIXED_SIZE_LIST": {"field_type": {"name": "i", "arrow_type": {"INT64": {}}, "nullable": True}, "list_size": I32}
    },
    "fixed_size_list_negative": {
        "FIXED_SIZE_LIST": {"field_type": {"name": "i", "arrow_type": {"INT64": {}}, "nullable": True}, "list_size": -1}
    },
    "fixed_size_lists_in_each_other": {
        "FIXED_SIZE_LIST": {
            "list_size": 1 << 15,
            "field_type": {
                "name": "i",
                "nullable": True,
                "arrow_type": {
                    "FIXED_SIZE_LIST": {
                        "list_size": 1 << 15,
                        "field_type": {"name": "i", "nullable": True, "arrow_type": {"INT64": {}}},
                    }
                },
            },
        }
    },
    "decimal128_precision_255": {"DECIMAL128": {"precision": U32, "scale": 127}},
    "decimal256_scale_negative": {"DECIMAL256": {"precision": 76, "scale": -(1 << 31)}},
    "time_zone_with_nul": {"TIMESTAMP": {"time_unit": 2, "timezone": "Europe\0/Rome"}},
    "time_zone_that_is_none": {"TIMESTAMP": {"time_unit": 2, "timezone": "+99:99"}},
    "time_zone_of_50_kb": {"TIMESTAMP": {"time_unit": 2, "timezone": "+" * 50_000}},
    "time_unit_that_is_none": {"TIMESTAMP": {"time_unit": 77}},
    "struct_without_fields": {"STRUCT": {}},
    "list_without_field": {"LIST": {}},
    "map_of_a_number": {"MAP": {"field_type": {"name": "m", "arrow_type": {"INT64": {}}}}},
    "dictionary_with_string_keys": {"DICTIONARY": {"key": {"UTF8": {}}, "value": {"UTF8": {}}}},
    "union_with_wrong_type_ids": {
        "UNION": {"union_types": [{"name": "u", "arrow_type": {"INT64": {}}}], "union_mode": 1, "type_ids": [-7, 7, I32]}
    },
    "run_ends_of_strings": {
        "RUN_END_ENCODED": {
            "run_ends_field": {"name": "r", "arrow_type": {"UTF8": {}}},
            "values_field": {"name": "v", "arrow_type": {"UTF8": {}}},
        }
    },
    "interval_that_is_none": {"INTERVAL": 9},
}


@_group
def _types() -> Iterator[Recipe]:
    """Sizes that are part of a type, and types that do not exist."""
    for name, arrow_type in TYPES.items():
        about = "a type whose values take more memory than there is, or that is none"
        made = typed_schema(arrow_type)
        yield _plan(f"placeholder_{name}", about, node("placeholder_row", schema=made, partitions=1))
        yield _plan(f"null_{name}", about, projected(literal(null_value=arrow_type)))
        yield _plan(f"cast_{name}", about, projected({"cast": {"expr": X, "arrow_type": arrow_type}}))
    lists: Mapping[str, Any] = {"INT64": {}}
    for _ in range(25):
        lists = {"LIST": {"field_type": {"name": "i", "arrow_type": lists, "nullable": True}}}
    yield _plan("null_of_lists_in_lists", "types in each other", projected(literal(null_value=lists)))
    structs: Mapping[str, Any] = {"INT64": {}}
    for _ in range(3):
        fields = [{"name": f"f{at}", "arrow_type": structs} for at in range(12)]
        structs = {"STRUCT": {"sub_field_types": fields}}
    yield _plan("null_of_structs_in_structs", "a type of 1,885 fields", projected(literal(null_value=structs)))
    wide = {"columns": [{"name": f"c{at}", "arrow_type": {"NONE": {}}} for at in range(5_000)]}
    yield _plan("placeholder_row_of_5_000_columns", "a wide row", node("placeholder_row", schema=wide, partitions=1))


@_group
def _literals() -> Iterator[Recipe]:
    """Values that say one thing and are another."""
    yield _plan("literal_nothing", "a literal without a value", projected({"literal": {}}))
    for name, value in {
        "fixed_size_binary_2_31": {"fixed_size_binary_value": {"values": b"ab", "length": I32}},
        "fixed_size_binary_negative": {"fixed_size_binary_value": {"values": b"ab", "length": -5}},
        "decimal128_of_3_bytes": {"decimal128_value": {"value": b"abc", "p": 10, "s": 2}},
        "decimal128_precision_2_63": {"decimal128_value": {"value": bytes(16), "p": I64, "s": -I64}},
        "decimal256_of_nothing": {"decimal256_value": {"value": b"", "p": 76, "s": 76}},
        "int8_2_31": {"int8_value": I32},
        "time_zone_with_nul": {"timestamp_value": {"time_second_value": 1, "timezone": "a\0b"}},
        "timestamp_2_63": {"timestamp_value": {"time_second_value": I64, "timezone": "Europe/Rome"}},
        "timestamp_nothing": {"timestamp_value": {"timezone": "UTC"}},
        "interval_2_63": {"interval_month_day_nano": {"months": I32, "days": -(1 << 31), "nanos": -(1 << 63)}},
        "dictionary_of_dictionaries": {
            "dictionary_value": {
                "index_type": {"INT8": {}},
                "value": {"dictionary_value": {"index_type": {"INT8": {}}, "value": {"utf8_value": "x"}}},
            }
        },
        "dictionary_keyed_by_lists": {
            "dictionary_value": {"index_type": {"LIST": {}}, "value": {"utf8_value": "x"}}
        },
        "union_without_fields": {"union_value": {"value_id": -1, "value": {"int64_value": 1}}},
        "union_with_field_2_31": {
            "union_value": {
                "value_id": I32,
                "value": {"int64_value": 1},
                "fields": [{"field_id": I32, "field": {"name": "u", "arrow_type": {"INT64": {}}}}],
            }
        },
        "run_ends_of_strings": {
            "run_end_encoded_value": {
                "run_ends_field": {"name": "r", "arrow_type": {"UTF8": {}}},
                "values_field": {"name": "v", "arrow_type": {"INT64": {}}},
                "value": {"utf8_value": "x"},
            }
        },
        "list_of_nothing": {"list_value": {}},
        "list_of_garbage": {
            "list_value": {"ipc_message": b"garbage" * 9, "arrow_data": b"garbage" * 9, "schema": schema(pa.int64())}
        },
        "list_with_another_schema": {
            "list_value": {"ipc_message": b"", "arrow_data": b"", "schema": typed_schema({"LIST": {}})}
        },
    }.items():
        yield _plan(f"literal_{name}", "a value that its type does not have", projected({"literal": value}))
    yield from _nested_literals()


def _nested_literals() -> Iterator[Recipe]:
    """Arrow data inside of literals, as a message and a body, whose numbers lie."""
    batch = column([1])
    queries = {
        "list": "SELECT [1, x] AS y FROM t WHERE [x] <> [1, 2, 3]",
        "struct": "SELECT x FROM t WHERE named_struct('a', x) <> named_struct('a', 7)",
        "map": "SELECT map_extract(MAP {'a': 1}, arrow_cast(x, 'Utf8')) AS y FROM t",
        "fixed_size_list": "SELECT x FROM t WHERE arrow_cast([x, x], 'FixedSizeList(2, Int64)') "
        "<> arrow_cast([1, 2], 'FixedSizeList(2, Int64)')",
    }
    for kind, query in queries.items():
        plan = planned(query, t=batch).SerializeToString()
        for lie, change in {"length_2_40": 1 << 40, "length_negative": -1}.items():
            changed = plan_proto.parse(plan)
            touched = 0
            for value in _nested_values(changed):
                found = arrow.metadata_numbers(value.ipc_message)
                if found is not None and found.length is not None:
                    touched += 1
                    value.ipc_message = arrow.put(value.ipc_message, found.length, change)
                    for at in found.nodes[::2]:
                        value.ipc_message = arrow.put(value.ipc_message, at, change)
            if touched:
                yield _plan(f"nested_{kind}_{lie}", "more rows than there are bytes", changed)
        changed = plan_proto.parse(plan)
        touched = 0
        for value in _nested_values(changed):
            found = arrow.metadata_numbers(value.ipc_message)
            if found is not None:
                for at in found.buffers[1::2]:
                    touched += 1
                    value.ipc_message = arrow.put(value.ipc_message, at, 1 << 40)
        if touched:
            yield _plan(f"nested_{kind}_buffers_2_40", "buffers beyond the body", changed)
        changed = plan_proto.parse(plan)
        for value in _nested_values(changed):
            value.arrow_data = b""
        yield _plan(f"nested_{kind}_without_data", "buffers of nothing", changed)
    yield from _nested_bombs()


def _nested_bombs() -> Iterator[Recipe]:
    large = column([[0] * (1 << 24)], pa.list_(pa.int64()))
    message = plan_proto.parse(
        planned("SELECT x FROM t WHERE [x] <> [1, 2, 3]", t=column([1])).SerializeToString()
    )
    data = arrow.stream(large, "zstd")
    (numbers_at,) = arrow.batches(data)
    starts = [start for start, *_ in arrow.messages(data)]
    for value in _nested_values(message):
        value.ipc_message = data[starts[1] - 8 : numbers_at.body]
        value.arrow_data = data[numbers_at.body : numbers_at.body + numbers_at.size]
        break
    yield _plan("nested_list_zstd_bomb", "128 MiB out of a few thousand bytes", message)


def _nested_values(message: Message) -> Iterator[Message]:
    """Every nested value of a plan."""
    for field, value in message.ListFields():
        if field.message_type:
            for each in value if field.is_repeated else [value]:
                if field.message_type.full_name == "datafusion_common.ScalarNestedValue":
                    yield each
                elif not field.message_type.GetOptions().map_entry:
                    yield from _nested_values(each)


def _of_stream(data: bytes, like: pa.RecordBatch) -> Message:
    plan = scan(like)
    plan.memory_scan.partitions[:] = [data]
    return plan


BATCHES: Mapping[str, pa.RecordBatch] = {
    "numbers": column([1, 2, 3], pa.int64()),
    "strings": column(["a", None, "ccc"], pa.string()),
    "views": column(["a view of more than twelve bytes", None, "short"], pa.string_view()),
    "lists": column([[1, 2], None, [3]], pa.list_(pa.int64())),
    "list_views": column([[1, 2], None, [3]], pa.list_view(pa.int64())),
    "fixed_size_lists": column([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
    "fixed_size_binaries": column([b"abc", None, b"def"], pa.binary(3)),
    "structs": column([{"a": 1}, None, {"a": 3}], pa.struct({"a": pa.int64()})),
    "maps": column([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "dictionaries": column(["a", "b", "a"], pa.dictionary(pa.int32(), pa.string())),
    "nulls": column([None, None, None], pa.null()),
    "booleans": column([True, None, False], pa.bool_()),
    "decimals": column([1, None, 3], pa.decimal128(10, 2)),
    "run_ends": pa.RecordBatch.from_arrays(
        [pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", "b"]))], ["x"]
    ),
    "unions": pa.RecordBatch.from_arrays(
        [
            pa.UnionArray.from_dense(
                pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array([1, 2]), pa.array(["a"])]
            )
        ],
        ["x"],
    ),
}


@_group
def _streams() -> Iterator[Recipe]:
    """Arrow streams inside of memory scans, whose numbers lie."""
    for kind, batch in BATCHES.items():
        data = arrow.stream(batch)
        last = list(arrow.batches(data))[-1]
        assert last.length is not None
        rows = (last.length, *last.nodes[::2])
        for lie, value in (("2_40", 1 << 40), ("2_63", I64), ("negative", -1)):
            changed = data
            for at in rows:
                changed = arrow.put(changed, at, value)
            yield _plan(f"ipc_{kind}_rows_{lie}", "more rows than there are bytes", _of_stream(changed, batch))
        if last.buffers:
            changed = arrow.put(data, last.buffers[-1], 1 << 40)
            yield _plan(f"ipc_{kind}_buffer_too_long", "a buffer beyond the body", _of_stream(changed, batch))
            changed = arrow.put(data, last.buffers[-2], -8)
            yield _plan(f"ipc_{kind}_buffer_before_body", "a buffer ahead of the body", _of_stream(changed, batch))
            changed = data[: last.body] + b"\xff" * last.size + data[last.body + last.size :]
            yield _plan(f"ipc_{kind}_body_of_ones", "offsets, keys and sizes beyond everything", _of_stream(changed, batch))
        yield _plan(f"ipc_{kind}_cut", "a stream that ends too soon", _of_stream(data[: last.body + 1], batch))
    batch = BATCHES["strings"]
    data = arrow.stream(batch)
    (found,) = arrow.batches(data)
    assert found.framing is not None
    assert found.body_length is not None
    for name, value in (("2_31", I32), ("negative", -8), ("0", 0)):
        changed = arrow.put(data, found.framing, value, 4)
        yield _plan(f"ipc_metadata_length_{name}", "metadata beyond the bytes", _of_stream(changed, batch))
        changed = arrow.put(data, 4, value, 4)
        yield _plan(f"ipc_schema_length_{name}", "metadata beyond the bytes", _of_stream(changed, batch))
    for name, value in (("2_62", 1 << 62), ("negative", -1), ("0", 0)):
        changed = arrow.put(data, found.body_length, value)
        yield _plan(f"ipc_body_length_{name}", "a body beyond the bytes", _of_stream(changed, batch))
    changed = arrow.put(data, found.nodes[1], 1 << 40)
    yield _plan("ipc_null_count_2_40", "more nulls than rows", _of_stream(changed, batch))
    yield _plan("ipc_of_another_schema", "a stream of other columns", _of_stream(arrow.stream(BATCHES["numbers"]), batch))
    yield _plan("ipc_garbage", "no stream", _of_stream(b"\xff\xff\xff\xff" + b"garbage!" * 100, batch))
    yield _plan("ipc_empty", "a stream of nothing", _of_stream(b"", batch))
    yield from _compressed_streams()
    yield from _deep_streams()


def _compressed_streams() -> Iterator[Recipe]:
    batch = column([0] * 1000, pa.int64())
    for compression in ("zstd", "lz4"):
        data = arrow.stream(batch, compression)
        (found,) = arrow.batches(data)
        at = found.body  # where the one buffer that is not empty begins: with its length before it was compressed
        for name, value in (("2_62", 1 << 62), ("negative", -7), ("2_33", 1 << 33), ("1", 1)):
            plan = _of_stream(arrow.put(data, at, value), batch)
            yield _plan(f"ipc_{compression}_length_{name}", "a length before compression that lies", plan)
        garbage = data[: at + 8] + b"\xa5" * (found.size - 8) + data[at + found.size :]
        yield _plan(f"ipc_{compression}_garbage", "a frame that is none", _of_stream(garbage, batch))
        mebibytes = 512 if compression == "zstd" else 64
        zeros = pa.RecordBatch.from_arrays(
            [pa.Array.from_buffers(pa.int64(), mebibytes << 17, [None, pa.py_buffer(bytes(mebibytes << 20))])], ["x"]
        )
        data = arrow.stream(zeros, compression)
        yield _plan(f"ipc_{compression}_bomb", f"{mebibytes} MiB of zeros", _of_stream(data, column([1])))
        plan = _of_stream(data, column([1]))
        plan.memory_scan.partitions.extend([data] * 31)
        yield _plan(f"ipc_{compression}_bombs", f"32 partitions of {mebibytes} MiB of zeros", plan)


def _deep_streams() -> Iterator[Recipe]:
    kind: pa.DataType = pa.int64()
    for _ in range(60):
        kind = pa.list_(kind)
    deep = pa.RecordBatch.from_arrays([pa.nulls(1, kind)], ["x"])
    yield _plan("ipc_lists_in_lists", "a stream 60 types deep", _of_stream(arrow.stream(deep), column([1])))
    wide = pa.RecordBatch.from_arrays([pa.nulls(1, pa.int8())] * 1_000, [f"c{at}" for at in range(1_000)])
    yield _plan("ipc_of_1_000_columns", "a stream of more columns than the scan says", _of_stream(arrow.stream(wide), column([1])))
    promised = arrow.stream(pa.RecordBatch.from_arrays([pa.nulls(0, pa.binary(I32))], ["x"]))
    small = arrow.stream(BATCHES["fixed_size_binaries"])
    data = promised[: next(iter(arrow.messages(promised)))[3]] + small[next(iter(arrow.messages(small)))[3] :]
    yield _plan("ipc_fixed_size_binary_2_31", "rows of 2 GiB each", _of_stream(data, column([1])))


@_group
def _expressions() -> Iterator[Recipe]:
    """What is flat on the wire and deep, or quadratic, in memory."""
    for count in (3_000, 60_000):
        chain = {"binary_expr": {"op": "Or", "operands": [literal(bool_value=True)] * count}}
        yield _plan(f"operands_{count}", "a chain of operands, as deep as it is long", projected(chain))
    pairs = {"binary_expr": {"op": "And", "operands": [{"binary_expr": {"op": "Or", "operands": [X] * 500}}] * 40}}
    yield _plan("operands_in_operands", "chains in chains", projected(pairs))
    yield _plan("operands_none", "an operator without operands", projected({"binary_expr": {"op": "Or"}}))
    one = {"binary_expr": {"op": "Or", "operands": [X]}}
    yield _plan("operands_one", "an operator with one operand", projected(one))
    yield _plan("operator_unknown", "an operator that is none", projected({"binary_expr": {"op": "Harm", "l": X, "r": X}}))
    expression: Mapping[str, Any] = literal(bool_value=True)
    for _ in range(45):
        expression = {"not_expr": {"expr": expression}}
    yield _plan("not_not_not", "as deep as protobuf takes", projected(expression))
    yield _plan("column_2_32", "a column that is not there", projected({"column": {"name": "x", "index": U32}}))
    yield _plan("column_unknown", "a column that has no place", projected({"unknown_column": {"name": "y"}}))
    yield _plan("expression_nothing", "an expression that is none", projected({}))
    cases = {"case_": {"when_then_expr": [{"when_expr": X, "then_expr": X}] * 5_000}}
    yield _plan("case_of_numbers", "5,000 branches, none of them a boolean", projected(cases))
    listed = {"in_list": {"expr": X, "list": [literal(utf8_value="a")] * 5_000}}
    yield _plan("in_list_of_another_type", "5,000 values of another type", projected(listed))
    pattern = {"like_expr": {"expr": literal(utf8_value="a" * 5_000), "pattern": literal(utf8_value="%a" * 2_500 + "b")}}
    yield _plan("like_backtracking", "a pattern with 2,500 wildcards", projected(pattern))
    for name, expression in {
        "repetitions": "((((a{100}){100}){100}){100})",
        "alternatives": "(x+x+)+y" * 500,
        "groups": "(" * 2_000 + ")" * 2_000,
    }.items():
        match = {"binary_expr": {"op": "RegexMatch", "l": literal(utf8_value="x" * 99), "r": literal(utf8_value=expression)}}
        yield _plan(f"regex_{name}", "an expression that grows when it is compiled", projected(match))
    hashed = {"hash_expr": {"on_columns": [X] * 9, "seed0": U64, "description": "\0"}}
    yield _plan("hash_expression", "an expression that no query has", projected(hashed))
    dynamic = {"dynamic_filter": {"children": [X], "remapped_children": [], "generation": U64, "inner_expr": X}}
    yield _plan("dynamic_filter_with_missing_children", "a filter that lost its columns", projected(dynamic))
    yield _plan("subquery_of_nothing", "the result of a subquery that is not there", projected({"scalar_subquery": {"index": U32}}))
    yield _plan("lambda_alone", "a function without a caller", projected({"lambda": {"params": ["a"], "body": X}}))
    yield _plan("lambda_variable_alone", "a variable of no function", projected({"lambda_variable": {"index": U32}}))
    yield _plan("expression_of_nobody", "an expression for a codec", projected({"extension": {"expr": b"\xff" * 99}}))
    same = {"expr_id": 1, **X}
    yield _plan("expressions_with_one_number", "different expressions of one identity", projected(same, {"expr_id": 1, "not_expr": {"expr": X}}))
    keys = [{"sort": {"expr": {"column": {"name": f"e{at}", "index": at}}, "asc": True}} for at in range(400)]
    aliases = node("projection", numbers(), expr=[X] * 400, expr_name=[f"e{at}" for at in range(400)])
    yield _plan("sort_keys_times_aliases", "orderings of aliases of one column", node("sort", aliases, expr=keys))
    yield _plan("projection_names_missing", "more expressions than names", node("projection", numbers(), expr=[X] * 9, expr_name=["a"]))
    yield _plan("projection_name_with_nul", "a NUL in a column's name", node("projection", numbers(), expr=[X], expr_name=["a\0b"]))
    yield _plan("projection_names_of_1_mb", "a long name", node("projection", numbers(), expr=[X], expr_name=["a" * (1 << 20)]))


def _over(query: str, *values: Any, kind: pa.DataType | None = None) -> Message:
    """A query over a table ``t`` whose values are in the plan: planning has no constants to fold."""
    return planned(query, t=column(list(values), kind))


FUNCTIONS: Mapping[str, tuple[str, Any]] = {
    "repeat_2_40": ("SELECT repeat('x', x) AS y FROM t", 1 << 40),
    "repeat_2_33": ("SELECT repeat('x', x) AS y FROM t", 1 << 33),
    "repeat_2_30": ("SELECT repeat('xxxxxxxx', x) AS y FROM t", 1 << 28),
    "lpad_2_31": ("SELECT lpad('x', x) AS y FROM t", I32),
    "rpad_2_31": ("SELECT rpad('x', x, 'ab') AS y FROM t", I32 - 1),
    "range_2_40": ("SELECT range(0, x) AS y FROM t", 1 << 40),
    "range_2_62": ("SELECT range(-x, x) AS y FROM t", 1 << 62),
    "generate_series_2_34": ("SELECT generate_series(0, x) AS y FROM t", 1 << 34),
    "array_repeat_2_40": ("SELECT array_repeat(7, x) AS y FROM t", 1 << 40),
    "array_resize_2_40": ("SELECT array_resize([1], x, 7) AS y FROM t", 1 << 40),
    "chr_negative": ("SELECT chr(x) AS y FROM t", -1),
    "chr_surrogate": ("SELECT chr(x) AS y FROM t", 0xD800),
    "factorial_overflow": ("SELECT factorial(x) AS y FROM t", 1 << 40),
    "power_overflow": ("SELECT power(x, x) AS y FROM t", 1 << 40),
    "division_overflow": ("SELECT x / -1 AS y FROM t", -(1 << 63)),
    "remainder_overflow": ("SELECT x % -1 AS y FROM t", -(1 << 63)),
    "division_by_zero": ("SELECT 1 / x AS y FROM t", 0),
    "abs_overflow": ("SELECT abs(x) AS y FROM t", -(1 << 63)),
    "negation_overflow": ("SELECT -x AS y FROM t", -(1 << 63)),
    "gcd_overflow": ("SELECT gcd(x, x) AS y FROM t", -(1 << 63)),
    "shift_2_62": ("SELECT x << x AS y FROM t", 1 << 62),
    "substr_overflow": ("SELECT substr('abc', x, x) AS y FROM t", I64),
    "left_negative": ("SELECT left('abc', x) AS y FROM t", -(1 << 63)),
    "split_part_overflow": ("SELECT split_part('a.b', '.', x) AS y FROM t", -(1 << 63)),
    "round_overflow": ("SELECT round(1.5, x) AS y FROM t", I32),
    "trunc_overflow": ("SELECT trunc(1.5, x) AS y FROM t", -(1 << 31)),
    "make_date_overflow": ("SELECT make_date(x, x, x) AS y FROM t", I32),
    "from_unixtime_overflow": ("SELECT from_unixtime(x) AS y FROM t", I64),
    "to_timestamp_overflow": ("SELECT to_timestamp_seconds(x) + INTERVAL '1 year' AS y FROM t", I64),
    "date_bin_0": ("SELECT date_bin(INTERVAL '0 second', to_timestamp_seconds(x)) AS y FROM t", 1),
    "array_element_overflow": ("SELECT [1, 2][x] AS y FROM t", -(1 << 63)),
    "array_slice_overflow": ("SELECT array_slice([1, 2], x, -x, x) AS y FROM t", I64),
    "lag_overflow": ("SELECT lag(x, -9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "lead_overflow": ("SELECT lead(x, 9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "ntile_2_63": ("SELECT ntile(9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "nth_value_overflow": ("SELECT nth_value(x, -9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "window_frame_2_63": (
        "SELECT sum(x) OVER (ORDER BY x ROWS BETWEEN 9223372036854775807 PRECEDING "
        "AND 9223372036854775807 FOLLOWING) AS y FROM t",
        1,
    ),
    "window_range_overflow": (
        "SELECT sum(x) OVER (ORDER BY x RANGE BETWEEN 9223372036854775807 PRECEDING AND CURRENT ROW) AS y FROM t",
        -(1 << 63),
    ),
    "sum_overflow": ("SELECT sum(x) AS y FROM (SELECT x FROM t UNION ALL SELECT x FROM t)", I64),
    "cast_overflow": ("SELECT arrow_cast(x, 'Decimal128(2, 2)') AS y FROM t", I64),
    "cast_to_date_overflow": ("SELECT arrow_cast(arrow_cast(x, 'Timestamp(Second, None)'), 'Date32') AS y FROM t", I64),
    "to_char_pattern": ("SELECT to_char(to_timestamp_seconds(x), '%9999999999Y%Q%%%') AS y FROM t", 1),
    "to_hex_negative": ("SELECT to_hex(x) AS y FROM t", -(1 << 63)),
    "regexp_replace_bomb": ("SELECT regexp_replace(repeat('a', x), 'a', repeat('b', 1000), 'g') AS y FROM t", 100_000),
    "replace_bomb": ("SELECT replace(repeat('a', x), 'a', repeat('b', 10000)) AS y FROM t", 1_000_000),
    "levenshtein_quadratic": ("SELECT levenshtein(repeat('a', x), repeat('b', x)) AS y FROM t", 300_000),
}


@_group
def _functions() -> Iterator[Recipe]:
    """Memory that no pool counts, and numbers that overflow."""
    for name, (query, value) in FUNCTIONS.items():
        narrow = name in {"round_overflow", "trunc_overflow", "make_date_overflow"}
        plan = _over(query, value, kind=pa.int32() if narrow else pa.int64())
        yield _plan(f"call_{name}", "a function with numbers that nobody means", plan)
    yield _plan("call_of_nobody", "a function that is not there", projected(call("harm", X)))
    yield _plan("call_with_nul", "a NUL in a function's name", projected(call("abs\0", X)))
    yield _plan("call_with_1_mb", "a long name", projected(call("a" * (1 << 20), X)))
    yield _plan("call_without_arguments", "a function of one value without any", projected(call("abs")))
    yield _plan("call_that_returns_another_type", "a number said to be a text", projected(call("abs", X, returns="UTF8")))
    many = call("concat", *[literal(utf8_value="x")] * 20_000, returns="UTF8")
    yield _plan("call_with_20_000_arguments", "many arguments", projected(many))


@_group
def _pickles() -> Iterator[Recipe]:
    """Python functions that come in the plan: code of the stranger's."""
    about = "a pickled function, which must not be unpickled"
    for name, prefix in (("scalar", b"DFPYUDF"), ("aggregate", b"DFPYUDA"), ("window", b"DFPYUDW")):
        pickle = prefix + b"\x01cos\nsystem\n(S'kill -9 $PPID'\ntR."
        if name == "scalar":
            message = projected({"scalar_udf": {"name": "abs", "args": [X], "fun_definition": pickle, "return_type": {"INT64": {}}}})
        elif name == "aggregate":
            message = planned("SELECT sum(x) AS y FROM t", t=column([1]))
            for each in plan_proto.functions(message):
                each.fun_definition = pickle
        else:
            message = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
            for each in plan_proto.functions(message):
                each.fun_definition = pickle
        yield _plan(f"pickled_{name}_function", about, message)
        yield _plan(f"pickled_{name}_function_as_task", about, message, Kind.TASK)
    unknown = {"scalar_udf": {"name": "abs", "args": [X], "fun_definition": b"\x80harm", "return_type": {"INT64": {}}}}
    yield _plan("function_for_a_codec", "a definition that only a codec knows", projected(unknown))


@_group
def _joins() -> Iterator[Recipe]:
    """Joins and unions that do not fit, or never end."""
    batch = column(list(range(3)))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    yield _plan("join_on_columns_out_of_range", "keys that are not there", _joined_on(plan, U32))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    yield _plan("join_keeps_columns_out_of_range", "columns that are not there", _joined(plan, projection=[U32, 9]))
    for kind in (8, 9, 77):
        plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
        yield _plan(f"join_type_{kind}", "another kind of join over the same columns", _joined(plan, join_type=kind))
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    plan = _joined(plan, partition_mode=1)
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            each.hash_join.left.CopyFrom(_repeated(numbers(), 3))
    yield _plan("join_of_3_partitions_with_1", "sides with other numbers of partitions", plan)
    plan = planned("SELECT a.x FROM t a JOIN t b ON a.x < b.x", t=batch)
    million = _series(1, 1_000_000, 1, 8192)
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "nested_loop_join":
            each.nested_loop_join.left.CopyFrom(million)
            each.nested_loop_join.right.CopyFrom(million)
    yield _plan("nested_loop_join_of_10_12", "a loop that does not let go of its thread", plan)
    crossed = node("cross_join", million, node("cross_join", million, million))
    yield _plan("cross_join_of_10_18", "rows without end", crossed)
    yield _plan("cross_join_counted", "rows without end, of which none is sent", _counted(crossed))
    yield _plan("union_of_nothing", "a union without inputs", node("union"))
    yield _plan("interleave_of_nothing", "an interleave without inputs", node("interleave"))
    yield _plan("interleave_of_different_partitions", "inputs that do not fit", node("interleave", numbers(), _repeated(numbers(), 2)))
    other = scan(column(["a"]))
    yield _plan("union_of_other_types", "inputs that do not fit", node("union", numbers(), other))
    wider = projected(X, X)
    yield _plan("union_of_other_widths", "inputs that do not fit", node("union", numbers(), wider))
    row = node("placeholder_row", schema=schema(pa.int64()), partitions=1)
    yield _plan("union_of_50_000", "many small inputs", _repeated(row, 50_000))
    nested = row
    for _ in range(12):
        nested = node("union", nested, nested)
    yield _plan("unions_in_each_other", "4,096 inputs", nested)
    deep = row
    for _ in range(46):
        deep = node("cooperative", deep)
    yield _plan("nodes_46_deep", "as deep as protobuf takes", deep)
    for _ in range(60):
        deep = node("cooperative", deep)
    yield _plan("nodes_106_deep", "deeper than protobuf takes", deep)
    yield _plan("node_of_nothing", "a node that is none", b"")
    yield _plan("node_without_input", "a filter of nothing", plan_proto.PhysicalPlanNode.FromString(b"\x62\x00"))
    yield _plan("node_unknown", "a node of another version", b"\xfa\x3e\x00")
    joined = planned("SELECT a.x FROM t a JOIN t b ON a.x = b.x", t=batch)
    for each in plan_proto.nodes(joined):
        if plan_proto.kind(each) == "hash_join":
            each.hash_join.filter.SetInParent()
    yield _plan("join_filter_of_nothing", "a filter without expression", joined)


def _joined_on(plan: Message, index: int) -> Message:
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            for on in each.hash_join.on:
                on.left.column.index = on.right.column.index = index
    return plan


def _counted(plan: Message) -> Message:
    counting = planned("SELECT count(*) AS n FROM t", t=column([1]))
    counting = planned("SELECT count(x) AS n FROM t", t=column([1])) if plan_proto.kind(counting) != "aggregate" else counting
    for each in plan_proto.nodes(counting):
        if plan_proto.kind(each) == "memory_scan":
            each.CopyFrom(node("merge", plan))
            break
    return counting


SECRETS = {
    "passwd": "/etc/passwd",
    "parent": "/tmp/../etc/passwd",
    "percent": "/tmp/%2e%2e/etc/passwd",
    "percent_slash": "/tmp%2f..%2fetc%2fpasswd",
    "double_percent": "/tmp/%252e%252e/etc/passwd",
    "relative": "etc/passwd",
    "environment": "/proc/self/environ",
    "memory": "/proc/self/mem",
    "root_link": "/proc/self/root/etc/passwd",
    "nul": "/etc/passwd\0.csv",
    "folder": "/etc/",
    "glob": "/etc/*",
    "zeros": "/dev/zero",
    "terminal": "/dev/stdin",
}

URLS = {
    "empty": "",
    "host": "file://somewhere/",
    "mixed_case": "FiLe:///",
    "folder": "file:///etc/",
    "s3": "s3://bucket/",
    "metadata_service": "http://169.254.169.254/",
    "garbage": "::::",
    "nul": "file:///\0",
    "credentials": "https://user:secret@127.0.0.1:1/",
}


@_group
def _files() -> Iterator[Recipe]:
    """Files that are not the client's to read or write."""
    for name, path in SECRETS.items():
        yield _plan(f"read_{name}", "a file that is not the client's to read", file_scan("csv_scan", path, size=1 << 30))
    for name, url in URLS.items():
        yield _plan(f"store_{name}", "a store that is not the client's to use", file_scan("csv_scan", "etc/passwd", url=url))
    for kind in ("csv_sink", "json_sink", "parquet_sink"):
        yield _plan(f"write_{kind}", "a file that is not the client's to write", sink(kind, "file:///proc/hostile/out"))
    yield _plan("write_over", "a file that is not the client's to write", sink("csv_sink", "/proc/version", overwrite=True))
    yield _plan("write_as_task", "a file that is not the client's to write", sink("csv_sink", "/proc/hostile/out"), Kind.TASK)
    yield _plan("read_as_task", "a file that is not the client's to read", file_scan("csv_scan", "/etc/passwd"), Kind.TASK)
    hidden = node("scalar_subquery", numbers(), subqueries=[file_scan("csv_scan", "/etc/passwd")])
    yield _plan("read_in_subquery", "a file below a subquery", hidden)
    union = node("union", scan(column(["a"])), sink("csv_sink", "/proc/hostile/out"))
    yield _plan("write_in_union", "a sink below other nodes", union)
    about = "a scan that contradicts itself"
    for name, fields in {
        "size_2_64": {"file_groups": [{"files": [{"path": "/dev/null", "size": U64}]}]},
        "range_negative": {
            "file_groups": [{"files": [{"path": "/dev/null", "size": 9, "range": {"start": -9, "end": -99}}]}]
        },
        "modified_2_64": {"file_groups": [{"files": [{"path": "/dev/null", "last_modified_ns": U64}]}]},
        "columns_out_of_range": {"projection_exprs": {"projections": [{"alias": "y", "expr": {"column": {"index": U32}}}]}},
        "without_schema": {"schema": {}},
        "partition_columns_without_values": {"table_partition_cols": ["p", "q", "p"]},
        "statistics_missing": {"statistics": {}},
        "statistics_too_many": {"statistics": {"column_stats": [{}] * 5_000}},
        "statistics_of_2_64_rows": {
            "statistics": {
                "num_rows": {"precision_info": 0, "val": {"uint64_value": U64}},
                "total_byte_size": {"precision_info": 0, "val": {"uint64_value": U64}},
            }
        },
        "constraints_out_of_range": {"constraints": {"constraints": [{"primary_key": {"indices": [U64]}}]}},
        "orderings_out_of_range": {
            "output_ordering": [{"physical_sort_expr_nodes": [{"expr": {"column": {"index": U32}}}]}]
        },
        "10_000_groups": {"file_groups": [{"files": []}] * 10_000},
        "limit_0": {"limit": {"limit": 0}},
        "path_empty": {"file_groups": [{"files": [{"path": "", "size": 9}]}]},
        "path_of_50_kb": {"file_groups": [{"files": [{"path": "/" + "a/" * 25_000, "size": 9}]}]},
    }.items():
        for kind in ("csv_scan", "parquet_scan"):
            plan = file_scan(kind, "/dev/null")
            conf = getattr(plan, kind).base_conf
            for field in fields:
                conf.ClearField(field)
            fill(conf, fields)
            yield _plan(f"{kind}_{name}", about, plan)
    old = file_scan("parquet_scan", "/dev/null", projection=[0, 7])
    old.parquet_scan.base_conf.ClearField("projection_exprs")
    yield _plan("scan_of_51_columns_out_of_range", "an older scan of a column that is not there", old)
    for name, text in (("empty", ""), ("long", "abc"), ("wide", "é")):
        plan = file_scan("csv_scan", "/dev/null")
        plan.csv_scan.delimiter = plan.csv_scan.quote = plan.csv_scan.escape = plan.csv_scan.comment = text
        yield _plan(f"csv_delimiter_{name}", "a delimiter that is no byte", plan)
    for name, options in {
        "hint_2_64": {"metadata_size_hint": U64},
        "cache_2_64": {"max_predicate_cache_size": U64, "pushdown_filters": True},
        "garbage": {"coerce_int96": "harm", "compression": "harm", "encoding": "harm", "writer_version": "9"},
    }.items():
        plan = file_scan("parquet_scan", "/dev/null")
        fill(plan.parquet_scan, {"parquet_options": {"global": options}})
        yield _plan(f"parquet_options_{name}", "options that nobody means", plan)
    for name, options in {
        "pages_of_0": {"data_pagesize_limit": 0, "write_batch_size": 0, "max_row_group_size": 0},
        "row_groups_2_64": {"max_row_group_size": U64, "write_batch_size": U64},
        "bloom_filter_2_64": {"bloom_filter_on_write": True, "bloom_filter_ndv": U64, "bloom_filter_fpp": 1e-300},
        "writers_2_64": {
            "allow_single_file_parallelism": True,
            "maximum_parallel_row_group_writers": U64,
            "maximum_buffered_record_batches_per_stream": U64,
        },
    }.items():
        plan = sink("parquet_sink", "file:///proc/hostile/out.parquet", parquet_options={"global": options})
        yield _plan(f"parquet_sink_{name}", "options that nobody means", plan)


@_group
def _odd_nodes() -> Iterator[Recipe]:
    """Nodes that few plans have."""
    plan = planned("SELECT unnest([x, 2]) AS u FROM t", t=column([1]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "unnest":
            for listed in each.unnest.list_type_columns:
                listed.depth = U32
    yield _plan("unnest_2_32_deep", "lists in lists that are none", plan)
    plan = planned("SELECT unnest([x, 2]) AS u FROM t", t=column([1]))
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "unnest":
            each.unnest.struct_type_columns.append(U64)
            each.unnest.list_type_columns.add(index_in_input_schema=U32, depth=1)
    yield _plan("unnest_columns_out_of_range", "columns that are not there", plan)
    plan = node("explain", schema=schema(pa.string(), pa.string()), stringified_plans=[{"plan": "x"}] * 1_000, verbose=True)
    yield _plan("explain_of_nothing", "plans without a kind", plan)
    plan = node("analyze", numbers(), schema=schema(pa.string()), format=99, has_metric_categories=True, metric_categories=["\0"])
    yield _plan("analyze_in_no_format", "formats that are none", plan)
    yield _plan("async_call_of_no_function", "no asynchronous function", node("async_func", numbers(), async_exprs=[X], async_expr_names=[]))
    windows = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
    for each in plan_proto.nodes(windows):
        if plan_proto.kind(each) == "window":
            for window in each.window.window_expr:
                window.window_frame.start_bound.bound_value.uint64_value = U64
                window.window_frame.bound.bound_value.uint64_value = U64
    yield _plan("window_bounds_2_64", "bounds beyond all rows", windows)
    windows = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
    for each in plan_proto.nodes(windows):
        if plan_proto.kind(each) == "window":
            each.window.window_expr[0].args.clear() if False else None
            del each.window.window_expr[0].args[:]
    yield _plan("window_without_arguments", "a sum of nothing", windows)
    groups = planned("SELECT x, sum(x) AS s FROM t GROUP BY x", t=column([1]))
    for each in plan_proto.nodes(groups):
        if plan_proto.kind(each) == "aggregate":
            each.aggregate.groups.extend([True] * 5_000)
    yield _plan("aggregate_with_5_000_groupings", "more groupings than expressions", groups)
    groups = planned("SELECT x, sum(x) AS s FROM t GROUP BY x", t=column([1]))
    for each in plan_proto.nodes(groups):
        if plan_proto.kind(each) == "aggregate":
            each.aggregate.mode = 77
    yield _plan("aggregate_in_no_mode", "a mode that is none", groups)
    for kind in ("symmetric_hash_join", "sort_merge_join"):
        yield _plan(f"{kind}_of_nothing", "a join without keys", node(kind, numbers(), numbers()))
    yield _plan("subquery_in_itself", "subqueries in each other", _subqueries(6))
    yield _plan("sort_without_keys", "no order", node("sort", numbers()))
    yield _plan("merge_without_keys", "no order", node("sort_preserving_merge", _repeated(numbers(), 2)))


def _subqueries(depth: int) -> Message:
    plan = projected({"scalar_subquery": {"data_type": {"INT64": {}}, "index": 0}})
    for _ in range(depth):
        plan = node("scalar_subquery", plan, subqueries=[plan, numbers()])
    return plan


@_group
def _extensions() -> Iterator[Recipe]:
    """Nodes of Distributed DataFusion, in both of its dialects."""
    for kind in (Kind.PLAN, Kind.TASK):
        said = kind.value
        yield _plan(f"extension_garbage_as_{said}", "no node", extension(b"\xff" * 50), kind)
        yield _plan(f"extension_empty_as_{said}", "no node", extension(b""), kind)
        unknown = nodes_pb2.Encoded(blob=b"\xfa\x3e\x03abc")
        yield _plan(f"extension_unknown_as_{said}", "a node of another version", extension(unknown), kind)
        other = nodes_pb2.Encoded(encoder_position=U32, blob=b"harm")
        yield _plan(f"extension_of_a_codec_as_{said}", "a node for a codec that is not there", extension(other, numbers()), kind)
        yield _plan(f"isolator_0_as_{said}", "the partitions of no task", distributed("partition_isolator", numbers(), n_tasks=0), kind)
        yield _plan(f"isolator_2_64_as_{said}", "the partitions of so many tasks", distributed("partition_isolator", numbers(), n_tasks=U64), kind)
        yield _plan(f"broadcast_2_40_as_{said}", "memory for each copy", distributed("broadcast", numbers(), consumer_task_count=1 << 40), kind)
        yield _plan(f"broadcast_of_nothing_as_{said}", "a broadcast without input", distributed("broadcast", consumer_task_count=1), kind)
        nested = numbers()
        for _ in range(9):
            nested = distributed("broadcast", nested, consumer_task_count=100)
        yield _plan(f"broadcasts_in_each_other_as_{said}", "10^18 copies", node("merge", nested), kind)
        children = [{"child_ctx": [{"child_idx": U64, "task_idx": U64, "task_count": 0}]}]
        union = distributed("children_isolator_union", numbers(), partition_count=U64, task_idx_map=children)
        yield _plan(f"isolated_union_out_of_range_as_{said}", "inputs that are not there", union, kind)
        for name, partitions in (("2_40", 1 << 40), ("0", 0)):
            read = network("shuffle", partitions, [NOBODY], QUERY)
            yield _plan(f"shuffle_of_{name}_partitions_as_{said}", "memory for each partition", node("merge", read), kind)
        read = network("shuffle", 1, [NOBODY], b"short")
        yield _plan(f"shuffle_of_a_short_query_as_{said}", "a query's number of five bytes", read, kind)
        read = network("shuffle", 1, [], QUERY)
        yield _plan(f"shuffle_from_nobody_as_{said}", "a stage without tasks", read, kind)
        read = network("shuffle", 1, ["file:///etc/passwd", "\0", "http://[::1"], QUERY)
        yield _plan(f"shuffle_from_no_url_as_{said}", "workers that are none", read, kind)
        read = network("coalesce", 1, [NOBODY], QUERY, plan_proto=b"\xff" * 99)
        yield _plan(f"coalesce_of_garbage_as_{said}", "a stage's plan that is none", read, kind)
        bad = node("empty", schema=schema(pa.int64()), partitions=U32)
        read = network("coalesce", 1, [NOBODY], QUERY, plan_proto=bad.SerializeToString())
        yield _plan(f"coalesce_of_2_32_partitions_as_{said}", "a stage's plan that kills whoever decodes it", read, kind)
        hidden = network("coalesce", 1, [NOBODY], QUERY, plan_proto=file_scan("csv_scan", "/etc/passwd").SerializeToString())
        yield _plan(f"coalesce_of_a_file_as_{said}", "a stage's plan that reads what is not the client's", hidden, kind)
        read = distributed("shuffle", schema=b"\xff", partitioning=b"\xff", input_stage={"query_id": QUERY})
        yield _plan(f"shuffle_of_garbage_as_{said}", "a schema that is none", read, kind)
        huge = distributed(
            "shuffle",
            schema=_schema_bytes(typed_schema({"FIXED_SIZE_BINARY": I32})),
            partitioning=plan_proto.Partitioning(unknown=1).SerializeToString(),
            input_stage={"query_id": QUERY, "num": 2, "tasks": [{"url_str": NOBODY}]},
        )
        yield _plan(f"shuffle_of_large_values_as_{said}", "a type of 2 GiB a value", huge, kind)
        yield _plan(f"sampler_of_nothing_as_{said}", "a sampler without input", distributed("sampler"), kind)


def _schema_bytes(fields: Mapping[str, Any]) -> bytes:
    made = plan_proto.Schema()
    fill(made, fields)
    return bytes(made.SerializeToString())


@_group
def _requests() -> Iterator[Recipe]:
    """Tickets and requests that are none."""
    plan = numbers().SerializeToString()
    tickets: Mapping[str, bytes] = {
        "empty": b"",
        "garbage": b"\xff" * 99,
        "without_plan": plan_pb2.DoGet(target_partition=1).SerializeToString(),
        "partition_2_64": plan_pb2.DoGet(plan_proto=plan, target_partition=U64).SerializeToString(),
        "task_2_64": plan_pb2.DoGet(plan_proto=plan, target_task_index=U64, target_task_count=1).SerializeToString(),
        "short_key": plan_pb2.DoGet(plan_proto=plan, stage_key=plan_pb2.StageKey(query_id=b"short")).SerializeToString(),
        "empty_key": plan_pb2.DoGet(plan_proto=plan, stage_key=plan_pb2.StageKey()).SerializeToString(),
        "plan_of_text": plan_pb2.DoGet(plan_proto=b"SELECT 1").SerializeToString(),
        "cut": plan_pb2.DoGet(plan_proto=plan).SerializeToString()[:-9],
        "groups_in_each_other": b"\x0b" * 5_000,
        "length_2_64": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        "number_without_end": b"\x08" + b"\xff" * 99,
        "twice": plan_pb2.DoGet(plan_proto=plan).SerializeToString() + plan_pb2.DoGet(plan_proto=b"\xff").SerializeToString(),
    }
    for name, data in tickets.items():
        yield f"ticket_{name}", "a ticket that is none", Case(Kind.TICKET, data)
        yield f"descriptor_{name}", "a descriptor that is none", Case(Kind.DESCRIPTOR, data)
    killer = node("empty", schema=schema(pa.int64()), partitions=U32).SerializeToString()
    described = {
        "of_2_32_partitions": killer,
        "of_2_20_partitions": node("empty", schema=schema(pa.int64()), partitions=1 << 20).SerializeToString(),
        "of_a_file": file_scan("csv_scan", "/etc/passwd").SerializeToString(),
        "of_a_sink": sink("csv_sink", "/proc/hostile/out").SerializeToString(),
    }
    for name, data in described.items():
        case = Case(Kind.DESCRIPTOR, plan_pb2.DoGet(plan_proto=data).SerializeToString())
        yield f"descriptor_{name}", "a plan that is only described", case
    yield from _set_plans(plan)
    yield from _executes()


def _set_plans(plan: bytes) -> Iterator[Recipe]:
    key = worker_pb2.TaskKey(query_id=QUERY, stage_id=1, task_number=0)
    declared = [worker_pb2.SetPlanRequest.WorkUnitFeedDeclaration(id=b"\xff", partitions=U64)]
    make = partial(worker_pb2.SetPlanRequest, task_key=key, task_count=1, plan_proto=plan)
    for name, request in {
        "empty": worker_pb2.SetPlanRequest(),
        "without_plan": make(plan_proto=b""),
        "without_key": make(task_key=None),
        "short_query": make(task_key=worker_pb2.TaskKey(query_id=b"short")),
        "task_2_64": make(task_key=worker_pb2.TaskKey(query_id=QUERY, stage_id=U64, task_number=U64)),
        "of_2_64_tasks": make(task_count=U64),
        "of_no_tasks": make(task_count=0),
        "fed_with_work": make(work_unit_feed_declarations=declared),
        "for_no_url": make(target_worker_url="\0"),
        "of_another_time": make(query_start_time_ns=U64),
        "garbage": make(plan_proto=b"\xff" * 99),
    }.items():
        yield f"set_plan_{name}", "a request that is none", Case(Kind.SET_PLAN, request.SerializeToString())
    yield "set_plan_bytes", "a request that is none", Case(Kind.SET_PLAN, b"\xff" * 99)


def _executes() -> Iterator[Recipe]:
    key = worker_pb2.TaskKey(query_id=EXECUTE_QUERY, stage_id=0, task_number=0)
    none = worker_pb2.NoneHead()

    def repartition(**fields: Any) -> worker_pb2.RepartitionExecHead:
        message = plan_proto.Partitioning()
        fill(message, fields)
        return worker_pb2.RepartitionExecHead(partitioning=message.SerializeToString())

    make = partial(worker_pb2.ExecuteTaskRequest, task_key=key, target_partition_end=1)
    many = {"target_partition_end": U64}
    huge = {"null_value": {"FIXED_SIZE_BINARY": I32}}
    for name, request in {
        "without_head": make(),
        "without_key": make(task_key=None, none=none),
        "of_2_64_partitions": make(none=none, **many),
        "backwards": make(none=none, target_partition_start=9),
        "from_2_64": make(none=none, target_partition_start=U64, target_partition_end=U64),
        "broadcast_2_64": make(broadcast=worker_pb2.BroadcastExecHead(output_partitions=U64), **many),
        "broadcast_0": make(broadcast=worker_pb2.BroadcastExecHead(output_partitions=0)),
        "hash_2_64": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": U64})),
        "hash_2_20": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": 1 << 20})),
        "hash_0": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": 0})),
        "hash_by_nothing": make(repartition=repartition(hash={"hash_expr": [{}], "partition_count": 2})),
        "hash_by_large_values": make(repartition=repartition(hash={"hash_expr": [literal(**huge)], "partition_count": 2})),
        "hash_out_of_range": make(
            repartition=repartition(hash={"hash_expr": [{"column": {"name": "x", "index": U32}}], "partition_count": 2})
        ),
        "hash_by_60_000_operands": make(
            repartition=repartition(
                hash={
                    "hash_expr": [{"binary_expr": {"op": "Plus", "operands": [X] * 60_000}}],
                    "partition_count": 2,
                }
            )
        ),
        "round_robin_2_32": make(repartition=repartition(round_robin=U32)),
        "unknown_2_64": make(repartition=repartition(unknown=U64)),
        "of_garbage": make(repartition=worker_pb2.RepartitionExecHead(partitioning=b"\xff" * 99)),
    }.items():
        yield f"execute_{name}", "a request that does not fit", Case(Kind.EXECUTE, request.SerializeToString())
    yield "execute_bytes", "a request that is none", Case(Kind.EXECUTE, b"\xff" * 99)
