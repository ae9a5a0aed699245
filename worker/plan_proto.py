"""DataFusion's protobuf of physical plans, and ways through it.

The messages are those of the crate ``datafusion-proto-models`` 55, in a descriptor pool of their own: a user's own
generated ``datafusion`` classes may stand in the default pool, which takes each name once.
"""

from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from worker.errors import InvalidPlan

# A datafusion.PhysicalPlanNode or a part of one. ``Any``: the classes are made when this module is imported.
Message: TypeAlias = Any

_Fields: TypeAlias = dict[str, dict[str, bool]]


def _load_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    data = resources.files("worker.proto").joinpath("datafusion_55.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _load_pool()
_NODE: Descriptor = _POOL.FindMessageTypeByName("datafusion.PhysicalPlanNode")
PhysicalPlanNode: Callable[[], Message] = message_factory.GetMessageClass(_NODE)
Partitioning: Message = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("datafusion.Partitioning"))
Schema: Message = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("datafusion_common.Schema"))


def _enum(name: str) -> dict[str, int]:
    return {value.name: value.number for value in _POOL.FindEnumTypeByName(name).values}


# Nodes that read files, by their fields' names, and such that write some.
FILE_SCANS = frozenset({"parquet_scan", "csv_scan", "json_scan", "avro_scan", "arrow_scan"})
SINKS = frozenset({"parquet_sink", "csv_sink", "json_sink"})

# Where the different kinds of calls have the function's name. A window has a name of its own too.
_FUNCTION_NAMES = ("user_defined_aggr_function", "user_defined_window_function", "name")

JOIN_TYPES = _enum("datafusion_common.JoinType")
PARTITION_MODES = _enum("datafusion.PartitionMode")


def _fields_towards(is_wanted: Callable[[Descriptor], bool]) -> _Fields:
    """By message name, the fields (name, repeated or not) through which a wanted message can be reached.

    A plan has some ten thousand messages, most of them statistics and expressions: a walk along these fields visits
    a hundredth of them, which is 0.02 ms where a walk through everything is 3 ms.
    """
    types: dict[str, Descriptor] = {}
    unvisited = [_NODE]
    while unvisited:
        descriptor = unvisited.pop()
        if descriptor.full_name not in types:
            types[descriptor.full_name] = descriptor
            unvisited += [field.message_type for field in descriptor.fields if field.message_type]
    leading = {name for name, descriptor in types.items() if is_wanted(descriptor)}
    grown = -1
    while grown != len(leading):
        grown = len(leading)
        leading |= {
            name
            for name, descriptor in types.items()
            if any(field.message_type and field.message_type.full_name in leading for field in descriptor.fields)
        }
    return {
        name: {
            field.name: not field.has_presence
            for field in types[name].fields
            if field.message_type and field.message_type.full_name in leading
        }
        for name in leading
    }


def _parts(message: Message, fields: _Fields) -> Iterator[Message]:
    leading = fields[message.DESCRIPTOR.full_name]
    if message.DESCRIPTOR is _NODE:
        # One of forty fields is set, and says so: asking each takes longer than all else.
        name = kind(message)
        if name in leading:
            yield getattr(message, name)
        return
    for name, repeated in leading.items():
        if repeated:
            yield from getattr(message, name)
        elif message.HasField(name):
            yield getattr(message, name)


def _walk(message: Message, fields: _Fields) -> Iterator[Message]:
    yield message
    for part in _parts(message, fields):
        yield from _walk(part, fields)


_TOWARDS_NODES = _fields_towards(lambda descriptor: descriptor is _NODE)
_TOWARDS_FUNCTIONS = _fields_towards(lambda descriptor: "fun_definition" in descriptor.fields_by_name)


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
    return (message for message in _walk(plan, _TOWARDS_NODES) if message.DESCRIPTOR is _NODE)


def children(node: Message) -> Iterator[Message]:
    """The inputs of a node, in the order of its fields."""
    for part in _parts(node, _TOWARDS_NODES):
        if part.DESCRIPTOR is _NODE:
            yield part
        else:
            yield from children(part)


def kind(node: Message) -> str | None:
    """Which node it is, by its field's name, such as ``hash_join``; None for a node that DataFusion 55 lacks."""
    name: str | None = node.WhichOneof("PhysicalPlanType")
    return name


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
