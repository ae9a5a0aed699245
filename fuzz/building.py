"""Plans put together by hand: DataFusion's own where it writes what is wanted, node by node where it would not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datafusion import SessionConfig, SessionContext

from fuzz.cases import FOLDER
from worker import plan, plan_proto
from worker.plan_proto import Message, PhysicalPlanNode
from worker.proto import nodes_pb2

# Files that are the client's to read.
FILES = {
    "csv_scan": f"{FOLDER}/x.csv",
    "json_scan": f"{FOLDER}/x.json",
    "parquet_scan": f"{FOLDER}/x.parquet",
}

NUMBERS = pa.schema([pa.field("x", pa.int64())])


def planned(query: str, partitions: int = 1, **tables: Any) -> Message:
    """The plan of SQL over tables: record batches, or paths of Parquet, CSV and JSON files."""
    session = SessionContext(SessionConfig().with_target_partitions(partitions))
    for name, table in tables.items():
        if isinstance(table, pa.RecordBatch):
            session.register_record_batches(name, [[table]])
        else:
            getattr(session, f"register_{table.suffix.removeprefix('.')}")(name, table)
    return plan_proto.parse(session.sql(query).execution_plan().to_bytes())


def column(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.RecordBatch:
    """A batch of one column, ``x``."""
    return pa.RecordBatch.from_arrays([pa.array(values, kind)], ["x"])


def scan(batch: pa.RecordBatch) -> Message:
    """A scan of a batch that is in the plan."""
    return plan_proto.parse(SessionContext().create_dataframe([[batch]]).execution_plan().to_bytes())


def numbers() -> Message:
    """A scan of three rows of one column, ``x``."""
    return scan(column([1, 2, 3]))


def node(kind: str, *inputs: Message, **fields: Any) -> Message:
    """A node of a kind (a field's name in ``PhysicalPlanNode``) over its inputs, with values for its other fields."""
    message = PhysicalPlanNode()
    made = getattr(message, kind)
    made.SetInParent()
    names = [name for name in ("input", "left", "right") if name in made.DESCRIPTOR.fields_by_name]
    if names:
        for name, each in zip(names, inputs, strict=True):
            getattr(made, name).CopyFrom(each)
    else:
        for each in inputs:
            made.inputs.append(each)
    fill(made, fields)
    return message


def fill(message: Message, fields: Mapping[str, Any]) -> None:
    """Sets fields: scalars, lists, messages, and mappings for the fields of messages."""
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.is_repeated:
            for item in value:
                if not field.message_type:
                    getattr(message, name).append(item)
                elif isinstance(item, Mapping):
                    fill(getattr(message, name).add(), item)
                else:
                    getattr(message, name).append(item)
        elif isinstance(value, Mapping):
            getattr(message, name).SetInParent()
            fill(getattr(message, name), value)
        elif field.message_type:
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)


def schema(*fields: pa.Field | pa.DataType) -> Message:
    """A schema as plans have it."""
    named = [each if isinstance(each, pa.Field) else pa.field(f"c{at}", each) for at, each in enumerate(fields)]
    return plan.schema_message(pa.schema(named))


def typed_schema(arrow_type: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of one field ``x``, of a type that need not make sense."""
    return {"columns": [{"name": "x", "arrow_type": arrow_type, "nullable": True}]}


X: Mapping[str, Any] = {"column": {"name": "x", "index": 0}}


def literal(**value: Any) -> dict[str, Any]:
    """An expression that is a literal; the argument's name is a field of ``ScalarValue``."""
    return {"literal": value}


def call(name: str, *arguments: Mapping[str, Any], returns: str = "INT64") -> dict[str, Any]:
    """A call of a scalar function."""
    return {"scalar_udf": {"name": name, "args": arguments, "return_type": {returns: {}}, "nullable": True}}


def projected(*expressions: Mapping[str, Any], of: Message | None = None) -> Message:
    """Expressions over the three rows of ``numbers``, or over another plan."""
    names = [f"e{at}" for at in range(len(expressions))]
    return node("projection", numbers() if of is None else of, expr=expressions, expr_name=names)


def file_scan(kind: str, path: str, *, url: str = "file:///", size: int = 0, **fields: Any) -> Message:
    """A scan of a file that need not be there; further fields are those of ``FileScanExecConf``.

    A size of 0 stands for the file's own.
    """
    conf: dict[str, Any] = {
        "file_groups": [{"files": [{"path": path, "size": size}]}],
        "schema": schema(pa.field("x", pa.string())),
        "object_store_url": url,
        "statistics": {"num_rows": {}, "total_byte_size": {}, "column_stats": [{}]},
        "constraints": {},
        "projection_exprs": {"projections": [{"alias": "x", "expr": X}]},
    }
    message = node(kind, base_conf={**conf, **fields})
    if kind == "csv_scan":
        fill(message.csv_scan, {"delimiter": ",", "quote": '"'})
    return message


def sink(kind: str, path: str, *, url: str = "file:///", overwrite: bool = False, **fields: Any) -> Message:
    """A node that writes three rows into a file; further fields are those of the sink."""
    config = {
        "object_store_url": url,
        "table_paths": [path],
        "output_schema": schema(pa.field("x", pa.int64())),
        "insert_op": 1 if overwrite else 0,
        "file_extension": kind.removesuffix("_sink"),
    }
    written = schema(pa.field("count", pa.uint64(), nullable=False))
    return node(kind, numbers(), sink={"config": config, **fields}, sink_schema=written)


def distributed(kind: str, *inputs: Message, encoder: int = 0, **fields: Any) -> Message:
    """An extension node of Distributed DataFusion; its kind is a field of ``nodes_pb2.Node``."""
    inner = nodes_pb2.Node()
    getattr(inner, kind).SetInParent()
    fill(getattr(inner, kind), fields)
    return extension(nodes_pb2.Encoded(encoder_position=encoder, blob=inner.SerializeToString()), *inputs)


def extension(encoded: nodes_pb2.Encoded | bytes, *inputs: Message) -> Message:
    """An extension node of whatever bytes."""
    data = encoded if isinstance(encoded, bytes) else encoded.SerializeToString()
    return node("extension", *inputs, node=data)


def network(kind: str, partitions: int, urls: Iterable[str], query: bytes, **stage: Any) -> Message:
    """A node that reads stage 2 of a query, a task of it from each URL."""
    return distributed(
        kind,
        schema=plan.schema_message(NUMBERS).SerializeToString(),
        partitioning=plan_proto.Partitioning(unknown=partitions).SerializeToString(),
        input_stage={"query_id": query, "num": 2, "tasks": [{"url_str": url} for url in urls], **stage},
    )


def series(start: int, end: int, step: int, rows: int) -> Message:
    """Numbers from one to another, in batches of so many rows."""
    arguments = {"start": start, "end": end, "step": step, "include_end": True, "name": 1}
    return node("generate_series", schema=schema(pa.int64()), target_batch_size=rows, int64_args=arguments)


def repeated(plan: Message, times: int) -> Message:
    """A union of a plan with itself."""
    return node("union", *[plan] * times)


def joined(plan: Message, **fields: Any) -> Message:
    """A plan with other values for fields of its hash joins."""
    for each in plan_proto.nodes(plan):
        if plan_proto.kind(each) == "hash_join":
            fill(each.hash_join, fields)
    return plan
