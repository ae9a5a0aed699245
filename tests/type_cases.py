"""Streams of all types that DataFusion carries: several batches each, so that something may change in between."""

import datetime
import decimal
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datafusion import DataFrame, ExecutionPlan, SessionContext

LONG = "a string that is too long to stand inside of a view"

# What there is to be said of a case, and stands in the table of the documentation.
MAP_SORTED = "DataFusion's Python package loses that a map's keys are sorted"
MAP_NAMES = "pyarrow calls the fields of every map key and value"
ORDERED = "without a batch, DataFusion's Python package loses that a dictionary is ordered"
NO_CLASS = "pyarrow reads, compares and writes it, but does not show its values"
GO_SIZE_0 = "arrow-go takes no list of size 0"

CLIENTS = ("pyarrow", "rust", "go")
PARTS = ("whole", "sliced", "none")


@dataclass(frozen=True)
class Stream:
    """A plan of one partition, and what it makes."""

    plan: bytes
    schema: pa.Schema
    batches: Sequence[pa.RecordBatch]


@dataclass(frozen=True)
class Case:
    """A stream to be made, whole or in part."""

    row: str
    """The row of ``docs/types.md`` that it is a case of."""
    variant: str
    frame: Callable[[SessionContext], DataFrame]
    batches: Sequence[pa.RecordBatch] | None
    """What the frame makes; None where pyarrow cannot make it, so that only DataFusion can say."""
    meant: Sequence[pa.RecordBatch] = ()
    """What was put in, where that is lost before the worker has it."""
    schema_alone: pa.Schema | None = None
    """The schema that arrives where there is no batch, if it is another."""
    unread_by: frozenset[str] = frozenset()
    """The clients that cannot read it."""
    note: str = ""

    def stream(self, part: str) -> Stream:
        """All rows, those from the second on to the last but one (a slice at an odd offset), or not even a batch."""
        frame = self.frame(SessionContext())
        plan = frame.execution_plan().to_bytes()
        made = in_process(plan) if self.batches is None else self.batches
        schema = made[0].schema if made else frame.schema()
        if part == "whole":
            return Stream(plan, schema, made)
        if part == "none":
            return Stream(frame.limit(0).execution_plan().to_bytes(), self.schema_alone or schema, [])
        table = pa.Table.from_batches(made, schema)
        rows = max(0, table.num_rows - 2)
        plan = frame.limit(rows, offset=1).execution_plan().to_bytes()
        return Stream(plan, schema, table.slice(1, rows).to_batches())


def in_process(plan: bytes) -> list[pa.RecordBatch]:
    """The batches of a plan's only partition, made by DataFusion in this process."""
    session = SessionContext()
    return [batch.to_pyarrow() for batch in session.execute(ExecutionPlan.from_bytes(session, plan), 0)]


CASES: dict[str, Case] = {}


def _add(case: Case) -> None:
    name = "-".join([*case.row.split(), *case.variant.split()])
    assert name not in CASES, name
    CASES[name] = case


def _table(batches: Sequence[pa.RecordBatch]) -> Callable[[SessionContext], DataFrame]:
    return lambda session: session.create_dataframe([list(batches)])


def _batches(row: str, *batches: pa.RecordBatch, variant: str = "", **options: Any) -> None:
    _add(Case(row, variant, _table(options.get("meant", batches)), batches, **options))


def _batch(*arrays: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*arrays], names=[f"c{index}" for index in range(len(arrays))])


def _column(row: str, *arrays: pa.Array, variant: str = "", **options: Any) -> None:
    _batches(row, *map(_batch, arrays), variant=variant, **options)


def _values(row: str, type_: pa.DataType, first: Any, second: Any, variant: str = "", **options: Any) -> None:
    """A batch with nulls, and one without."""
    some, all_ = pa.array([first, second, None, first], type_), pa.array([second, second, first], type_)
    _column(row, some, all_, variant=variant, **options)


# --- Types without children

_column("null", pa.nulls(3), pa.nulls(2))
_values("boolean", pa.bool_(), True, False)
for bits in (8, 16, 32, 64):
    _values("integer", pa.type_for_alias(f"int{bits}"), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, f"int{bits}")
    _values("integer", pa.type_for_alias(f"uint{bits}"), 0, 2**bits - 1, f"uint{bits}")
for row, bits in (("half", 16), ("single", 32), ("double", 64)):
    float_ = pa.type_for_alias(f"float{bits}")
    _values(row, float_, 1.5, -0.0)
    _values(row, float_, float("inf"), float("-inf"), "infinite")
    _values(row, float_, float("nan"), 0.0, "not a number")
    ones = pa.array([2**bits - 1, 2 ** (bits - 1) - 1, None], pa.type_for_alias(f"uint{bits}"))
    _column(row, ones.view(float_), variant="not a number of other bits")
for make, digits in ((pa.decimal32, 9), (pa.decimal64, 18), (pa.decimal128, 38), (pa.decimal256, 76)):
    name = make.__name__
    _values(name, make(digits, 2), decimal.Decimal("-1.25"), decimal.Decimal("9" * (digits - 2)))
    _values(name, make(5, -2), decimal.Decimal(100), decimal.Decimal(-200), "of negative scale")
for type_ in (pa.date32(), pa.date64()):
    _values("date", type_, datetime.date(1960, 1, 1), datetime.date(2024, 2, 29), str(type_).partition("[")[0])
for unit in ("s", "ms", "us", "ns"):
    of_day = pa.time32(unit) if unit in {"s", "ms"} else pa.time64(unit)
    _values("time", of_day, datetime.time(1, 2, 3), datetime.time(23, 59, 59), unit)
    _values("timestamp", pa.timestamp(unit), -(2**63) + 1, 2**63 - 1, unit)
    _values("timestamp with zone", pa.timestamp(unit, "UTC"), 1000, -2001, unit)
    _values("duration", pa.duration(unit), -(2**63) + 1, 2**63 - 1, unit)
_values("timestamp with zone", pa.timestamp("us", "Europe/Berlin"), 1, -2, "by name")
_values("timestamp with zone", pa.timestamp("us", "+05:30"), 1, -2, "by offset")
_values(
    "interval month day nano",
    pa.month_day_nano_interval(),
    pa.MonthDayNano([1, 2, 3]),
    pa.MonthDayNano([-4, -5, -(2**63)]),
)


_TEXTS = {"YearMonth": "('1 month'), ('-3 years')", "DayTime": "('1 day'), ('-5 milliseconds')"}


def interval(type_: str, columns: str) -> Callable[[SessionContext], DataFrame]:
    """Columns of SQL, in which ``i`` is an interval and ``t`` its text."""
    texts = f"SELECT column1 AS t FROM (VALUES {_TEXTS[type_]}, (NULL))"
    intervals = f"SELECT t, arrow_cast(t, 'Interval({type_})') AS i FROM ({texts})"
    return lambda session: session.sql(f"SELECT {columns} FROM ({intervals})")


for row, unnamed in (("interval year month", "YearMonth"), ("interval day time", "DayTime")):
    for variant, columns in (
        ("", "i, t"),
        ("in a list", "make_array(i, i) AS l"),
        ("in a struct", "named_struct('i', i, 't', t) AS s"),
    ):
        _add(Case(row, variant, interval(unnamed, columns), None, note=NO_CLASS))
for type_ in (pa.string(), pa.large_string(), pa.string_view()):
    _values(str(type_).replace("_", " "), type_, LONG, "ü")
    _values(str(type_).replace("_", " "), type_, "", "", "empty")
for type_ in (pa.binary(), pa.large_binary(), pa.binary_view()):
    _values(str(type_).replace("_", " "), type_, b"\0\xff" * 20, b"")
_values("fixed-size binary", pa.binary(3), b"abc", b"\0\0\0")
_values("fixed-size binary", pa.binary(0), b"", b"", "of size 0")

# --- Lists, structs, maps and unions

_ELEMENT = pa.field("element", pa.int8(), nullable=False, metadata={"k": "v"})
_LISTS: dict[str, Callable[[Any], pa.DataType]] = {
    "list": pa.list_,
    "large list": pa.large_list,
    "list view": pa.list_view,
    "large list view": pa.large_list_view,
}
for row, list_ in _LISTS.items():
    _values(row, list_(pa.int32()), [1, None, 3], [])
    _values(row, list_(pa.string_view()), [LONG, None], ["b"], "of views")
    _values(row, list_(list_(pa.float64())), [[1.0], None, [float("nan")]], [[]], "of lists")
    _values(row, list_(_ELEMENT), [1], [1, 2], "of a field with metadata")
_column(
    "list view",
    pa.ListViewArray.from_arrays(pa.array([2, 0, 0, 1], pa.int32()), pa.array([1, 2, 0, 2], pa.int32()), [1, 2, 3]),
    pa.ListViewArray.from_arrays(pa.array([1, 0], pa.int32()), pa.array([1, 1], pa.int32()), [1, 2, 3]),
    variant="out of order and shared",
)
_values("fixed-size list", pa.list_(pa.int32(), 2), [1, None], [3, 4])
_values("fixed-size list", pa.list_(_ELEMENT, 2), [1, 2], [3, 4], "of a field with metadata")
_values(
    "fixed-size list",
    pa.list_(pa.int32(), 0),
    [],
    [],
    "of size 0",
    note=GO_SIZE_0,
    unread_by=frozenset({"go"}),
)
_values(
    "struct",
    pa.struct([("a", pa.int32()), pa.field("b", pa.string(), metadata={"k": "v"})]),
    {"a": 1, "b": None},
    {"a": None, "b": "x"},
)
_values("struct", pa.struct([]), {}, {}, "without fields")
_values(
    "struct", pa.struct([("a", pa.struct([("b", pa.list_(pa.string()))]))]), {"a": {"b": ["x"]}}, {"a": None}, "nested"
)
_column(
    "struct",
    pa.StructArray.from_arrays([pa.array([1, 2]), pa.array(["x", "y"]), pa.array([None, True])], names=["a", "a", ""]),
    variant="of duplicate and empty names",
)
_values("map", pa.map_(pa.string(), pa.int32()), [("a", 1), ("b", None)], [])
_values("map", pa.map_(pa.string(), pa.list_(pa.float64())), [("a", [1.0, None])], [("b", None)], "of lists")


def _map(type_: pa.MapType) -> list[pa.RecordBatch]:
    return [_batch(pa.array([[("a", 1), ("b", None)], [], None], type_)), _batch(pa.array([[("c", 2)]], type_))]


_OTHER_NAMES = pa.map_(pa.field("k", pa.string(), nullable=False), pa.field("v", pa.int32()))
for variant, type_, reason in (
    ("sorted", pa.map_(pa.string(), pa.int32(), keys_sorted=True), MAP_SORTED),
    ("of other names", _OTHER_NAMES, MAP_NAMES),
):
    _batches(
        "map",
        *_map(pa.map_(pa.string(), pa.int32())),
        variant=variant,
        meant=_map(type_),
        note=reason,
    )


def _sparse(codes: list[int], number: int) -> pa.UnionArray:
    which = pa.array([codes[0], codes[1], codes[0], codes[1]], pa.int8())
    children = [pa.array([number, 9, None, 9], pa.int32()), pa.array(["unseen", LONG, "unseen", None])]
    return pa.UnionArray.from_sparse(which, children, ["i", "s"], codes)


def _dense(codes: list[int], number: int) -> pa.UnionArray:
    which = pa.array([codes[0], codes[1], codes[0], codes[1]], pa.int8())
    children = [pa.array([number, None], pa.int32()), pa.array([LONG, None])]
    return pa.UnionArray.from_dense(which, pa.array([0, 0, 1, 1], pa.int32()), children, ["i", "s"], codes)


for row, make in (("sparse union", _sparse), ("dense union", _dense)):
    _column(row, make([0, 1], 1), make([0, 1], 2))
    _column(row, make([5, 7], 1), make([5, 7], 2), variant="of other codes")
    _column(
        row,
        *(pa.StructArray.from_arrays([make([0, 1], n), pa.array(range(4))], names=["u", "n"]) for n in (1, 2)),
        variant="in a struct",
    )

# --- Dictionaries

INT32 = pa.int32()


def _dictionary(indices: Iterable[int | None], values: Any, type_: Any = INT32, ordered: bool = False) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, type_), pa.array(values), ordered=ordered)


for type_ in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()):
    _column(
        "dictionary",
        _dictionary([0, 1, None, 0, 2], ["a", "b", "c", "unused"], type_),
        _dictionary([2, 0], ["x", "y", "a"], type_),
        variant=f"of {type_}",
    )
for variant, distinct in (
    ("integers", pa.array([1, 2])),
    ("floats", pa.array([1.0, float("nan")])),
    ("booleans", pa.array([True, False])),
    ("decimals", pa.array([decimal.Decimal("1.1"), decimal.Decimal("2.2")])),
    ("timestamps", pa.array([1, 2], pa.timestamp("us", "UTC"))),
    ("binary", pa.array([b"a", b"b"])),
    ("fixed-size binary", pa.array([b"ab", b"cd"], pa.binary(2))),
    ("large strings", pa.array(["a", "b"], pa.large_string())),
    ("views", pa.array([LONG, "b"], pa.string_view())),
    ("lists", pa.array([[1], [2, 3]])),
    ("structs", pa.array([{"a": 1}, {"a": 2}])),
    ("structs of dictionaries", pa.StructArray.from_arrays([_dictionary([1, 0], ["a", "b"])], names=["d"])),
):
    _column(
        "dictionary",
        _dictionary([0, 1, None, 1], distinct, pa.int16()),
        _dictionary([1, 0], distinct, pa.int16()),
        variant=f"to {variant}",
    )


def _ordered_flag(variant: str, make: Callable[[str, bool], pa.Array]) -> None:
    alone = _batch(make("a", False)).schema
    _column("ordered dictionary", *(make(v, True) for v in "ac"), variant=variant, schema_alone=alone, note=ORDERED)


_ordered_flag("", lambda v, ordered: _dictionary([0, 1, None], [v, "b"], ordered=ordered))
_ordered_flag(
    "in a list",
    lambda v, ordered: pa.ListArray.from_arrays([0, 2, 3], _dictionary([0, 1, None], [v, "b"], ordered=ordered)),
)
_column("dictionary with nulls among its values", *(_dictionary([0, 1, 2, None], [v, "b", None]) for v in "ac"))


def _nested(variant: str, make: Callable[[str], pa.Array]) -> None:
    _column(f"dictionary in {variant}", make("a"), make("c"))


_nested(
    "a list", lambda v: pa.ListArray.from_arrays(pa.array([0, 2, None, 3, 4]), _dictionary([0, 1, None, 0], [v, "b"]))
)
_nested("a large list", lambda v: pa.LargeListArray.from_arrays([0, 2, 3, 4], _dictionary([0, 1, None, 0], [v, "b"])))
_nested("a fixed-size list", lambda v: pa.FixedSizeListArray.from_arrays(_dictionary([0, 1, None, 0], [v, "b"]), 2))
_nested(
    "a list view",
    lambda v: pa.ListViewArray.from_arrays(
        pa.array([2, 0], pa.int32()), pa.array([2, 2], pa.int32()), _dictionary([0, 1, None, 0], [v, "b"])
    ),
)
_nested(
    "a struct",
    lambda v: pa.StructArray.from_arrays(
        [_dictionary([0, 1, None], [v, "b"]), _dictionary([1, None, 0], ["z", v])], names=["d", "e"]
    ),
)
_nested("a map", lambda v: pa.MapArray.from_arrays([0, 1, 3], ["k", "l", "m"], _dictionary([0, 1, None], [v, "b"])))
_nested(
    "a union",
    lambda v: pa.UnionArray.from_dense(
        pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [_dictionary([0, 1], [v, "b"]), pa.array([7])]
    ),
)
_shared = _dictionary([0, 1, None], ["a", "b"])
_batches("dictionary shared by columns", _batch(_shared, _shared), _batch(_shared.slice(1), _shared.slice(0, 2)))
_a, _b = pa.array(["a", "b"]), pa.array(["a", "b", "c"])
_column(
    "another dictionary in each batch",
    *(_dictionary([0, 1, None], v) for v in (_a, _a, _b, _b, _a, ["y", "x"])),
    variant="and again the same",
)
_column(
    "another dictionary in each batch", *(_dictionary([0, n], [f"v{v}" for v in range(n + 1)]) for n in range(1, 5))
)
_column(
    "another dictionary in each batch",
    *(_dictionary(i, pa.array(v, pa.string())) for i, v in (([None], []), ([0], ["a"]), ([], []))),
    variant="or none",
)

# --- Run-end encoded


def _runs(ends: pa.DataType, first: Any = "a", second: Any = "b", type_: pa.DataType | None = None) -> list[pa.Array]:
    long = pa.RunEndEncodedArray.from_arrays(
        pa.array([1, 3, 4, 7], ends), pa.array([first, second, None, first], type_)
    )
    return [long, pa.RunEndEncodedArray.from_arrays(pa.array([2], ends), pa.array([second], type_)), long.slice(2, 4)]


for type_ in (pa.int16(), pa.int32(), pa.int64()):
    _column("run-end encoded", *_runs(type_), variant=str(type_))
_column("run-end encoded", *_runs(pa.int32(), 1.0, float("nan")), variant="of floats")
_column("run-end encoded", *_runs(pa.int32(), [1], [], pa.list_(pa.int32())), variant="of lists")
_column("run-end encoded", *_runs(pa.int32(), LONG, "b", pa.string_view()), variant="of views")
_column(
    "run-end encoded",
    *(pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int32()), _dictionary([0, 1], [v, "b"])) for v in "ac"),
    variant="of dictionaries",
)
_column(
    "run-end encoded", *(pa.StructArray.from_arrays([a], names=["r"]) for a in _runs(pa.int32())), variant="in a struct"
)
_column("run-end encoded", pa.ListArray.from_arrays([0, 2, 7], _runs(pa.int32())[0]), variant="in a list")

# --- Extension types


class Point(pa.ExtensionType):  # type: ignore[misc]
    """A type that this process has registered."""

    def __init__(self) -> None:
        super().__init__(pa.struct([("x", pa.float64()), ("y", pa.float64())]), "tests.point")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"v1"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Point":
        return cls()


pa.register_extension_type(Point())


def _extension(variant: str, type_: pa.DataType, first: Any, second: Any) -> None:
    storages = [pa.array([first, second, None], type_.storage_type), pa.array([second], type_.storage_type)]
    _column("extension", *(pa.ExtensionArray.from_storage(type_, storage) for storage in storages), variant=variant)


_extension("registered here", Point(), {"x": 1.0, "y": 2.0}, {"x": 3.0, "y": None})
_extension("uuid", pa.uuid(), uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes)
_extension("json", pa.json_(pa.string()), "1", "{}")
_extension("bool8", pa.bool8(), 0, 1)
_extension("opaque", pa.opaque(pa.binary(), "type", "vendor"), b"a", b"b")
_extension("tensor", pa.fixed_shape_tensor(pa.int32(), (2, 2)), [1, 2, 3, 4], [5, 6, 7, 8])
_column(
    "extension",
    pa.ListArray.from_arrays([0, 1, 3], pa.array([uuid.UUID(int=n).bytes for n in range(3)], pa.uuid())),
    variant="in a list",
)
_UNKNOWN = {"ARROW:extension:name": "nobody.knows", "ARROW:extension:metadata": "{}"}
_batches(
    "extension",
    *(
        pa.RecordBatch.from_arrays([pa.array(v)], schema=pa.schema([pa.field("x", pa.int64(), metadata=_UNKNOWN)]))
        for v in ([1, None], [2])
    ),
    variant="not registered",
)

# --- Schemas


def _with_schema(row: str, schema: pa.Schema, *rows: Sequence[Any], variant: str = "") -> None:
    batches = [
        pa.RecordBatch.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        for columns in rows
    ]
    _batches(row, *batches, variant=variant)


_with_schema(
    "schema metadata",
    pa.schema([("a", pa.int64())], {"schema": "yes", "ü": "", "": "e"}),
    [[1, None]],
    [[2]],
)
_with_schema(
    "field metadata",
    pa.schema(
        [pa.field("a", pa.int64(), metadata={"k": "v", "ü": ""}), pa.field("b", pa.string(), metadata={"": "e"})]
    ),
    [[1, None], ["x", "y"]],
    [[2], ["z"]],
)
_with_schema(
    "non-nullable field", pa.schema([pa.field("a", pa.int64(), nullable=False), ("b", pa.int8())]), [[1, 2], [None, 3]]
)
_with_schema(
    "non-nullable field",
    pa.schema([pa.field("a", pa.struct([pa.field("b", pa.string(), nullable=False)]), nullable=False)]),
    [[{"b": "x"}, {"b": ""}]],
    variant="in a struct",
)
_with_schema("empty name", pa.schema([("", pa.int64())]), [[1, None]], [[2]])
_with_schema("empty name", pa.schema([('Ä"b. c\n', pa.int64())]), [[1, None]], variant="and odd ones")


def _self_join(session: SessionContext) -> DataFrame:
    session.register_record_batches("t", [[pa.record_batch({"a": [1, 2, None]})]])
    session.register_record_batches("u", [[pa.record_batch({"a": ["x"]})]])
    return session.sql("SELECT t.a, u.a FROM t CROSS JOIN u")


_twice = pa.RecordBatch.from_arrays([pa.array([1, 2, None]), pa.array(["x", "x", "x"])], names=["a", "a"])
_add(Case("duplicate names", "", _self_join, [_twice]))
_batches("no columns", *(pa.record_batch({"a": list(range(n))}).select([]) for n in (3, 4)))
_batches("no columns", pa.record_batch({"a": pa.array([], pa.int8())}).select([]), variant="and no rows")

# --- Rows

# Without sparse unions and runs: arrow-rs refuses those that pyarrow has sliced. ``Case.stream`` has plans slice them.
_MANY = pa.record_batch(
    {
        "number": pa.array(range(20)),
        "boolean": pa.array([n % 3 == 0 if n % 5 else None for n in range(20)]),
        "string": pa.array([f"{LONG} {n}" if n % 3 else None for n in range(20)]),
        "view": pa.array([f"{LONG} {n}" if n % 2 else str(n) for n in range(20)], pa.string_view()),
        "list": pa.array([list(range(n)) for n in range(20)]),
        "struct": pa.array(
            [{"a": n, "b": None} if n % 4 else None for n in range(20)],
            pa.struct([("a", pa.int8()), ("b", pa.string())]),
        ),
        "dictionary": _dictionary([n % 3 if n % 4 else None for n in range(20)], ["a", "b", "c"]),
    }
)
_batches("zero rows", _MANY.slice(0, 0))
_batches(
    "zero rows", _MANY.slice(0, 0), _MANY.slice(0, 3), _MANY.slice(5, 0), _MANY.slice(3, 4), variant="in some batches"
)
_add(Case("zero batches", "", lambda s: s.create_dataframe([[_MANY]]).limit(0), []))
_batches("sliced", *(_MANY.slice(start, 5) for start in (1, 3, 7, 13)))
_batches("sliced", *(_MANY.slice(row, 1) for row in range(7)), variant="into rows")
_ALL_SET = pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(b"\xff"), pa.array([1, 2, 3]).buffers()[1]])
_column("validity", _ALL_SET, variant="present and all set")
_column("validity", pa.array([1, 2, 3]), pa.array([None, 5], pa.int64()), pa.array([6]), variant="absent and present")
_column("validity", pa.array([None, None], pa.int64()), pa.array([], pa.int64()), variant="none set")

# --- What is no case: plans cannot have it

NESTED_DICTIONARY = _batch(_dictionary([0, 1, None], _dictionary([1, 0], ["a", "b"])))
