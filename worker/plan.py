"""Plans: from the bytes of a ticket to DataFusion's ``ExecutionPlan``, and the exact schema of one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
from datafusion import ExecutionPlan, SessionContext

from worker import failures, plan_proto
from worker.check import check
from worker.config import MEBIBYTE, PlanLimits
from worker.errors import EnginePanicked, InvalidPlan, WorkerError

# How DataFusion's Python package begins a pickled function: DFPYUDF, DFPYUDA, DFPYUDW by its kind.
PYTHON_UDF_PREFIX = b"DFPYUD"

_MISSING_FUNCTION = re.compile(r"PhysicalExtensionCodec is not provided for (\w+) function (.+)")
_MISSING_STORE = re.compile(r"No suitable object store found for ([a-z0-9+.-]+://[^/\s]*)")
# How many rows a filter puts together, where the plan does not say (DataFusion's ``FILTER_EXEC_DEFAULT_BATCH_SIZE``).
_FILTER_BATCH_SIZE = 8192
# What columns' names may take that old scans get: they say columns by number, and one name may be any long.
_UPGRADE_BYTES = 32 * MEBIBYTE
_SINK_SCHEMA = pa.schema([pa.field("count", pa.uint64(), nullable=False)])


def without_python_udfs(plan: bytes) -> bytes:
    """The plan with pickled Python functions dropped, so that only their names are left, to be found in a session.

    Raises:
        InvalidPlan: the bytes are no plan. Bytes that hold no pickle are returned as they are, unread.
    """
    if PYTHON_UDF_PREFIX not in plan:
        return plan
    message = plan_proto.parse(plan)
    drop_python_udfs(message)
    stripped: bytes = message.SerializeToString()
    return stripped


def drop_python_udfs(message: plan_proto.Message) -> None:
    """Drops the pickled Python functions of a plan, or of a part of one that may call some."""
    for function in plan_proto.functions(message):
        if function.fun_definition.startswith(PYTHON_UDF_PREFIX):
            function.ClearField("fun_definition")


@dataclass(frozen=True, slots=True)
class ParsedPlan:
    """A plan as protobuf, and what a walk through it has found."""

    message: plan_proto.Message
    data: bytes
    """What was checked, as it came but for the fields of other versions and for what can be written in several ways."""
    has_extensions: bool
    """Whether it has nodes that only a codec knows."""
    is_old: bool
    """Whether DataFusion 51 has made it. All but its filters is upgraded already; ``upgrade_filters`` does those."""


def parse(plan: bytes, limits: PlanLimits) -> ParsedPlan:
    """The plan as protobuf, checked. What DataFusion 51 said in another way is said as DataFusion 55 expects it.

    The columns that a scan reads stood in a field that is not looked at any more, so that all of them would be read;
    and grouping sets were told from plain groups by what they have.

    Raises:
        InvalidPlan: the bytes are no plan, a scan reads a column that its table does not have, or as ``check``.
        PlanTooLarge: as ``check``.
    """
    message = plan_proto.parse(plan)
    check(message, limits)
    # Nothing but what was checked is decoded: another reader of protobuf might read something else in the bytes.
    data = message.SerializeToString()
    added = 0
    has_extensions = is_old = False
    for node in plan_proto.nodes(message):
        kind = plan_proto.kind(node)
        if kind == "extension":
            has_extensions = True
        elif kind == "filter":
            is_old = is_old or not node.filter.batch_size
        elif kind == "aggregate":
            # Grouping sets alone have these, which used to tell.
            if node.aggregate.null_expr and not node.aggregate.has_grouping_set:
                node.aggregate.has_grouping_set = is_old = True
        elif kind in plan_proto.FILE_SCANS:
            scan = getattr(node, kind).base_conf
            # Sources of DataFusion 55 always say what they read.
            if not scan.HasField("projection_exprs"):
                is_old = True
                added += _upgrade_scan(kind, scan, _UPGRADE_BYTES - added)
    return ParsedPlan(message, data, has_extensions, is_old)


def _upgrade_scan(kind: str, scan: plan_proto.Message, most: int) -> int:
    """Says by name what a scan reads, and returns how many bytes of names that is."""
    scan.projection_exprs.SetInParent()
    size = 0
    for index in scan.projection:
        if index >= len(scan.schema.columns):
            raise InvalidPlan(f"the plan's {kind} reads column {index} of {len(scan.schema.columns)}")
        size += 2 * len(scan.schema.columns[index].name)
        if size > most:
            raise InvalidPlan(
                f"the names of the columns that the plan's scans read take more than {_UPGRADE_BYTES} bytes: this "
                "worker takes such plans of DataFusion 55 only"
            )
        projected = scan.projection_exprs.projections.add()
        projected.alias = projected.expr.column.name = scan.schema.columns[index].name
        projected.expr.column.index = index
    return size


def upgrade_filters(session: SessionContext, message: plan_proto.Message) -> None:
    """Makes filters of DataFusion 51 say which columns they keep: nothing meant all there, and means none in 55.

    Only DataFusion knows how many its input has: that takes about 1 ms for each.

    Raises:
        InvalidPlan, EnginePanicked, ExecutionFailed: as ``schema_of``.
    """
    # The innermost first: another's input may be a filter.
    for node in reversed(list(plan_proto.nodes(message))):
        if plan_proto.kind(node) == "filter" and not node.filter.batch_size:
            if not node.filter.projection:
                source = plan_proto.PhysicalPlanNode()
                source.CopyFrom(node.filter.input)
                empty_leaves(source)
                node.filter.projection.extend(range(len(_nullable_schema(session, source))))
            node.filter.batch_size = _FILTER_BATCH_SIZE


def decode(session: SessionContext, plan: bytes) -> ExecutionPlan:
    """A fresh instance of the plan. Blocks, and holds the GIL: 0.1 ms for 2 KB, 0.1 s for 2 MB.

    An instance executes each of its partitions once; a scan that is executed again has no rows, and no error.

    Raises:
        InvalidPlan: the plan does not decode in this session.
        EnginePanicked: DataFusion panicked over it.
    """
    try:
        return ExecutionPlan.from_bytes(session, plan)
    except BaseException as error:
        if failures.is_panic(error):
            raise EnginePanicked(f"DataFusion panicked while it decoded the plan: {failures.text(error)}") from error
        if not isinstance(error, Exception):
            raise
        text = failures.text(error)
        if missing := _MISSING_FUNCTION.search(text):
            category, name = missing.groups()
            raise InvalidPlan(
                f"the session has no {category} function {name!r}: register it in the session builder"
            ) from error
        if missing := _MISSING_STORE.search(text):
            raise InvalidPlan(
                f"the session has no object store for {missing[1]!r}: register it in the session builder"
            ) from error
        raise InvalidPlan(f"the plan does not decode (this worker takes plans of DataFusion 55): {text}") from error


def walk(instance: ExecutionPlan) -> Iterator[ExecutionPlan]:
    """All nodes of an instance, parents before their children."""
    yield instance
    for child in instance.children():
        yield from walk(child)


def schema_of(session: SessionContext, plan: bytes) -> pa.Schema:
    """The exact schema of a plan, without running it. Blocks for 1 to 3 ms.

    DataFusion's Python package does not tell the schema of a plan, only batches have one, and there may be none. So
    two plans around this one are executed, for the batches that they yield whatever it does. Its leaves are emptied
    first, since an operator may start its input before anything asks for rows.

    1. A left join of one row without columns with no rows of the plan: one row with the plan's names, types and
       metadata, every field nullable.
    2. A union of the plan, each column cast to a boolean, and an empty batch of booleans none of which is nullable, of
       which only the batch's partition is executed: a field of a union is nullable where it is in any input, a cast
       where its column is. The plan's own types would not do: pyarrow renames what is in maps, and unions notice.

    Raises:
        InvalidPlan: the plan does not decode in this session, or is nested so deep that nothing fits around it
            (protobuf reads 100 levels of messages, each node is two).
        EnginePanicked: DataFusion panicked over it.
        ExecutionFailed: it failed otherwise.
    """
    message = plan_proto.parse(plan)
    empty_leaves(message)

    nullable = _nullable_schema(session, message)
    if not nullable.names:
        return nullable
    # A table's names must differ, a plan's need not.
    strict = pa.schema([pa.field(str(index), pa.bool_(), nullable=False) for index in range(len(nullable))])
    union = plan_proto.PhysicalPlanNode()
    casts = union.union.inputs.add().projection
    casts.input.CopyFrom(message)
    for index, field in enumerate(nullable):
        cast = casts.expr.add().cast
        cast.expr.column.name = field.name
        cast.expr.column.index = index
        cast.arrow_type.BOOL.SetInParent()
        casts.expr_name.append(str(index))
    union.union.inputs.add().CopyFrom(_empty_scan(strict))
    nulls = _schema_of_partition(session, union, -1)
    fields = [field.with_nullable(null.nullable) for field, null in zip(nullable, nulls, strict=True)]
    return pa.schema(fields, nullable.metadata)


@contextmanager
def execution_errors() -> Iterator[None]:
    """Around what executes plans: gives the errors of DataFusion their names, and lets those pass that are no errors.

    Raises:
        EnginePanicked, ResourcesExhausted, SourceFailed, ComputationFailed, ExecutionFailed: instead of what DataFusion
            raised.
    """
    try:
        yield
    except (WorkerError, StopAsyncIteration):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or failures.is_panic(error):
            raise failures.failure(error) from error
        raise


def empty_leaves(plan: plan_proto.Message) -> None:
    """Takes all rows out of a plan, so that no function is called on any, and the nodes that would write.

    Leaves of nodes that only a codec knows stay as they are.
    """
    ungrouped = []
    for node in list(plan_proto.nodes(plan)):
        match plan_proto.kind(node):
            case "memory_scan":
                node.memory_scan.partitions[:] = [b""] * len(node.memory_scan.partitions)
            case kind if kind in plan_proto.FILE_SCANS:
                for group in getattr(node, kind).base_conf.file_groups:
                    group.ClearField("files")
            case "generate_series":
                _replace_by_empty(node, node.generate_series.schema, 1)
            case "placeholder_row":
                _replace_by_empty(node, node.placeholder_row.schema, node.placeholder_row.partitions)
            case kind if kind in plan_proto.SINKS:
                node.CopyFrom(_empty_scan(_SINK_SCHEMA))
            case "aggregate" if not node.aggregate.group_expr:
                ungrouped.append(node)
    # An aggregate without groups makes a row of none. The innermost first: what is copied is another node then.
    for node in reversed(ungrouped):
        plan_proto.wrap(node, lambda limited: limited.local_limit.input)
        node.local_limit.fetch = 0


def _replace_by_empty(node: plan_proto.Message, schema: plan_proto.Message, partitions: int) -> None:
    empty = plan_proto.PhysicalPlanNode()
    empty.empty.schema.CopyFrom(schema)
    empty.empty.partitions = partitions
    node.CopyFrom(empty)


def schema_message(schema: pa.Schema) -> plan_proto.Message:
    """A schema as DataFusion's protobuf has it."""
    return _empty_scan(schema).memory_scan.schema


def _empty_scan(schema: pa.Schema) -> plan_proto.Message:
    """A ``MemoryScan`` of one batch without rows."""
    batch = pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)
    return plan_proto.parse(SessionContext().create_dataframe([[batch]]).execution_plan().to_bytes())


def _nullable_schema(session: SessionContext, message: plan_proto.Message) -> pa.Schema:
    """The schema of a plan whose leaves are empty, with every field nullable."""
    joined = plan_proto.PhysicalPlanNode()
    joined.nested_loop_join.join_type = plan_proto.JOIN_TYPES["LEFT"]
    row = joined.nested_loop_join.left.placeholder_row
    row.schema.SetInParent()
    row.partitions = 1
    none = joined.nested_loop_join.right.merge
    none.input.CopyFrom(message)
    none.fetch = 0
    return _schema_of_partition(session, joined, 0)


def _schema_of_partition(session: SessionContext, plan: plan_proto.Message, partition: int) -> pa.Schema:
    instance = decode(session, plan.SerializeToString())
    with execution_errors():
        return next(session.execute(instance, partition % instance.partition_count)).to_pyarrow().schema
