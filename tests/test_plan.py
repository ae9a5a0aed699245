"""Plans: Python functions that come in them, how they fail to decode, and their schemas, found out without running."""

import gc
import re
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datafusion import (
    AggregateUDF,
    ExecutionPlan,
    ScalarUDF,
    SessionConfig,
    SessionContext,
    WindowUDF,
    udaf,
    udf,
    udwf,
)
from support import RowNumber, Sum, Touch, as_of_51

from worker import EnginePanicked, InvalidPlan
from worker import plan as plan_module
from worker.config import PlanLimits
from worker.plan import (
    PYTHON_UDF_PREFIX,
    decode,
    execution_errors,
    schema_of,
    upgrade_filters,
    without_python_udfs,
)
from worker.plan_proto import PhysicalPlanNode, kind, nodes, parse

INT = pa.int64()


def test_the_classes_of_messages_are_kept_when_there_are_no_messages() -> None:
    """protobuf hands them out while the garbage collector takes them, and the process ends."""
    message = PhysicalPlanNode()
    message.hash_join.left.empty.SetInParent()
    kept = [weakref.ref(type(each)) for each in (message.hash_join, message.hash_join.left.empty)]
    del message
    gc.collect()
    assert all(each() is not None for each in kept)


def _scalar(trap: object) -> ScalarUDF:
    return udf(lambda values: (trap, pc.add(values, 1))[1], [INT], INT, "volatile", "my_scalar")


def _aggregate(trap: object) -> AggregateUDF:
    return udaf(lambda: Sum(trap), [INT], INT, [INT], "volatile", "my_aggregate")


def _window(trap: object) -> WindowUDF:
    return udwf(lambda: (trap, RowNumber())[1], [INT], INT, "volatile", "my_window")


CALLS = {
    "scalar": "SELECT my_scalar(x) AS y FROM t",
    "aggregate": "SELECT g, my_aggregate(x) AS y FROM t GROUP BY g",
    "window": "SELECT my_window(x) OVER (ORDER BY x) AS y FROM t",
}
EVERYWHERE = (
    "SELECT my_scalar(a.s) AS y FROM (SELECT g, my_aggregate(my_scalar(x)) AS s, count(*) AS n FROM t GROUP BY g "
    "HAVING my_aggregate(x) > 0) AS a JOIN (SELECT my_window(x) OVER (PARTITION BY g ORDER BY my_scalar(x)) AS n, "
    "my_aggregate(x) OVER (ORDER BY x) AS m FROM t WHERE my_scalar(x) > 0) AS b "
    "ON a.n = b.n AND my_scalar(a.s) > b.m - 9 ORDER BY my_scalar(y)"
)


def _session(trap: object = None) -> SessionContext:
    """A session with a function of each kind, which hold a trap, and a table."""
    session = SessionContext(SessionConfig().with_target_partitions(2))
    session.register_udf(_scalar(trap))
    session.register_udaf(_aggregate(trap))
    session.register_udwf(_window(trap))
    batch = pa.RecordBatch.from_pydict({"x": [1, 2, 3], "g": ["a", "b", "a"]})
    session.register_record_batches("t", [[batch]])
    return session


def _strict() -> SessionContext:
    return SessionContext().with_python_udf_inlining(enabled=False)


def _rows(session: SessionContext, plan: ExecutionPlan) -> list[pa.RecordBatch]:
    return [
        batch.to_pyarrow() for partition in range(plan.partition_count) for batch in session.execute(plan, partition)
    ]


@pytest.mark.parametrize("query", [*CALLS.values(), EVERYWHERE], ids=[*CALLS, "everywhere"])
def test_python_functions_are_dropped_unread_and_found_by_name(query: str, tmp_path: Path) -> None:
    """The file appears once the same plan is decoded where inlining is on: the trap works."""
    touched = tmp_path / "unpickled"
    session = _session(Touch(touched))
    plan = session.sql(query).execution_plan().to_bytes(session)
    assert not touched.exists()
    assert PYTHON_UDF_PREFIX in plan

    stripped = without_python_udfs(plan)
    assert PYTHON_UDF_PREFIX not in stripped
    assert b"cloudpickle" not in stripped
    with pytest.raises(InvalidPlan, match=r"the session has no .* function 'my_"):
        decode(_strict(), stripped)
    with pytest.raises(InvalidPlan, match="inlining is disabled"):
        decode(_strict(), plan)
    own = _session().with_python_udf_inlining(enabled=False)
    found = _rows(own, decode(own, stripped))
    assert not touched.exists()
    assert pa.Table.from_batches(found).num_rows > 0

    decode(SessionContext().with_python_udf_inlining(enabled=True), plan)
    assert touched.exists()


@pytest.mark.parametrize("category", CALLS)
def test_a_missing_function_is_named_with_its_kind(category: str) -> None:
    session = _session()
    plan = session.sql(CALLS[category]).execution_plan().to_bytes(session)
    with pytest.raises(InvalidPlan, match=f"the session has no {category} function 'my_{category}': register it"):
        decode(_strict(), without_python_udfs(plan))


@pytest.mark.parametrize("name", ["my function", "my.function", 'my"function', "Größe"])
def test_a_missing_function_is_named_in_full(name: str) -> None:
    session = SessionContext()
    session.register_udf(udf(lambda values: values, [INT], INT, "volatile", name))
    quoted = name.replace('"', '""')
    plan = session.sql(f'SELECT "{quoted}"(1)').execution_plan().to_bytes(session)
    with pytest.raises(InvalidPlan, match=re.escape(f"no scalar function {name!r}: register it")):
        decode(_strict(), without_python_udfs(plan))


def test_a_plan_without_python_functions_stays_as_it_is() -> None:
    plan = SessionContext().sql("SELECT abs(-1), sum(2)").execution_plan().to_bytes()
    assert without_python_udfs(plan) is plan


def test_text_that_looks_like_a_pickle_stays_in_the_plan() -> None:
    session = SessionContext()
    plan = session.sql("SELECT 'DFPYUDF1' AS y").execution_plan().to_bytes()
    (batch,) = _rows(session, decode(session, without_python_udfs(plan)))
    assert batch.to_pydict() == {"y": ["DFPYUDF1"]}


GARBAGE = [b"\xff", b"garbage", b"\x0a\xff\xff", b"\xfa\x3e\x00", b"\x0a\x00", PYTHON_UDF_PREFIX + b"\xff"]


@pytest.mark.parametrize("data", GARBAGE)
def test_bytes_that_are_no_plan_do_not_decode(data: bytes) -> None:
    with pytest.raises(InvalidPlan):
        decode(SessionContext(), data)


@pytest.mark.parametrize("data", [b"\xff", b"garbage", b"\x0a\xff\xff"])
def test_bytes_that_are_no_plan_have_no_schema(data: bytes) -> None:
    with pytest.raises(InvalidPlan, match=r"is not a datafusion.PhysicalPlanNode"):
        schema_of(SessionContext(), data)
    with pytest.raises(InvalidPlan, match=r"is not a datafusion.PhysicalPlanNode"):
        without_python_udfs(data + PYTHON_UDF_PREFIX)


def test_a_plan_that_is_cut_short_anywhere_is_refused_or_decodes() -> None:
    """Never anything but a plan or an error of its own, whatever DataFusion thinks of the bytes."""
    session = _session()
    plan = session.sql("SELECT g, sum(x) AS s FROM t GROUP BY g").execution_plan().to_bytes()
    refused = 0
    for length in range(0, len(plan), 7):
        try:
            decode(session, plan[:length])
        except (InvalidPlan, EnginePanicked):
            refused += 1
    assert refused > len(plan) / 7 / 2


def test_a_panic_over_a_plan_has_its_name_and_the_session_goes_on() -> None:
    """A buffer of a batch in the plan says that it is longer than the batch is."""
    session = _session()
    plan = session.sql("SELECT x FROM t").execution_plan().to_bytes()
    length = struct.pack("<q", 3 * INT.byte_width)
    assert plan.count(length) == 1
    broken = plan.replace(length, struct.pack("<q", 1 << 20))
    with pytest.raises(EnginePanicked, match=r"panicked while it decoded the plan: .*length=1048576"):
        decode(session, broken)
    assert pa.Table.from_batches(_rows(session, decode(session, plan))).to_pydict() == {"x": [1, 2, 3]}


def test_an_instance_is_fresh_each_time() -> None:
    session = _session()
    plan = session.sql("SELECT g, sum(x) AS s FROM t GROUP BY g").execution_plan().to_bytes()
    for _ in range(2):
        rows = pa.Table.from_batches(_rows(session, decode(session, plan)))
        assert sorted(rows.to_pydict()["s"]) == [2, 4]


def _field(nullable: bool) -> pa.Field:
    return pa.field("item", pa.int32(), nullable=nullable)


TYPES = [
    pa.bool_(),
    pa.int8(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.uint8(),
    pa.uint16(),
    pa.uint32(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.binary(3),
    pa.date32(),
    pa.date64(),
    pa.time32("s"),
    pa.time32("ms"),
    pa.time64("us"),
    pa.time64("ns"),
    *(make(unit) for make in (pa.timestamp, pa.duration) for unit in ("s", "ms", "us", "ns")),
    pa.timestamp("us", "Europe/Rome"),
    pa.month_day_nano_interval(),
    pa.decimal32(5, 2),
    pa.decimal64(10, 2),
    pa.decimal128(38, 10),
    pa.decimal256(76, 3),
    *(
        nested
        for inner in (_field(nullable=True), _field(nullable=False))
        for nested in (
            pa.list_(inner),
            pa.large_list(inner),
            pa.list_(inner, 2),
            pa.list_view(inner),
            pa.struct([inner]),
            pa.list_(pa.field("item", pa.struct([inner]), nullable=inner.nullable)),
            pa.map_(pa.string(), pa.field("value", pa.int32(), nullable=inner.nullable)),
        )
    ),
    pa.struct([]),
    pa.struct([pa.field("a", pa.int32(), metadata={"k": "v"})]),
    pa.list_(pa.field("element", pa.int32(), metadata={"k": "v"})),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.int64()),
    pa.dictionary(pa.int32(), pa.struct([pa.field("a", pa.int8(), nullable=False)])),
    pa.list_(pa.dictionary(pa.int16(), pa.string())),
    pa.run_end_encoded(pa.int32(), pa.string()),
    pa.sparse_union([pa.field("a", pa.int32()), pa.field("b", pa.string())]),
    pa.dense_union([pa.field("a", pa.int32()), pa.field("b", pa.string())]),
]


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.nulls(0, data_type) for data_type in schema.types], schema=schema)


def _of_batch(batch: pa.RecordBatch) -> pa.Schema:
    session = SessionContext()
    return schema_of(session, session.create_dataframe([[batch]]).execution_plan().to_bytes())


@pytest.mark.parametrize("data_type", TYPES, ids=str)
@pytest.mark.parametrize("nullable", [True, False])
def test_schema_is_exact_for_a_type(data_type: pa.DataType, nullable: bool) -> None:
    """Also in what is nullable, in it and beside it, and in the metadata of fields and schema."""
    fields = [
        pa.field("a", data_type, nullable=nullable, metadata={"k": "v"}),
        pa.field("b", data_type, nullable=not nullable),
    ]
    schema = pa.schema(fields, {"m": "n"})
    assert _of_batch(_empty(schema)).equals(schema, check_metadata=True)


def test_schema_of_nothing_but_nulls_is_exact() -> None:
    schema = pa.schema([("a", pa.null())])
    assert _of_batch(_empty(schema)) == schema


@pytest.mark.parametrize(
    "data_type",
    [
        pa.map_(pa.string(), pa.field("item", pa.int32())),
        pa.map_(pa.field("k", pa.string(), nullable=False), pa.int32(), keys_sorted=True),
    ],
    ids=str,
)
def test_schema_of_maps_with_other_names_in_them_is_that_of_their_batches(data_type: pa.DataType) -> None:
    """pyarrow calls what is in a map "key" and "value", whatever names it comes with, in batches as in schemas."""
    session = SessionContext()
    batch = pa.RecordBatch.from_arrays([pa.array([[("a", 1)]], data_type)], ["a"])
    plan = session.create_dataframe([[batch]]).execution_plan()
    assert schema_of(session, plan.to_bytes()) == _rows(session, plan)[0].schema


QUERIES = [
    "SELECT * FROM t",
    "SELECT 1 AS a, CAST(NULL AS VARCHAR) AS b",
    "SELECT * FROM (VALUES (1, 'a'), (2, NULL)) AS v (n, s)",
    "SELECT * FROM generate_series(1, 10)",
    "SELECT value + 1 AS next FROM range(0, 10)",
    "SELECT count(*) AS n, max(x) AS m FROM t",
    "SELECT g, array_agg(x) AS l FROM t GROUP BY g",
    "SELECT * FROM t AS a JOIN t AS b ON a.x = b.x",
    "SELECT * FROM t AS a LEFT JOIN (SELECT 1 AS one, count(*) AS n FROM t) AS b ON a.x = b.n",
    "SELECT 1 AS a UNION ALL SELECT CAST(NULL AS BIGINT)",
    "SELECT x, (SELECT max(x) FROM t) AS m FROM t",
    "SELECT unnest([1, 2]) AS u",
    "SELECT row_number() OVER (PARTITION BY g ORDER BY x) AS r FROM t",
    'SELECT x AS "A.b", x AS "", g AS "Größe" FROM t',
    "SELECT map(['a'], [1]) AS m, named_struct('a', x) AS s, make_array(x) AS l FROM t",
    "SELECT arrow_cast(g, 'Dictionary(Int32, Utf8)') AS d FROM t ORDER BY d LIMIT 2",
    "EXPLAIN SELECT x FROM t",
    "EXPLAIN ANALYZE SELECT x FROM t",
    "SELECT my_scalar(x) AS y FROM t",
]


@pytest.mark.parametrize("query", QUERIES)
def test_schema_is_that_of_the_plans_batches(query: str) -> None:
    session = _session()
    plan = session.sql(query).execution_plan()
    found = schema_of(session, plan.to_bytes(session))
    batches = _rows(session, plan)
    assert batches
    assert all(found.equals(batch.schema, check_metadata=True) for batch in batches)


@pytest.mark.parametrize(
    ("query", "schema"),
    [
        ("SELECT * FROM t LIMIT 0", pa.schema([("x", INT), ("g", pa.string())])),
        ("SELECT 1 AS one WHERE 1 = 0", pa.schema([pa.field("one", INT, nullable=False)])),
        ("SELECT x FROM t WHERE x > 100", pa.schema([("x", INT)])),
    ],
)
def test_a_plan_without_rows_has_its_schema(query: str, schema: pa.Schema) -> None:
    session = _session()
    assert schema_of(session, session.sql(query).execution_plan().to_bytes()) == schema


MAP = pa.map_(pa.string(), pa.int32())
TABLE = pa.table({"x": pa.array([1, 2, None]), "l": [[1], None, []], "s": [{"a": "b"}, None, None]})
MAPS = pa.table({"m": pa.array([[("a", 1)], None, []], MAP)})


def _write_arrow(file: Path) -> None:
    with pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


SCANS: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("parquet_scan", "a.parquet", lambda file: pq.write_table(TABLE, file), ""),
    ("parquet_scan", "maps.parquet", lambda file: pq.write_table(MAPS, file), ""),
    ("parquet_scan", "p=1/a.parquet", lambda file: pq.write_table(TABLE, file), "PARTITIONED BY (p)"),
    ("csv_scan", "a.csv", lambda file: file.write_text("x,s\n1,a\n2,\n"), ""),
    ("json_scan", "a.json", lambda file: file.write_text('{"x": 1, "s": {"a": 1}}\n{"x": 2}\n'), ""),
    ("arrow_scan", "a.arrow", _write_arrow, ""),
]


@pytest.mark.parametrize(("scan", "name", "write", "options"), SCANS, ids=[name for _, name, _, _ in SCANS])
def test_schema_of_a_scan_is_that_of_its_batches_also_when_the_files_are_gone(
    scan: str, name: str, write: Callable[[Path], object], options: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write(file)
    session = SessionContext()
    stored_as = scan.removesuffix("_scan")
    session.sql(f"CREATE EXTERNAL TABLE f STORED AS {stored_as} {options} LOCATION '{tmp_path}/'")
    plan = session.sql("SELECT * FROM f").execution_plan()
    assert scan in {kind(node) for node in nodes(parse(plan.to_bytes()))}
    schemas = {batch.schema for batch in _rows(session, plan)}
    file.unlink()
    assert schemas == {schema_of(SessionContext(), plan.to_bytes())}


SINKS = [
    ("COPY t TO '{}/out.{}' STORED AS {}", ["parquet", "csv", "json"]),
    ("COPY (SELECT my_scalar(x) AS y FROM t) TO '{}/out.{}' STORED AS {}", ["parquet"]),
]


@pytest.mark.parametrize(("statement", "format_"), [(text, name) for text, names in SINKS for name in names])
def test_the_schema_of_what_writes_is_a_count_and_nothing_is_written(
    statement: str, format_: str, tmp_path: Path
) -> None:
    session = _session()
    plan = session.sql(statement.format(tmp_path, format_, format_)).execution_plan()
    found = schema_of(session, plan.to_bytes(session))
    assert list(tmp_path.iterdir()) == []
    (batch,) = _rows(session, plan)
    assert found.equals(batch.schema, check_metadata=True)
    assert list(tmp_path.iterdir()) != []


def test_a_sink_below_other_nodes_writes_nothing(tmp_path: Path) -> None:
    session = _session()
    outer = parse(session.sql("EXPLAIN ANALYZE SELECT x FROM t").execution_plan().to_bytes())
    sink = session.sql(f"COPY t TO '{tmp_path}/out.csv' STORED AS CSV").execution_plan()
    outer.analyze.input.CopyFrom(parse(sink.to_bytes()))
    assert schema_of(session, outer.SerializeToString()).names == ["plan_type", "plan"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def counted() -> tuple[SessionContext, list[str]]:
    """A session whose functions say when they are called."""
    calls: list[str] = []

    def scalar(values: pa.Array) -> pa.Array:
        calls.append(f"my_scalar of {len(values)} rows")
        return values

    class Counted(Sum):
        def update(self, *values: pa.Array) -> None:
            calls.append("my_aggregate")
            super().update(*values)

    class CountedWindow(RowNumber):
        def evaluate_all(self, values: list[pa.Array], num_rows: int) -> pa.Array:
            calls.append("my_window")
            return super().evaluate_all(values, num_rows)

    session = _session()
    session.register_udf(udf(scalar, [INT], INT, "volatile", "my_scalar"))
    session.register_udaf(udaf(Counted, [INT], INT, [INT], "volatile", "my_aggregate"))
    session.register_udwf(udwf(CountedWindow, [INT], INT, "volatile", "my_window"))
    return session, calls


@pytest.mark.parametrize(
    "query",
    [
        *CALLS.values(),
        EVERYWHERE,
        "SELECT my_scalar(1) AS y",
        "SELECT my_scalar(n) AS y FROM (VALUES (1), (2)) AS v (n)",
        "SELECT my_scalar(value) AS y FROM generate_series(1, 9)",
        "SELECT my_aggregate(x) AS y FROM t",
        "SELECT my_scalar(max(x)) AS y FROM t",
        "SELECT x, (SELECT max(my_scalar(x)) FROM t) AS y FROM t",
        "SELECT my_scalar(u) AS y FROM (SELECT unnest([1, 2]) AS u)",
    ],
)
def test_functions_are_not_called_for_a_schema(counted: tuple[SessionContext, list[str]], query: str) -> None:
    session, calls = counted
    plan = session.sql(query).execution_plan()
    serialized = without_python_udfs(plan.to_bytes(session))
    calls.clear()
    assert schema_of(session, serialized).names[-1] == "y"
    assert calls == []
    _rows(session, plan)
    assert calls != []


@pytest.mark.parametrize("error", [InvalidPlan("as it is"), StopAsyncIteration(), KeyboardInterrupt(), GeneratorExit()])
def test_what_is_no_error_of_datafusion_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, execution_errors():
        raise error
    assert caught.value is error


def _sorted(batches: list[pa.RecordBatch]) -> list[str]:
    return sorted(str(row) for batch in batches for row in batch.to_pylist())


@pytest.fixture
def parquet(tmp_path: Path) -> SessionContext:
    """A session with a table ``t``."""
    rows = {"a": [1, 2, 3], "b": [10, 20, 30], "c": ["x", "y", "z"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    session = SessionContext(SessionConfig().with_target_partitions(1))
    session.register_parquet("t", tmp_path / "t.parquet")
    return session


@pytest.mark.parametrize(
    "query",
    [
        "SELECT b FROM t",
        "SELECT c, a FROM t",
        "SELECT * FROM t",
        "SELECT c FROM t WHERE c > 'x'",
        "SELECT count(*) FROM t WHERE a > 1",
        "SELECT c, b, sum(a) FROM t GROUP BY ROLLUP (c, b)",
        "SELECT a, b FROM (SELECT * FROM t WHERE b > 10 LIMIT 5) WHERE a < 3",
        "SELECT l.c, r.b FROM t AS l JOIN t AS r ON l.a = r.b / 10 WHERE l.c > 'x' AND r.b < 100",
    ],
)
def test_scans_and_filters_of_datafusion_51_mean_what_they_meant(parquet: SessionContext, query: str) -> None:
    planned = parquet.sql(query).execution_plan()
    old = as_of_51(parquet, planned.to_bytes())

    parsed = plan_module.parse(old.SerializeToString(), PlanLimits())
    upgrade_filters(parquet, parsed.message)

    assert parsed.is_old
    assert {node.filter.batch_size for node in nodes(parsed.message) if kind(node) == "filter"} <= {8192}
    upgraded = decode(parquet, parsed.message.SerializeToString())
    assert _sorted(_rows(parquet, upgraded)) == _sorted(_rows(parquet, planned)) != []


def test_a_plan_of_datafusion_55_is_not_changed(parquet: SessionContext) -> None:
    plan = parquet.sql("SELECT b FROM t WHERE c > 'x'").execution_plan().to_bytes()
    parsed = plan_module.parse(plan, PlanLimits())
    assert not parsed.is_old
    assert parsed.message == parse(plan)


def test_a_scan_of_a_column_that_its_table_lacks_is_refused(parquet: SessionContext) -> None:
    message = as_of_51(parquet, parquet.sql("SELECT b FROM t").execution_plan().to_bytes())
    message.parquet_scan.base_conf.projection[:] = [3]
    with pytest.raises(InvalidPlan, match="parquet_scan reads column 3 of 3"):
        plan_module.parse(message.SerializeToString(), PlanLimits())
