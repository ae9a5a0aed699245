"""A check of plans before anything of DataFusion sees them: of all that it believes, in decoding and in execution.

``KINDS`` has a line for each kind of nodes; what is not there is refused, unless a setting lets it through. The limits
are those of ``config.PlanLimits``, which says why there is each of them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worker import ipc, plan_proto
from worker.config import PlanLimits
from worker.errors import InvalidPlan, PlanTooLarge
from worker.plan_proto import Message

_NODE = "datafusion.PhysicalPlanNode"
_EXPRESSION = "datafusion.PhysicalExprNode"
_BINARY = "datafusion.PhysicalBinaryExprNode"
_SORT_KEY = "datafusion.PhysicalSortExprNode"
_STATISTICS = "datafusion_common.Statistics"
_FIELD = "datafusion_common.Field"
_TYPE = "datafusion_common.ArrowType"
_VALUE = "datafusion_common.ScalarValue"
_LOOKED_AT = frozenset({_NODE, _BINARY, _SORT_KEY, _TYPE, _VALUE})

# Sort-merge joins have logical expressions, of which DataFusion reads nothing but how they sort.
_WAY = plan_proto.fields_towards(
    lambda descriptor: descriptor.full_name in _LOOKED_AT, without={"datafusion.LogicalExprNode"}
)

# Values that are looked at: those that have types or other values inside, and these. The others are numbers and texts.
_OWN_VALUES = ("timestamp_value", "fixed_size_binary_value")
_RARE_TAGS = tuple(plan_proto.tag(_VALUE, name) for name in (*_WAY[_VALUE].by_name, *_OWN_VALUES))
_VALUE_TAG = plan_proto.tag("datafusion_common.Precision", "val")[0]

# Chains that are so short take no time.
_SHORT = 8

# Bytes of a value whose size its type does not say; some decimals have more.
_BYTES_OF_A_VALUE = 8


def _widest(content: Message, inputs: list[int]) -> int:
    return max(inputs, default=1)


def _one(content: Message, inputs: list[int]) -> int:
    return 1


def _sum(content: Message, inputs: list[int]) -> int:
    return sum(inputs)


def _said(content: Message, inputs: list[int]) -> int:
    return int(content.partitions)


def _sorted(content: Message, inputs: list[int]) -> int:
    return _widest(content, inputs) if content.preserve_partitioning else 1


def _file_groups(content: Message, inputs: list[int]) -> int:
    conf = content.base_conf
    return max(len(conf.file_groups), plan_proto.partition_count(conf.output_partitioning))


def _streams(content: Message, inputs: list[int]) -> int:
    return len(content.partitions)


def _repartitioned(content: Message, inputs: list[int]) -> int:
    return plan_proto.partition_count(content.partitioning)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is to be known of a kind of nodes. Fields are paths, such as ``base_conf.batch_size``."""

    partitions: Callable[[Message, list[int]], int] = _widest
    """How many partitions a node has at most, by those of its inputs."""
    rows: str = ""
    """The number of rows that it sets memory aside for."""
    least_rows: int = 0
    """With fewer, it has no rows at all, and no error."""
    columns: tuple[str, ...] = ()
    """The repeated fields that have something for each column."""
    aliases: str = ""
    """The one of these that has new names for columns."""
    conditions: str = ""
    """The repeated field whose conditions all have to hold."""
    has_channels: bool = False
    """Whether it has a channel from each partition of its input to each of its own."""


_SCAN = Kind(
    _file_groups,
    rows="base_conf.batch_size",
    least_rows=1,
    columns=("base_conf.schema.columns", "base_conf.projection", "base_conf.projection_exprs.projections"),
    aliases="base_conf.projection_exprs.projections",
)
_SINK = Kind(_one)

KINDS: Mapping[str, Kind] = {
    "aggregate": Kind(rows="limit.limit", columns=("group_expr", "aggr_expr"), aliases="group_expr"),
    "analyze": Kind(_one),
    "arrow_scan": _SCAN,
    "async_func": Kind(columns=("async_exprs",)),
    "avro_scan": _SCAN,
    "buffer": Kind(),
    "coalesce_batches": Kind(rows="target_batch_size"),
    "cooperative": Kind(),
    "cross_join": Kind(),
    "csv_scan": _SCAN,
    "csv_sink": _SINK,
    "empty": Kind(_said, columns=("schema.columns",)),
    "explain": Kind(_one),
    "extension": Kind(),
    "filter": Kind(rows="batch_size", columns=("projection",)),
    "generate_series": Kind(_one, rows="target_batch_size", least_rows=1),
    "global_limit": Kind(_one),
    "hash_join": Kind(columns=("projection",), conditions="on"),
    "interleave": Kind(),
    "json_scan": _SCAN,
    "json_sink": _SINK,
    "local_limit": Kind(),
    "memory_scan": Kind(_streams, columns=("schema.columns", "projection")),
    "merge": Kind(_one),
    "nested_loop_join": Kind(columns=("projection",)),
    "parquet_scan": _SCAN,
    "parquet_sink": _SINK,
    "placeholder_row": Kind(_said, columns=("schema.columns",)),
    "projection": Kind(columns=("expr",), aliases="expr"),
    "repartition": Kind(_repartitioned, has_channels=True),
    "scalar_subquery": Kind(),
    "sort": Kind(_sorted),
    "sort_merge_join": Kind(conditions="on"),
    "sort_preserving_merge": Kind(_one),
    "symmetric_hash_join": Kind(conditions="on"),
    "union": Kind(_sum),
    "unnest": Kind(columns=("schema.columns", "list_type_columns", "struct_type_columns")),
    "window": Kind(columns=("window_expr",)),
}


def check(plan: Message, limits: PlanLimits) -> int:
    """Looks at a whole plan, and everything in it but what only codecs know. Takes 0.2 to 0.8 ms for those of TPC-H.

    Returns:
        How many partitions it has at most.

    Raises:
        InvalidPlan: it has what no plan should have.
        PlanTooLarge: it has more of something than a limit allows.
    """
    return _Check(limits).plan(plan)


def check_partitioning(partitioning: Message, inputs: int, limits: PlanLimits) -> None:
    """Looks at a ``datafusion.Partitioning`` that stands alone, as if it were above a plan of so many partitions.

    Raises:
        InvalidPlan, PlanTooLarge: as ``check``.
    """
    plan = plan_proto.PhysicalPlanNode()
    plan.repartition.partitioning.CopyFrom(partitioning)
    plan.repartition.input.empty.partitions = inputs
    check(plan, limits)


class _Check:
    """A check of one plan. What looks at a message returns how many operands in a row there are in it at most."""

    def __init__(self, limits: PlanLimits) -> None:
        self._limits = limits
        self._kind = ""
        """The kind of the node that is being looked at."""
        self._nodes = self._channels = self._aliases = self._sort_keys = self._squares = self._data = 0
        """Of all nodes so far. Channels are those of repartitionings, squares those of the lengths of chains."""
        self._looks: dict[str, Callable[[Message], int]] = {
            _BINARY: self._binary,
            _SORT_KEY: self._sort_key,
            _STATISTICS: self._statistics,
            _FIELD: self._field,
            _TYPE: self._type,
            _VALUE: self._value,
        }

    def plan(self, plan: Message) -> int:
        partitions = self._node(plan)
        self._at_most(
            self._sort_keys * self._aliases,
            "max_plan_sort_columns",
            "the plan's sort keys times its new names of columns are {}",
        )
        return partitions

    def _node(self, node: Message) -> int:
        """Looks at a node and those below it, and returns how many partitions it has at most."""
        self._nodes += 1
        self._at_most(self._nodes, "max_plan_nodes", "the plan has {} nodes")
        name = plan_proto.kind(node)
        if name not in KINDS:
            self._refuse_unless_allowed(name or plan_proto.unknown_kind(node))
        if name is None:
            return 1
        kind = KINDS.get(name, Kind())
        content = getattr(node, name)
        inputs = []
        for field, part in plan_proto.parts(content, _WAY[content.DESCRIPTOR.full_name]):
            if field.type == _NODE:
                inputs.append(self._node(part))
            else:
                self._kind = name
                self._at_most(
                    self._look(field.type, part), "max_plan_operands", "the plan's {kind} has {} operands in a row"
                )
        self._kind = name
        self._figures(kind, content)
        return self._partitions(kind, content, inputs)

    def _refuse_unless_allowed(self, name: str) -> None:
        if name not in self._limits.allow_nodes:
            raise InvalidPlan(
                f"the plan has a node of kind {name}, which this worker does not know: the setting allow_nodes lets it "
                "through"
            )

    def _figures(self, kind: Kind, content: Message) -> None:
        for path in kind.columns:
            columns = len(_at(content, path))
            self._at_most(columns, "max_plan_columns", "the plan's {kind} has {} columns")
            if path == kind.aliases:
                self._aliases += columns
        if kind.conditions:
            self._in_a_row(len(_at(content, kind.conditions)))
        if kind.rows and (rows := _number_at(content, kind.rows)) is not None:
            if rows < kind.least_rows:
                raise InvalidPlan(f"the plan's {self._kind} has a batch size of {rows}, which means no rows at all")
            self._at_most(rows, "max_plan_batch_size", "the plan's {kind} sets memory aside for {} rows")
        if self._kind == "memory_scan":
            for index, partition in enumerate(content.partitions):
                self._embedded(f"partition {index}", ipc.check, partition)

    def _partitions(self, kind: Kind, content: Message, inputs: list[int]) -> int:
        partitions = kind.partitions(content, inputs)
        self._at_most(partitions, "max_plan_partitions", "the plan's {kind} has {} partitions")
        if kind.has_channels:
            self._channels += partitions * max(inputs, default=1)
            self._at_most(self._channels, "max_plan_channels", "the plan has {} channels from partition to partition")
        return partitions

    def _look(self, type_: str, message: Message) -> int:
        look = self._looks.get(type_)
        return self._below(type_, message) if look is None else look(message)

    def _below(self, type_: str, message: Message) -> int:
        deepest = 0
        for field, part in plan_proto.parts(message, _WAY[type_]):
            deepest = max(deepest, self._look(field.type, part))
        return deepest

    def _binary(self, binary: Message) -> int:
        operands, depth = self._chain(binary)
        # DataFusion takes long for all but these.
        if binary.op != "Or":
            self._in_a_row(operands)
        return depth

    def _in_a_row(self, operands: int) -> None:
        if operands > _SHORT:
            self._squares += operands**2
            self._at_most(
                math.isqrt(self._squares), "max_plan_conjuncts", "the plan's {kind} has {} operands in a row, not of OR"
            )

    def _chain(self, binary: Message) -> tuple[int, int]:
        """How many operands there are of one operator, and how deep what DataFusion makes of them is."""
        operands = deepest = 0
        parts = binary.operands or (binary.l, binary.r)
        for part in parts:
            if part.WhichOneof("ExprType") == "binary_expr" and part.binary_expr.op == binary.op:
                more, depth = self._chain(part.binary_expr)
            else:
                more, depth = 1, self._below(_EXPRESSION, part)
            operands += more
            deepest = max(deepest, depth)
        return operands, deepest + len(parts)

    def _sort_key(self, key: Message) -> int:
        self._sort_keys += 1
        self._at_most(self._sort_keys, "max_plan_columns", "the plan has {} sort keys")
        return self._below(_SORT_KEY, key)

    def _statistics(self, statistics: Message) -> int:
        # Thousands of values in some plans, and next to never one of a kind that is looked at.
        if _may_have_rare_values(statistics.SerializeToString()):
            self._below(_STATISTICS, statistics)
        return 0

    def _value(self, value: Message) -> int:
        match value.WhichOneof("value"):
            case "timestamp_value":
                self._time_zone(value.timestamp_value.timezone)
            case "fixed_size_binary_value":
                self._width(value.fixed_size_binary_value.length, 1)
            case name if name in _WAY[_VALUE].by_name:
                content = getattr(value, name)
                if content.DESCRIPTOR.name == "ScalarNestedValue":
                    self._embedded(f"the {name}", ipc.check_nested, content)
                return self._below(_VALUE, value)
        return 0

    def _embedded(self, what: str, check_ipc: Callable[..., int], data: Any) -> None:
        """Checks Arrow IPC, which says how much it is."""
        limit = self._limits.max_plan_data_size
        try:
            self._data += check_ipc(data, max_bytes=limit - self._data)
        except ValueError as error:
            raise InvalidPlan(
                f"{what} of the plan's {self._kind} is no Arrow data, or more than is left of max_plan_data_size "
                f"({int(limit)}): {error}"
            ) from error

    def _field(self, field: Message) -> int:
        # Its children are what types had before they had fields of their own; DataFusion does not look at them.
        return self._type(field.arrow_type)

    def _type(self, type_: Message) -> int:
        self._bytes_of(type_)
        return 0

    def _bytes_of(self, type_: Message) -> int:
        """How many bytes a null of a type takes."""
        match type_.WhichOneof("arrow_type_enum"):
            case "FIXED_SIZE_BINARY":
                return self._width(type_.FIXED_SIZE_BINARY, 1)
            case "FIXED_SIZE_LIST":
                listed = type_.FIXED_SIZE_LIST
                return self._width(listed.list_size, self._bytes_of(listed.field_type.arrow_type))
            case "STRUCT":
                return self._width(1, sum(self._bytes_of(field.arrow_type) for field in type_.STRUCT.sub_field_types))
            case "UNION":
                return self._width(1, sum(self._bytes_of(field.arrow_type) for field in type_.UNION.union_types))
            case "TIMESTAMP":
                self._time_zone(type_.TIMESTAMP.timezone)
            case name if name in _WAY[_TYPE].by_name:
                self._below(_TYPE, type_)
        return _BYTES_OF_A_VALUE

    def _width(self, count: int, each: int) -> int:
        if count < 0:
            raise InvalidPlan(f"the plan's {self._kind} has a type of fixed size {count}")
        # What is empty still takes something, and there may be many in it or of it.
        size = max(count, 1) * max(each, 1)
        self._at_most(size, "max_plan_value_size", "the plan's {kind} has a type whose nulls take {} bytes")
        return size

    def _time_zone(self, name: str) -> None:
        # It ends the process as soon as Python gets such a column.
        if "\0" in name:
            raise InvalidPlan(f"the plan's {self._kind} has the time zone {name!r}, in which there is a NUL")

    def _at_most(self, number: int, setting: str, text: str) -> None:
        limit = getattr(self._limits, setting)
        if number > limit:
            raise PlanTooLarge(f"{text.format(number, kind=self._kind)}: {setting} is {int(limit)}")


def _at(content: Message, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), content)


def _number_at(content: Message, path: str) -> int | None:
    """A number in a node, None if it is not said there."""
    *outer, name = path.split(".")
    for part in outer:
        if not content.HasField(part):
            return None
        content = getattr(content, part)
    if content.DESCRIPTOR.fields_by_name[name].has_presence and not content.HasField(name):
        return None
    return int(getattr(content, name))


def _may_have_rare_values(data: bytes) -> bool:
    """Whether there may be a value of a rare kind in statistics; if not, there is none.

    Each value begins with a tag and its length, and then comes the tag of its kind: protobuf writes what it does not
    know after what it knows.
    """
    for tag in _RARE_TAGS:
        place = data.find(tag)
        while place >= 0:
            # The length has one byte, or several, of which all but the last have the high bit.
            start = place - 1
            while start > 0 and data[start - 1] >= 128:
                start -= 1
            if start > 0 and data[start - 1] == _VALUE_TAG:
                return True
            place = data.find(tag, place + 1)
    return False
