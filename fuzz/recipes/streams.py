"""Arrow data inside of plans, in scans and in literals, whose numbers lie."""

from collections.abc import Iterator, Mapping

import pyarrow as pa

from fuzz import arrow
from fuzz.building import (
    column,
    planned,
    scan,
)
from fuzz.recipes.recipe import I32, I64, Recipe, recipe
from worker import plan_proto
from worker.plan_proto import Message


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _streams()
    yield from _compressed_streams()
    yield from _deep_streams()
    yield from _nested_literals()
    yield from _nested_bombs()


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
            yield recipe(f"ipc_{kind}_rows_{lie}", "more rows than there are bytes", _of_stream(changed, batch))
        if last.buffers:
            changed = arrow.put(data, last.buffers[-1], 1 << 40)
            yield recipe(f"ipc_{kind}_buffer_too_long", "a buffer beyond the body", _of_stream(changed, batch))
            changed = arrow.put(data, last.buffers[-2], -8)
            yield recipe(f"ipc_{kind}_buffer_before_body", "a buffer ahead of the body", _of_stream(changed, batch))
            changed = data[: last.body] + b"\xff" * last.size + data[last.body + last.size :]
            yield recipe(
                f"ipc_{kind}_body_of_ones", "offsets, keys and sizes beyond everything", _of_stream(changed, batch)
            )
        yield recipe(f"ipc_{kind}_cut", "a stream that ends too soon", _of_stream(data[: last.body + 1], batch))
    batch = BATCHES["strings"]
    data = arrow.stream(batch)
    (found,) = arrow.batches(data)
    assert found.framing is not None
    assert found.body_length is not None
    for name, value in (("2_31", I32), ("negative", -8), ("0", 0)):
        changed = arrow.put(data, found.framing, value, 4)
        yield recipe(f"ipc_metadata_length_{name}", "metadata beyond the bytes", _of_stream(changed, batch))
        changed = arrow.put(data, 4, value, 4)
        yield recipe(f"ipc_schema_length_{name}", "metadata beyond the bytes", _of_stream(changed, batch))
    for name, value in (("2_62", 1 << 62), ("negative", -1), ("0", 0)):
        changed = arrow.put(data, found.body_length, value)
        yield recipe(f"ipc_body_length_{name}", "a body beyond the bytes", _of_stream(changed, batch))
    changed = arrow.put(data, found.nodes[1], 1 << 40)
    yield recipe("ipc_null_count_2_40", "more nulls than rows", _of_stream(changed, batch))
    yield recipe(
        "ipc_of_another_schema", "a stream of other columns", _of_stream(arrow.stream(BATCHES["numbers"]), batch)
    )
    yield recipe("ipc_garbage", "no stream", _of_stream(b"\xff\xff\xff\xff" + b"garbage!" * 100, batch))
    yield recipe("ipc_empty", "a stream of nothing", _of_stream(b"", batch))


def _compressed_streams() -> Iterator[Recipe]:
    batch = column([0] * 1000, pa.int64())
    for compression in ("zstd", "lz4"):
        data = arrow.stream(batch, compression)
        (found,) = arrow.batches(data)
        at = found.body  # where the one buffer that is not empty begins: with its length before it was compressed
        for name, value in (("2_62", 1 << 62), ("negative", -7), ("2_33", 1 << 33), ("1", 1)):
            plan = _of_stream(arrow.put(data, at, value), batch)
            yield recipe(f"ipc_{compression}_length_{name}", "a length before compression that lies", plan)
        garbage = data[: at + 8] + b"\xa5" * (found.size - 8) + data[at + found.size :]
        yield recipe(f"ipc_{compression}_garbage", "a frame that is none", _of_stream(garbage, batch))
        mebibytes = 512 if compression == "zstd" else 64
        zeros = pa.RecordBatch.from_arrays(
            [pa.Array.from_buffers(pa.int64(), mebibytes << 17, [None, pa.py_buffer(bytes(mebibytes << 20))])], ["x"]
        )
        data = arrow.stream(zeros, compression)
        yield recipe(f"ipc_{compression}_bomb", f"{mebibytes} MiB of zeros", _of_stream(data, column([1])))
        plan = _of_stream(data, column([1]))
        plan.memory_scan.partitions.extend([data] * 31)
        yield recipe(f"ipc_{compression}_bombs", f"32 partitions of {mebibytes} MiB of zeros", plan)


def _deep_streams() -> Iterator[Recipe]:
    kind: pa.DataType = pa.int64()
    for _ in range(60):
        kind = pa.list_(kind)
    deep = pa.RecordBatch.from_arrays([pa.nulls(1, kind)], ["x"])
    yield recipe("ipc_lists_in_lists", "a stream 60 types deep", _of_stream(arrow.stream(deep), column([1])))
    wide = pa.RecordBatch.from_arrays([pa.nulls(1, pa.int8())] * 1_000, [f"c{at}" for at in range(1_000)])
    yield recipe(
        "ipc_of_1_000_columns",
        "a stream of more columns than the scan says",
        _of_stream(arrow.stream(wide), column([1])),
    )
    promised = arrow.stream(pa.RecordBatch.from_arrays([pa.nulls(0, pa.binary(I32))], ["x"]))
    small = arrow.stream(BATCHES["fixed_size_binaries"])
    data = promised[: next(iter(arrow.messages(promised)))[3]] + small[next(iter(arrow.messages(small)))[3] :]
    yield recipe("ipc_fixed_size_binary_2_31", "rows of 2 GiB each", _of_stream(data, column([1])))


def _of_stream(data: bytes, like: pa.RecordBatch) -> Message:
    plan = scan(like)
    plan.memory_scan.partitions[:] = [data]
    return plan


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
                yield recipe(f"nested_{kind}_{lie}", "more rows than there are bytes", changed)
        changed = plan_proto.parse(plan)
        touched = 0
        for value in _nested_values(changed):
            found = arrow.metadata_numbers(value.ipc_message)
            if found is not None:
                for at in found.buffers[1::2]:
                    touched += 1
                    value.ipc_message = arrow.put(value.ipc_message, at, 1 << 40)
        if touched:
            yield recipe(f"nested_{kind}_buffers_2_40", "buffers beyond the body", changed)
        changed = plan_proto.parse(plan)
        for value in _nested_values(changed):
            value.arrow_data = b""
        yield recipe(f"nested_{kind}_without_data", "buffers of nothing", changed)


def _nested_bombs() -> Iterator[Recipe]:
    large = column([[0] * (1 << 24)], pa.list_(pa.int64()))
    message = plan_proto.parse(planned("SELECT x FROM t WHERE [x] <> [1, 2, 3]", t=column([1])).SerializeToString())
    data = arrow.stream(large, "zstd")
    (numbers_at,) = arrow.batches(data)
    starts = [start for start, *_ in arrow.messages(data)]
    for value in _nested_values(message):
        value.ipc_message = data[starts[1] - 8 : numbers_at.body]
        value.arrow_data = data[numbers_at.body : numbers_at.body + numbers_at.size]
        break
    yield recipe("nested_list_zstd_bomb", "128 MiB out of a few thousand bytes", message)


def _nested_values(message: Message) -> Iterator[Message]:
    """Every nested value of a plan."""
    for field, value in message.ListFields():
        if field.message_type:
            for each in value if field.is_repeated else [value]:
                if field.message_type.full_name == "datafusion_common.ScalarNestedValue":
                    yield each
                elif not field.message_type.GetOptions().map_entry:
                    yield from _nested_values(each)
