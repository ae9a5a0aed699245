"""DataFusion's protobuf of physical plans, and ways through it.

The messages are those of the crate ``datafusion-proto-models`` 55, in a descriptor pool of their own: a user's own
generated ``datafusion`` classes may stand in the default pool, which takes each name once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from worker.errors import InvalidPlan

# A datafusion.PhysicalPlanNode or a part of one. ``Any``: the classes are made when this module is imported.
Message: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Field:
    """A field that has a message, or several."""

    name: str
    is_repeated: bool
    type: str
    """The full name of its message, such as ``datafusion.PhysicalExprNode``."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Some fields of a message."""

    by_name: Mapping[str, Field]
    oneof: str | None
    """The oneof that they all are in: it says which is set, and to ask each of forty takes longer than all else."""


# By message name, the fields through which something can be reached.
Way: TypeAlias = Mapping[str, Fields]


def _load_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    data = resources.files("worker.proto").joinpath("datafusion_55.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def _reachable(descriptor: Descriptor, without: Collection[str] = ()) -> dict[str, Descriptor]:
    """The messages that may be in one, and itself, by their full names."""
    types: dict[str, Descriptor] = {}
    unvisited = [descriptor]
    while unvisited:
        descriptor = unvisited.pop()
        if descriptor.full_name not in types and descriptor.full_name not in without:
            types[descriptor.full_name] = descriptor
            unvisited += [field.message_type for field in descriptor.fields if field.message_type]
    return types


_POOL = _load_pool()
_NODE: Descriptor = _POOL.FindMessageTypeByName("datafusion.PhysicalPlanNode")

# protobuf (upb) makes the class of a message when there is one, and keeps it no longer than Python does. One that the
# garbage collector is about to take may be given to another thread meanwhile, which ends the process.
_CLASSES = [message_factory.GetMessageClass(descriptor) for descriptor in _reachable(_NODE).values()]

PhysicalPlanNode: Callable[[], Message] = message_factory.GetMessageClass(_NODE)
Partitioning: Message = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("datafusion.Partitioning"))
Schema: Message = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("datafusion_common.Schema"))


def _enum(name: str) -> dict[str, int]:
    return {value.name: value.number for value in _POOL.FindEnumTypeByName(name).values}


# Nodes that read files, by their fields' names, and such that write some.
FILE_SCANS = frozenset({"parquet_scan", "csv_scan", "json_scan", "avro_scan", "arrow_scan"})
SINKS = frozenset({"parquet_sink", "csv_sink", "json_sink"})

# By a node's kind, the fields of its that have nodes, and whether they have several.
_INPUTS: Mapping[str | None, tuple[tuple[str, bool], ...]] = {
    kind.name: tuple(
        (field.name, not field.has_presence) for field in kind.message_type.fields if field.message_type is _NODE
    )
    for kind in _NODE.fields
    if kind.message_type
}

# Where the different kinds of calls have the function's name. A window has a name of its own too.
_FUNCTION_NAMES = ("user_defined_aggr_function", "user_defined_window_function", "name")

JOIN_TYPES = _enum("datafusion_common.JoinType")
PARTITION_MODES = _enum("datafusion.PartitionMode")


def fields_towards(is_wanted: Callable[[Descriptor], bool], *, without: Collection[str] = ()) -> Way:
    """The fields through which a wanted message can be reached from a node.

    A plan has some ten thousand messages, most of them statistics and expressions: a walk along these fields visits
    a hundredth of them, which is 0.02 ms where a walk through everything is 3 ms.

    Args:
        is_wanted: says it of each kind of messages.
        without: full names of messages that are not looked into.
    """
    types = _reachable(_NODE, without)
    leading = {name for name, descriptor in types.items() if is_wanted(descriptor)}
    grown = -1
    while grown != len(leading):
        grown = len(leading)
        leading |= {
            name
            for name, descriptor in types.items()
            if any(field.message_type and field.message_type.full_name in leading for field in descriptor.fields)
        }
    return {name: _fields(types[name], leading) for name in leading}


def _fields(descriptor: Descriptor, types: set[str]) -> Fields:
    """The fields of a message that have messages of some types."""
    chosen = {
        field.name: (field, field.message_type.full_name)
        for field in descriptor.fields
        if field.message_type and field.message_type.full_name in types
    }
    oneofs = {field.containing_oneof.name if field.containing_oneof else None for field, _ in chosen.values()}
    return Fields(
        {name: Field(name, not field.has_presence, type_) for name, (field, type_) in chosen.items()},
        oneofs.pop() if len(oneofs) == 1 else None,
    )


def parts(message: Message, fields: Fields) -> Iterator[tuple[Field, Message]]:
    """What is in some fields of a message, in their order."""
    if fields.oneof is not None:
        field = fields.by_name.get(message.WhichOneof(fields.oneof))
        if field is not None:
            yield field, getattr(message, field.name)
        return
    for name, field in fields.by_name.items():
        if field.is_repeated:
            for part in getattr(message, name):
                yield field, part
        elif message.HasField(name):
            yield field, getattr(message, name)


def _walk(message: Message, way: Way) -> Iterator[Message]:
    yield message
    for _, part in parts(message, way[message.DESCRIPTOR.full_name]):
        yield from _walk(part, way)


_TOWARDS_FUNCTIONS = fields_towards(lambda descriptor: "fun_definition" in descriptor.fields_by_name)


def parse(plan: bytes) -> Message:
    """The plan as a message.

    Raises:
        InvalidPlan: the bytes are no ``datafusion.PhysicalPlanNode``.
    """
    try:
        return PhysicalPlanNode.FromString(plan)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise InvalidPlan(f"the plan of {len(plan)} bytes is not a datafusion.PhysicalPlanNode") from error


def nodes(plan: Message) -> Iterator[Message]:
    """Every ``PhysicalPlanNode`` of the plan, itself first, parents before their children."""
    unvisited = [iter((plan,))]
    while unvisited:
        node = next(unvisited[-1], None)
        if node is None:
            unvisited.pop()
        else:
            yield node
            unvisited.append(children(node))


def children(node: Message) -> Iterator[Message]:
    """The inputs of a node, in the order of its fields."""
    name = kind(node)
    content: Message = getattr(node, name) if name else None
    for field, is_repeated in _INPUTS.get(name, ()):
        if is_repeated:
            yield from getattr(content, field)
        elif content.HasField(field):
            yield getattr(content, field)


def kind(node: Message) -> str | None:
    """Which node it is, by its field's name, such as ``hash_join``; None for a node that DataFusion 55 lacks."""
    name: str | None = node.WhichOneof("PhysicalPlanType")
    return name


def unknown_kind(node: Message) -> str:
    """The number of the field that says which node it is, where that is none of DataFusion 55's."""
    return ", ".join(str(field.field_number) for field in UnknownFieldSet(node)) or "none"  # type: ignore[attr-defined]


def partition_count(partitioning: Message) -> int:
    """How many partitions a ``datafusion.Partitioning`` has."""
    match partitioning.WhichOneof("partition_method"):
        case "hash":
            return int(partitioning.hash.partition_count)
        case "range":
            return len(partitioning.range.split_point) + 1
        case None:
            return 0
        case method:
            return int(getattr(partitioning, method))


def tag(message: str, field: str) -> bytes:
    """What begins a field that has bytes, where a message is serialized.

    Args:
        message: the full name of its kind.
        field: the field's name.
    """
    number = _POOL.FindMessageTypeByName(message).fields_by_name[field].number
    key = number << 3 | 2
    return bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])


def functions(plan: Message) -> Iterator[Message]:
    """Every expression of the plan that has a ``fun_definition``: calls of functions that a session provides."""
    return (
        message for message in _walk(plan, _TOWARDS_FUNCTIONS) if "fun_definition" in message.DESCRIPTOR.fields_by_name
    )


def function_name(function: Message) -> str:
    """The name of what one of ``functions`` calls."""
    fields = function.DESCRIPTOR.fields_by_name
    names = [getattr(function, field) for field in _FUNCTION_NAMES if field in fields]
    return next(filter(None, names), "")


def wrap(node: Message, place: Callable[[Message], Message]) -> None:
    """Puts a new node in the place of one that becomes its input, at the ``place`` in it."""
    wrapper = PhysicalPlanNode()
    place(wrapper).CopyFrom(node)
    node.CopyFrom(wrapper)
