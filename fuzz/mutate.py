"""Mutations: a real plan or request made into one that nobody means. The same random numbers make the same of it."""

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from fuzz import arrow
from fuzz.cases import Case, Kind
from worker import plan_proto
from worker.plan_proto import Message
from worker.proto import nodes_pb2, plan_pb2, worker_pb2

# Larger ones are not sent: what becomes of those is told by their size alone.
MAX_SIZE = 4 << 20

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (31, True),
    FieldDescriptor.CPPTYPE_INT64: (63, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}
_INTEGERS = (0, 1, 2, 3, 7, 100, 255, 1 << 16, (1 << 20) + 1, 1 << 24, 1 << 30)
_FLOATS = (0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
_STRINGS = (
    "",
    "\0",
    "a\0b",
    "..",
    "../../etc/passwd",
    "%2e%2e/%00",
    "/dev/zero",
    "/proc/self/mem",
    "file://",
    "s3://bucket/key",
    "é" * 99,
    "x" * 70_000,
    "+99:99",
    "Europe/Rome",
    "9" * 400,
    "$1\\",
)
_OPERATORS = (
    "And",
    "Or",
    "Plus",
    "Minus",
    "Multiply",
    "Divide",
    "Modulo",
    "Eq",
    "Lt",
    "RegexMatch",
    "BitwiseShiftLeft",
)
_REPEATS = (2, 3, 16, 300, 10_000)

# Bytes that are messages themselves, by the names of their fields.
_INNER: dict[str, Callable[[], Any]] = {
    "worker.nodes.Network.schema": plan_proto.Schema,
    "worker.nodes.Network.partitioning": plan_proto.Partitioning,
    "worker.nodes.Stage.plan_proto": plan_proto.PhysicalPlanNode,
    "worker.nodes.Encoded.blob": nodes_pb2.Node,
    "datafusion.PhysicalExtensionNode.node": nodes_pb2.Encoded,
    "worker.plan.DoGet.plan_proto": plan_proto.PhysicalPlanNode,
    "worker.SetPlanRequest.plan_proto": plan_proto.PhysicalPlanNode,
    "worker.RepartitionExecHead.partitioning": plan_proto.Partitioning,
}
_STREAM = "datafusion.MemoryScanExecNode.partitions"
_METADATA = (
    "datafusion_common.ScalarNestedValue.ipc_message",
    "datafusion_common.ScalarNestedValue.Dictionary.ipc_message",
)

REQUESTS: dict[Kind, Callable[[], Any]] = {
    Kind.PLAN: plan_proto.PhysicalPlanNode,
    Kind.TASK: plan_proto.PhysicalPlanNode,
    Kind.TICKET: plan_pb2.DoGet,
    Kind.DESCRIPTOR: plan_pb2.DoGet,
    Kind.SET_PLAN: worker_pb2.SetPlanRequest,
    Kind.EXECUTE: worker_pb2.ExecuteTaskRequest,
}


class Mutator:
    """Makes cases out of seeds."""

    def __init__(self, plans: Sequence[Message], requests: Sequence[Case], seed: int) -> None:
        """
        Args:
            plans: real ones.
            requests: real ones, of the kinds that are not plans alone.
            seed: of the random numbers.
        """
        self._plans = plans
        self._requests = requests
        self._random = random.Random(seed)
        self._by_type: dict[str, list[Message]] = {}
        for plan in plans:
            for message in messages(plan):
                self._by_type.setdefault(message.DESCRIPTOR.full_name, []).append(message)

    def case(self) -> Case:
        """The next case."""
        while True:
            case = self._mutated(self._seed())
            if len(case.data) <= MAX_SIZE:
                return case

    def _seed(self) -> Case:
        if self._random.random() < 0.12:
            return self._random.choice(self._requests)
        kind = Kind.TASK if self._random.random() < 0.15 else Kind.PLAN
        return Case(kind, self._random.choice(self._plans).SerializeToString())

    def _mutated(self, case: Case) -> Case:
        data = case.data
        if self._random.random() < 0.92:
            message = REQUESTS[case.kind]()
            message.ParseFromString(data)
            for _ in range(self._random.choice((1, 1, 1, 2, 2, 3, 5))):
                self._change(message, 0)
            data = message.SerializeToString()
        if self._random.random() < 0.12:
            data = self._change_bytes(data)
        return Case(case.kind, data)

    def _change(self, message: Message, depth: int) -> None:
        """Changes something in a message: itself, a message in it, or one that stands in it as bytes."""
        chosen = self._random.choice(list(messages(message)))
        inner = [
            field
            for field, value in chosen.ListFields()
            if field.type == FieldDescriptor.TYPE_BYTES and (field.full_name in _INNER or _is_arrow(field)) and value
        ]
        if inner and self._random.random() < 0.7:
            self._change_inner(chosen, self._random.choice(inner), depth)
            return
        changes = (
            self._set_scalar,
            self._set_scalar,
            self._set_scalar,
            self._clear,
            self._repeat,
            self._swap,
            self._graft,
            self._graft,
            self._deepen,
            self._wrap,
        )
        self._random.choice(changes)(chosen)

    def _change_inner(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        at = self._random.randrange(len(getattr(message, field.name))) if field.is_repeated else None
        value = getattr(message, field.name)
        data = value if at is None else value[at]
        if _is_arrow(field):
            data = self._change_arrow(data, is_stream=field.full_name == _STREAM)
        else:
            inner = _INNER[field.full_name]()
            try:
                inner.ParseFromString(data)
            except DecodeError:
                data = self._change_bytes(data)
            else:
                if depth < 4:
                    self._change(inner, depth + 1)
                data = inner.SerializeToString()
        if at is None:
            setattr(message, field.name, data)
        else:
            value[at] = data

    def _set_scalar(self, message: Message) -> None:
        fields = [field for field in message.DESCRIPTOR.fields if not field.message_type]
        present = [field for field, _ in message.ListFields() if not field.message_type]
        if not fields:
            return
        field = self._random.choice(present if present and self._random.random() < 0.7 else fields)
        value = self._scalar(field)
        if not field.is_repeated:
            setattr(message, field.name, value)
            return
        values = getattr(message, field.name)
        if values and self._random.random() < 0.7:
            values[self._random.randrange(len(values))] = value
        else:
            values.append(value)

    def _scalar(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._random.choice((0, 1, 2, 3, 5, 8, 77, (1 << 31) - 1, -1))
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._random.choice(_FLOATS)
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                size = self._random.choice((0, 1, 8, 500, 20_000))
                return self._random.randbytes(size)
            case FieldDescriptor.CPPTYPE_STRING:
                return self._random.choice((*_STRINGS, *_OPERATORS))
            case _:
                bits, is_signed = _BITS[field.cpp_type]
                extremes = [(1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), self._random.getrandbits(bits)]
                if is_signed:
                    extremes += [-1, -(1 << bits), -2]
                return self._random.choice((*_INTEGERS, *extremes))

    def _clear(self, message: Message) -> None:
        if present := message.ListFields():
            field, value = self._random.choice(present)
            if field.is_repeated and not _is_map(field) and self._random.random() < 0.7:
                del value[self._random.randrange(len(value))]
            else:
                message.ClearField(field.name)

    def _repeat(self, message: Message) -> None:
        repeated = [field for field, _ in message.ListFields() if field.is_repeated and not _is_map(field)]
        if repeated:
            field = self._random.choice(repeated)
            values = getattr(message, field.name)
            chosen = values[self._random.randrange(len(values))]
            size = chosen.ByteSize() if field.message_type else len(str(chosen))
            times = min(self._random.choice(_REPEATS), MAX_SIZE // (2 * (size + 1)))
            values.extend([chosen] * times)

    def _swap(self, message: Message) -> None:
        present = message.ListFields()
        pairs = [
            (field, other)
            for field, _ in present
            for other, _ in present
            if field.name < other.name
            and field.message_type
            and field.message_type is other.message_type
            and not field.is_repeated
            and not other.is_repeated
        ]
        if pairs:
            first, second = self._random.choice(pairs)
            kept = type(getattr(message, first.name))()
            kept.CopyFrom(getattr(message, first.name))
            getattr(message, first.name).CopyFrom(getattr(message, second.name))
            getattr(message, second.name).CopyFrom(kept)
            return
        repeated = [value for field, value in present if field.is_repeated and not _is_map(field) and len(value) > 1]
        if repeated:
            values = self._random.choice(repeated)
            kept_values = list(values)
            self._random.shuffle(kept_values)
            copies = [
                type(each).FromString(each.SerializeToString()) if hasattr(each, "SerializeToString") else each
                for each in kept_values
            ]
            del values[:]
            values.extend(copies)

    def _graft(self, message: Message) -> None:
        """Puts a message of another plan, of the same type, into the place of one, or where none was."""
        fields = [field for field in message.DESCRIPTOR.fields if field.message_type and not _is_map(field)]
        present = [field for field, _ in message.ListFields() if field.message_type and not _is_map(field)]
        if not fields:
            return
        field = self._random.choice(present if present and self._random.random() < 0.8 else fields)
        others = self._by_type.get(field.message_type.full_name)
        if not others:
            getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name).SetInParent()
            return
        other = self._random.choice(others)
        if not field.is_repeated:
            getattr(message, field.name).ParseFromString(other.SerializeToString())
            return
        values = getattr(message, field.name)
        into = values[self._random.randrange(len(values))] if values and self._random.random() < 0.7 else values.add()
        into.ParseFromString(other.SerializeToString())

    def _deepen(self, message: Message) -> None:
        """Makes an expression a long chain of operands, or one in many others."""
        expressions = [each for each in messages(message) if each.DESCRIPTOR.full_name == "datafusion.PhysicalExprNode"]
        if not expressions:
            self._wrap(message)
            return
        chosen = self._random.choice(expressions)
        copied = type(chosen)()
        copied.CopyFrom(chosen)
        if self._random.random() < 0.5:
            times = min(self._random.choice((2, 50, 1_000, 10_000)), MAX_SIZE // (2 * (copied.ByteSize() + 4)))
            chosen.binary_expr.op = self._random.choice(_OPERATORS)
            chosen.binary_expr.operands.extend([copied] * times)
        else:
            name = self._random.choice(("not_expr", "negative", "is_null_expr", "cast", "sort"))
            for _ in range(self._random.choice((1, 5, 40))):
                inner = type(chosen)()
                getattr(inner, name).expr.CopyFrom(copied)
                copied = inner
            chosen.CopyFrom(copied)

    def _wrap(self, message: Message) -> None:
        """Puts a node of another plan over a node."""
        nodes = [each for each in messages(message) if each.DESCRIPTOR.full_name == "datafusion.PhysicalPlanNode"]
        if not nodes:
            self._set_scalar(message)
            return
        chosen = self._random.choice(nodes)
        wrapper = plan_proto.PhysicalPlanNode()
        wrapper.CopyFrom(self._random.choice(self._by_type["datafusion.PhysicalPlanNode"]))
        inputs = [each for each in messages(wrapper) if each.DESCRIPTOR.full_name == "datafusion.PhysicalPlanNode"]
        if len(inputs) > 1:
            self._random.choice(inputs[1:]).CopyFrom(chosen)
        chosen.CopyFrom(wrapper)

    def _change_bytes(self, data: bytes) -> bytes:
        """Flips, cuts, and puts parts of one place into another."""
        changed = bytearray(data)
        for _ in range(self._random.choice((1, 1, 2, 8))):
            if not changed:
                break
            at, other = self._random.randrange(len(changed)), self._random.randrange(len(changed))
            length = self._random.randrange(1, 40)
            match self._random.randrange(5):
                case 0:
                    changed[at] ^= 1 << self._random.randrange(8)
                case 1:
                    changed[at] = self._random.choice((0, 0x7F, 0x80, 0xFF))
                case 2:
                    del changed[at : at + length]
                case 3:
                    changed[at:at] = changed[other : other + length]
                case _:
                    del changed[at:]
        return bytes(changed)

    def _change_arrow(self, data: bytes, *, is_stream: bool) -> bytes:
        """Has the numbers of an Arrow stream, or of a message's metadata, lie."""
        choice = self._random.random()
        if choice < 0.2:
            return self._change_bytes(data)
        if choice < 0.3 and is_stream:
            return self._other_stream(data)
        try:
            found = list(arrow.batches(data)) if is_stream else [arrow.metadata_numbers(data)]
        except (struct.error, IndexError):
            return self._change_bytes(data)
        batches = [each for each in found if each is not None]
        if not batches:
            return self._change_bytes(data)
        batch = self._random.choice(batches)
        if choice < 0.45 and batch.size:
            # Offsets, keys and lengths that stand in the body.
            at = batch.body + self._random.randrange(0, batch.size, 4)
            return arrow.put(data, at, self._number(32), 4)
        places = [*batch.nodes, *batch.buffers]
        places += [at for at in (batch.length, batch.body_length) if at is not None]
        if batch.framing is not None and self._random.random() < 0.1:
            return arrow.put(data, batch.framing, self._number(32), 4)
        if self._random.random() < 0.2 and batch.length is not None and batch.nodes:
            rows = self._number(63)
            for at in (batch.length, *batch.nodes[::2]):
                data = arrow.put(data, at, rows)
            return data
        return arrow.put(data, self._random.choice(places), self._number(63))

    def _other_stream(self, data: bytes) -> bytes:
        """The stream compressed, another one, or both after each other."""
        match self._random.randrange(4):
            case 0:
                zeros = pa.array(
                    [0] * (self._random.choice((1 << 10, 1 << 20)) + self._random.randrange(9)), pa.int64()
                )
                return arrow.stream(pa.RecordBatch.from_arrays([zeros], ["id"]), self._random.choice(("zstd", "lz4")))
            case 1:
                return data + data
            case _:
                scans = self._by_type["datafusion.MemoryScanExecNode"]
                stream: bytes = self._random.choice(self._random.choice(scans).partitions or [b""])
                try:
                    with pa.ipc.open_stream(stream) as reader:
                        batch = next(iter(reader), None)
                except (pa.ArrowInvalid, OSError):
                    return stream
                if batch is None:
                    return stream
                compressed = arrow.stream(batch, self._random.choice(("zstd", "lz4")))
                return self._change_bytes(compressed) if self._random.random() < 0.5 else compressed

    def _number(self, bits: int) -> int:
        extremes = (
            (1 << bits) - 1,
            1 << (bits - 1),
            -1,
            -8,
            -(1 << bits),
            1 << 40,
            1 << 33,
            self._random.getrandbits(bits),
        )
        return self._random.choice((*_INTEGERS, *extremes))


def messages(message: Message) -> Iterator[Message]:
    """A message and all messages in it, but for those that stand in it as bytes."""
    yield message
    for field, value in message.ListFields():
        if field.message_type and not _is_map(field):
            for each in value if field.is_repeated else [value]:
                yield from messages(each)


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def _is_arrow(field: FieldDescriptor) -> bool:
    return field.full_name == _STREAM or field.full_name in _METADATA
