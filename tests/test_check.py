"""The check of plans: what is just inside of a limit is executed, what is outside is refused, and honest plans pass."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tpch_query
from datafusion import SessionConfig, SessionContext
from pyarrow import flight
from support import do_get, fetch_one, listening, status_of

from worker import InvalidPlan, PlanTooLarge, WorkerError, plan
from worker.allocator import THREAD_STACK
from worker.check import KINDS, check
from worker.config import PlanLimits
from worker.plan_proto import Message, PhysicalPlanNode, kind, nodes, parse
from worker.testing import running_worker

MANY = (1 << 32) - 1


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> SessionContext:
    """A session with the tables ``t`` in memory and ``p`` in Parquet, of three rows each."""
    session = SessionContext(SessionConfig().with_target_partitions(2))
    table = pa.table({"x": [1, 2, 3], "s": ["a", "b", "c"]})
    session.register_record_batches("t", [table.to_batches()])
    file = tmp_path_factory.mktemp("tables") / "p.parquet"
    pq.write_table(table, file)
    session.register_parquet("p", file)
    return session


def planned(session: SessionContext, query: str) -> Message:
    return parse(session.sql(query).execution_plan().to_bytes())


def only(plan_message: Message, name: str) -> Message:
    """The one node of a kind."""
    (found,) = (getattr(node, name) for node in nodes(plan_message) if kind(node) == name)
    return found


def rows(session: SessionContext, plan_message: Message, limits: PlanLimits) -> int:
    """How many rows a plan has, all partitions together, after the check has let it through."""
    check(plan_message, limits)
    instance = plan.decode(session, plan_message.SerializeToString())
    return sum(
        batch.to_pyarrow().num_rows
        for partition in range(instance.partition_count)
        for batch in session.execute(instance, partition)
    )


def refusal(plan_message: Message, limits: PlanLimits | None = None) -> str:
    """The status and the text with which a plan is refused."""
    with pytest.raises(WorkerError) as refused:
        check(plan_message, PlanLimits() if limits is None else limits)
    assert type(refused.value) in (InvalidPlan, PlanTooLarge)
    return f"{refused.value.status.name}: {refused.value}"


def over(below: Message, place: Callable[[Message], Message]) -> Message:
    """A new node with a plan below it."""
    above = PhysicalPlanNode()
    place(above).CopyFrom(below)
    return above


def literal(set_value: Callable[[Message], object]) -> Message:
    """A plan of one row with a literal in it."""
    made = PhysicalPlanNode()
    made.projection.input.placeholder_row.schema.SetInParent()
    made.projection.input.placeholder_row.partitions = 1
    set_value(made.projection.expr.add().literal)
    made.projection.expr_name.append("v")
    return made


def fixed_size_list(type_: Message, *sizes: int) -> None:
    """Makes a type one of lists, each of so many of the next."""
    for size in sizes:
        type_.FIXED_SIZE_LIST.list_size = size
        type_.FIXED_SIZE_LIST.field_type.name = "item"
        type_ = type_.FIXED_SIZE_LIST.field_type.arrow_type
    type_.INT64.SetInParent()


def chain(session: SessionContext, operator: str, length: int) -> Message:
    """A filter of so many comparisons in a row."""
    made = planned(session, "SELECT x FROM t WHERE x > 0")
    comparison = type(only(made, "filter").expr)()
    comparison.CopyFrom(only(made, "filter").expr)
    condition = only(made, "filter").expr
    condition.Clear()
    condition.binary_expr.op = operator
    condition.binary_expr.operands.extend([comparison] * length)
    return made


def test_every_kind_of_nodes_is_in_the_table() -> None:
    oneof = PhysicalPlanNode().DESCRIPTOR.oneofs_by_name["PhysicalPlanType"]
    assert set(KINDS) == {field.name for field in oneof.fields}


def test_the_fields_in_the_table_are_there() -> None:
    for name, known in KINDS.items():
        repeated = {*known.columns, *filter(None, [known.conditions])}
        for path in (*repeated, *filter(None, [known.rows])):
            descriptor = PhysicalPlanNode().DESCRIPTOR.fields_by_name[name].message_type
            *outer, last = path.split(".")
            for part in outer:
                descriptor = descriptor.fields_by_name[part].message_type
            assert descriptor.fields_by_name[last].is_repeated == (path in repeated)
        assert not known.aliases or known.aliases in known.columns


def test_a_node_that_nobody_knows_is_refused_unless_it_is_allowed() -> None:
    """Number 40, which DataFusion 55.2 lacks: a later one may send it."""
    unknown = parse(b"\xc2\x02\x00")
    assert kind(unknown) is None
    assert refusal(over(unknown, lambda node: node.merge.input)) == (
        "INVALID_ARGUMENT: the plan has a node of kind 40, which this worker does not know: the setting allow_nodes "
        "lets it through"
    )
    assert refusal(PhysicalPlanNode()).startswith("INVALID_ARGUMENT: the plan has a node of kind none")
    check(unknown, PlanLimits(allow_nodes=("40",)))


def _repartition(session: SessionContext, partitions: int) -> Message:
    made = over(planned(session, "SELECT x FROM t"), lambda node: node.repartition.input)
    made.repartition.partitioning.round_robin = partitions
    return made


def _hashed(session: SessionContext, partitions: int) -> Message:
    made = _repartition(session, 1)
    made.repartition.partitioning.hash.partition_count = partitions
    made.repartition.partitioning.hash.hash_expr.add().column.name = "x"
    return made


def _placeholder(session: SessionContext, partitions: int) -> Message:
    made = PhysicalPlanNode()
    made.placeholder_row.schema.SetInParent()
    made.placeholder_row.partitions = partitions
    return made


def _empty(session: SessionContext, partitions: int) -> Message:
    made = PhysicalPlanNode()
    made.empty.schema.SetInParent()
    made.empty.partitions = partitions
    return made


def _union(session: SessionContext, inputs: int) -> Message:
    made = PhysicalPlanNode()
    for _ in range(inputs):
        made.union.inputs.add().CopyFrom(planned(session, "SELECT x FROM t"))
    return made


def _groups(session: SessionContext, files: int) -> Message:
    made = planned(session, "SELECT x FROM p")
    groups = only(made, "parquet_scan").base_conf.file_groups
    while len(groups) < files:
        groups.add().CopyFrom(groups[0])
    return made


def _channels(session: SessionContext, each: int) -> Message:
    made = over(_repartition(session, each), lambda node: node.repartition.input)
    made.repartition.partitioning.round_robin = each
    return made


def _coalesce(session: SessionContext, size: int) -> Message:
    made = over(planned(session, "SELECT x FROM t"), lambda node: node.coalesce_batches.input)
    made.coalesce_batches.target_batch_size = size
    return made


def _filter(session: SessionContext, size: int) -> Message:
    made = planned(session, "SELECT x FROM t WHERE x > 0")
    only(made, "filter").batch_size = size
    return made


def _series(session: SessionContext, size: int) -> Message:
    made = planned(session, "SELECT * FROM range(3)")
    only(made, "generate_series").target_batch_size = size
    return made


def _scan(session: SessionContext, size: int) -> Message:
    made = planned(session, "SELECT x FROM p")
    only(made, "parquet_scan").base_conf.batch_size = size
    return made


def _aggregate(session: SessionContext, limit: int) -> Message:
    made = planned(session, "SELECT s FROM t GROUP BY s")
    for node in nodes(made):
        if kind(node) == "aggregate":
            node.aggregate.limit.limit = limit
    return made


def _columns(session: SessionContext, columns: int) -> Message:
    return planned(session, "SELECT " + ", ".join(f"x + {number}" for number in range(columns)) + " FROM t")


def _sort_keys(session: SessionContext, keys: int) -> Message:
    order = planned(session, "SELECT x FROM t ORDER BY x")
    for _ in range(keys - 1):
        only(order, "sort").expr.add().CopyFrom(only(order, "sort").expr[0])
    return order


def _sort_columns(session: SessionContext, names: int) -> Message:
    made = over(_sort_keys(session, 10), lambda node: node.projection.input)
    for number in range(names):
        made.projection.expr.add().column.name = "x"
        made.projection.expr_name.append(f"x{number}")
    return made


def _null_list(session: SessionContext, size: int) -> Message:
    return literal(lambda value: fixed_size_list(value.null_value, size, 2))


def _null_binary(session: SessionContext, size: int) -> Message:
    def fill(value: Message) -> None:
        value.null_value.FIXED_SIZE_BINARY = size

    return literal(fill)


def _list_of_empty_structs(value: Message) -> None:
    fixed_size_list(value.null_value, (1 << 31) - 1)
    value.null_value.FIXED_SIZE_LIST.field_type.arrow_type.STRUCT.SetInParent()


def _binary(session: SessionContext, size: int) -> Message:
    def fill(value: Message) -> None:
        value.fixed_size_binary_value.values = bytes(size)
        value.fixed_size_binary_value.length = size

    return literal(fill)


def _ors(session: SessionContext, length: int) -> Message:
    return chain(session, "Or", length)


def _ands(session: SessionContext, length: int) -> Message:
    return chain(session, "And", length)


def _join(session: SessionContext, keys: int) -> Message:
    made = planned(session, "SELECT a.x FROM t AS a JOIN t AS b ON a.x = b.x")
    join = only(made, "hash_join")
    join.on.extend([join.on[0]] * (keys - 1))
    return made


# The setting, its value, what makes a plan of a size, the largest size that is right, and how many rows it has then.
LIMITS = [
    ("max_plan_nodes", 9, _union, 8, 24),
    ("max_plan_partitions", 8, _repartition, 8, 3),
    ("max_plan_partitions", 8, _hashed, 8, 3),
    ("max_plan_partitions", 8, _placeholder, 8, 8),
    ("max_plan_partitions", 8, _empty, 8, 0),
    ("max_plan_partitions", 8, _union, 8, 24),
    ("max_plan_partitions", 8, _groups, 8, 24),
    ("max_plan_channels", 8 + 64, _channels, 8, 3),
    ("max_plan_batch_size", 8, _coalesce, 8, 3),
    ("max_plan_batch_size", 8, _filter, 8, 3),
    ("max_plan_batch_size", 8, _series, 8, 3),
    ("max_plan_batch_size", 8, _scan, 8, 3),
    ("max_plan_batch_size", 8, _aggregate, 8, 3),
    ("max_plan_value_size", 16 * 8, _null_list, 8, 1),
    ("max_plan_value_size", 8, _null_binary, 8, 1),
    ("max_plan_value_size", 8, _binary, 8, 1),
    ("max_plan_operands", 8 + 2, _ors, 8, 3),
    ("max_plan_conjuncts", 16, _ands, 16, 3),
    ("max_plan_conjuncts", 16, _join, 16, 3),
    ("max_plan_columns", 8, _columns, 8, 3),
    ("max_plan_columns", 8, _sort_keys, 8, 3),
    ("max_plan_sort_columns", 80, _sort_columns, 8, 3),
]


@pytest.mark.parametrize(
    ("setting", "value", "make", "most", "count"), LIMITS, ids=[f"{case[0]}{case[2].__name__}" for case in LIMITS]
)
def test_a_plan_inside_of_a_limit_is_executed_and_one_outside_refused(
    session: SessionContext, setting: str, value: int, make: Callable[..., Message], most: int, count: int
) -> None:
    limits = PlanLimits.model_validate({setting: value})
    assert rows(session, make(session, most), limits) == count
    refused = refusal(make(session, most + 1), limits)
    assert refused.startswith("RESOURCE_EXHAUSTED: the plan")
    assert refused.endswith(f": {setting} is {value}")


def test_every_limit_is_tested() -> None:
    tested = {case[0] for case in LIMITS} | {"allow_nodes", "max_plan_data_size"}
    assert tested == set(PlanLimits.model_fields)


# Beyond the limits that there are unless others are set: each of these would end the process, or keep it for minutes.
KILLERS: dict[str, tuple[Callable[[SessionContext], Message], str]] = {
    "partitions": (
        lambda session: _repartition(session, MANY),
        f"RESOURCE_EXHAUSTED: the plan's repartition has {MANY} partitions: max_plan_partitions is 65536",
    ),
    "channels": (
        lambda session: _channels(session, 1 << 16),
        f"RESOURCE_EXHAUSTED: the plan has {(1 << 16) + (1 << 32)} channels from partition to partition: "
        "max_plan_channels is 262144",
    ),
    "the partitions of a placeholder": (
        lambda session: _placeholder(session, MANY),
        f"RESOURCE_EXHAUSTED: the plan's placeholder_row has {MANY} partitions: max_plan_partitions is 65536",
    ),
    "a batch size": (
        lambda session: _coalesce(session, MANY),
        f"RESOURCE_EXHAUSTED: the plan's coalesce_batches sets memory aside for {MANY} rows: "
        "max_plan_batch_size is 1048576",
    ),
    "the limit of an aggregation": (
        lambda session: _aggregate(session, 1 << 40),
        f"RESOURCE_EXHAUSTED: the plan's aggregate sets memory aside for {1 << 40} rows: "
        "max_plan_batch_size is 1048576",
    ),
    "a list": (
        lambda session: _null_list(session, (1 << 31) - 1),
        f"RESOURCE_EXHAUSTED: the plan's projection has a type whose nulls take {((1 << 31) - 1) * 16} bytes: "
        "max_plan_value_size is 131072",
    ),
    "lists of lists": (
        lambda session: literal(lambda value: fixed_size_list(value.null_value, 1 << 12, 1 << 12, 1 << 12)),
        f"RESOURCE_EXHAUSTED: the plan's projection has a type whose nulls take {1 << 27} bytes: "
        "max_plan_value_size is 131072",
    ),
    "a list of nothing": (
        lambda session: literal(lambda value: fixed_size_list(value.null_value, (1 << 31) - 1, 0)),
        f"RESOURCE_EXHAUSTED: the plan's projection has a type whose nulls take {((1 << 31) - 1) * 8} bytes: "
        "max_plan_value_size is 131072",
    ),
    "a list of structs without fields": (
        lambda session: literal(_list_of_empty_structs),
        f"RESOURCE_EXHAUSTED: the plan's projection has a type whose nulls take {(1 << 31) - 1} bytes: "
        "max_plan_value_size is 131072",
    ),
    "a chain of operands": (
        lambda session: _ors(session, 8000),
        "RESOURCE_EXHAUSTED: the plan's filter has 8002 operands in a row: max_plan_operands is 1000",
    ),
    "equalities": (
        lambda session: _ands(session, 3000),
        "RESOURCE_EXHAUSTED: the plan's filter has 3000 operands in a row, not of OR: max_plan_conjuncts is 512",
    ),
    "no rows in a batch": (
        lambda session: _scan(session, 0),
        "INVALID_ARGUMENT: the plan's parquet_scan has a batch size of 0, which means no rows at all",
    ),
    "a negative size": (
        lambda session: _null_binary(session, -1),
        "INVALID_ARGUMENT: the plan's projection has a type of fixed size -1",
    ),
}


@pytest.mark.parametrize("name", KILLERS)
def test_what_would_end_the_process_is_refused(
    session: SessionContext, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUST_MIN_STACK", raising=False)
    make, reason = KILLERS[name]
    assert refusal(make(session)) == reason


def _time_zone_of(type_: Message) -> None:
    type_.TIMESTAMP.timezone = "U\0C"


def _types(place: Callable[[Message], Message]) -> Callable[[Message], None]:
    """What puts a time zone that has a NUL somewhere into a null's type."""
    return lambda value: _time_zone_of(place(value.null_value))


def _timestamp(value: Message) -> None:
    value.timestamp_value.time_second_value = 1
    value.timestamp_value.timezone = "U\0C"


VALUES_WITH_A_NUL: dict[str, Callable[[Message], None]] = {
    "timestamp": _timestamp,
    "null": _types(lambda type_: type_),
    "list": _types(lambda type_: type_.LIST.field_type.arrow_type),
    "fixed_size_list": _types(lambda type_: type_.FIXED_SIZE_LIST.field_type.arrow_type),
    "struct": _types(lambda type_: type_.STRUCT.sub_field_types.add().arrow_type),
    "union": _types(lambda type_: type_.UNION.union_types.add().arrow_type),
    "map": _types(lambda type_: type_.MAP.field_type.arrow_type),
    "dictionary": _types(lambda type_: type_.DICTIONARY.value),
    "runs": _types(lambda type_: type_.RUN_END_ENCODED.values_field.arrow_type),
    "value of a dictionary": lambda value: _timestamp(value.dictionary_value.value),
    "value of a union": lambda value: _timestamp(value.union_value.value),
    "field of a union": lambda value: _time_zone_of(value.union_value.fields.add().field.arrow_type),
    "value of runs": lambda value: _timestamp(value.run_end_encoded_value.value),
    "schema of a literal": lambda value: _time_zone_of(value.dictionary_value.index_type),
}


@pytest.mark.parametrize("in_statistics", [False, True], ids=["literal", "statistics"])
@pytest.mark.parametrize("name", VALUES_WITH_A_NUL)
def test_a_nul_in_a_time_zone_is_found_wherever_it_is(session: SessionContext, name: str, in_statistics: bool) -> None:
    """It ends the process as soon as Python gets such a column; in statistics, if they are compared with a literal."""
    if in_statistics:
        made = planned(session, "SELECT * FROM p")
        of_column = only(made, "parquet_scan").base_conf.statistics.column_stats[0]
        of_column.min_value.val.Clear()
        VALUES_WITH_A_NUL[name](of_column.min_value.val)
        what = "parquet_scan"
    else:
        made, what = literal(VALUES_WITH_A_NUL[name]), "projection"
    reason = f"INVALID_ARGUMENT: the plan's {what} has the time zone 'U\\x00C', in which there is a NUL"
    assert refusal(made) == reason
    # As it arrives, and with fields of other versions around it.
    assert refusal(parse(made.SerializeToString())) == reason


@pytest.mark.parametrize("size", [10, 100, 1000, 100_000])
def test_values_in_statistics_are_found_whatever_else_is_in_them(session: SessionContext, size: int) -> None:
    """Fields that nobody knows make them longer than they look: their lengths take one, two or three bytes."""
    made = planned(session, "SELECT * FROM p")
    value = only(made, "parquet_scan").base_conf.statistics.column_stats[0].max_value.val
    unknown = b"\xfa\x3f" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + b"\x01" * size
    rare = literal(VALUES_WITH_A_NUL["null"]).projection.expr[0].literal.SerializeToString()
    value.Clear()
    value.MergeFromString(unknown + rare)
    assert value.ByteSize() > size
    assert refusal(made).startswith("INVALID_ARGUMENT: the plan's parquet_scan has the time zone")


def test_other_texts_may_have_a_nul(session: SessionContext) -> None:
    assert rows(session, planned(session, "SELECT 'a\0b' AS v FROM t"), PlanLimits()) == 3


def test_arrow_data_inside_of_a_plan_is_checked_and_counted_over_all_of_it(session: SessionContext) -> None:
    two = planned(session, "SELECT a.s, make_array(1, 2, a.x) AS l FROM t AS a UNION ALL SELECT s, [7] FROM t")
    assert sum(kind(node) == "memory_scan" for node in nodes(two)) == 2
    sizes = range(1, 10_000)
    least = next(size for size in sizes if _passes(two, PlanLimits(max_plan_data_size=size)))
    assert least > 100
    assert rows(session, two, PlanLimits(max_plan_data_size=least)) == 6
    assert refusal(two, PlanLimits(max_plan_data_size=least - 1)).startswith("INVALID_ARGUMENT: ")

    scan = next(node.memory_scan for node in nodes(two) if kind(node) == "memory_scan")
    scan.partitions[0] = scan.partitions[0][:-100]
    assert refusal(two).startswith("INVALID_ARGUMENT: partition 0 of the plan's memory_scan is no Arrow data, or more ")


def _passes(plan_message: Message, limits: PlanLimits) -> bool:
    try:
        check(plan_message, limits)
    except InvalidPlan:
        return False
    return True


def test_nested_literals_are_checked(session: SessionContext) -> None:
    made = planned(session, "SELECT x, [1, 2] AS l FROM t")
    literals = [
        each.literal.list_value
        for node in nodes(made)
        if kind(node) == "projection"
        for each in node.projection.expr
        if each.HasField("literal")
    ]
    assert literals
    assert rows(session, made, PlanLimits()) == 3
    literals[0].arrow_data = literals[0].arrow_data[:8]
    assert refusal(made).startswith("INVALID_ARGUMENT: the list_value of the plan's projection is no Arrow data, or")


def test_operators_are_counted_through_each_other(session: SessionContext) -> None:
    """Chains of one operator are one, however they are divided; the depths of others add up."""
    nested = chain(session, "And", 10)
    outer = only(nested, "filter").expr.binary_expr
    inner = only(chain(session, "And", 10), "filter").expr
    for operand in outer.operands:
        operand.CopyFrom(inner)
    assert refusal(nested, PlanLimits(max_plan_conjuncts=99)).endswith(
        "100 operands in a row, not of OR: max_plan_conjuncts is 99"
    )
    check(nested, PlanLimits(max_plan_conjuncts=100))
    outer.op = "Or"
    # Ten chains of ten.
    assert "has 31 operands in a row, not of OR" in refusal(nested, PlanLimits(max_plan_conjuncts=30))
    assert "has 22 operands in a row: " in refusal(nested, PlanLimits(max_plan_operands=21))
    check(nested, PlanLimits(max_plan_conjuncts=31, max_plan_operands=22))


def honest(session: SessionContext) -> Iterator[tuple[str, Message]]:
    """Plans that are large, as somebody's tool might make them."""
    conditions = " OR ".join(f"(x = {number} AND s = '{number}')" for number in range(500))
    yield "500 ORs", planned(session, f"SELECT * FROM p WHERE {conditions}")
    numbers = ", ".join(map(str, range(20_000)))
    yield "20,000 in a list", planned(session, f"SELECT * FROM p WHERE x IN ({numbers})")
    branches = " ".join(f"WHEN x > {number} AND x < {number + 2} THEN '{number}'" for number in range(400))
    yield "400 branches", planned(session, f"SELECT CASE {branches} END FROM t")
    many = planned(session, "SELECT * FROM p")
    files = only(many, "parquet_scan").base_conf.file_groups[0].files
    files.extend([files[0]] * 9_999)
    yield "10,000 files", many
    yield "1,000 columns", planned(session, "SELECT " + ", ".join(f"x + {n} AS x{n}" for n in range(1000)) + " FROM t")
    wide = SessionContext()
    wide.register_record_batches(
        "t", [pa.table({"x": pa.array(range(260_000)), "v": [[1.0, 2.0]] * 260_000}).to_batches()]
    )
    yield "some megabytes", planned(wide, "SELECT * FROM t")


def test_large_plans_that_are_honest_pass(session: SessionContext) -> None:
    for name, made in honest(session):
        if name == "some megabytes":
            assert made.ByteSize() > 2 << 20
        assert check(made, PlanLimits()) >= 1, name


def test_the_queries_of_tpch_pass(tpch: SessionContext) -> None:
    for number in range(1, 23):
        for statement in tpch_query(number):
            if not statement.strip().startswith(("create", "drop")):
                check(parse(tpch.sql(statement).execution_plan().to_bytes()), PlanLimits())
            else:
                tpch.sql(statement).collect()


def test_what_is_decoded_is_what_was_checked(session: SessionContext) -> None:
    """The same in other bytes: a field twice, of which the last counts, and a tag in more bytes than it needs."""
    made = PhysicalPlanNode()
    made.placeholder_row.schema.SetInParent()
    made.placeholder_row.partitions = 2
    twice = b"\xda\x01\x06\x10\x07\x10\x02\x0a\x00"
    assert parse(twice) == made
    assert plan.parse(twice, PlanLimits()).data == made.SerializeToString() != twice


def test_old_scans_are_upgraded_within_measure(session: SessionContext) -> None:
    """They say columns by number, a byte for each, and are to have their names."""
    old = planned(session, "SELECT * FROM p")
    scan = only(old, "parquet_scan").base_conf
    scan.ClearField("projection_exprs")
    scan.schema.columns[0].name = "n" * 100_000
    scan.projection.extend([0] * 1000)
    with pytest.raises(
        InvalidPlan, match="the names of the columns that the plan's scans read take more than 33554432"
    ):
        plan.parse(old.SerializeToString(), PlanLimits())


async def test_a_worker_refuses_and_goes_on(session: SessionContext) -> None:
    honest_ticket = do_get(planned(session, "SELECT x FROM t").SerializeToString())
    async with running_worker() as running:
        for make, reason in KILLERS.values():
            if "operands" not in reason:
                code, details = await status_of(running, do_get(make(session).SerializeToString()))
                assert f"{code.name}: {details}" == reason
        nul = literal(_timestamp).SerializeToString()
        assert (await status_of(running, do_get(nul)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await fetch_one(running, honest_ticket)).num_rows == 3


async def test_long_chains_are_executed_where_stacks_are_large(
    session: SessionContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3,000 pairs, which end a process that has the stacks it has by itself."""
    pairs = chain(session, "Or", 3000)
    pair = only(chain(session, "And", 2), "filter").expr
    for operand in only(pairs, "filter").expr.binary_expr.operands:
        operand.CopyFrom(pair)
    ticket = do_get(pairs.SerializeToString())
    monkeypatch.setenv(*THREAD_STACK)
    monkeypatch.setenv("PYTHONPATH", str(Path(plan.__file__).parent.parent))
    async with listening("-m", "worker", "--port", "0") as (_, url):
        with flight.connect(url) as client:
            assert client.do_get(flight.Ticket(ticket)).read_all().num_rows == 3
