"""Arrow IPC messages, as Flight carries them: metadata and body apart."""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple, TypeAlias

import pyarrow as pa

Bytes: TypeAlias = bytes | pa.Buffer

# Encapsulated messages (Arrow's "IPC Streaming Format"): a continuation marker and the metadata's length, four bytes
# each, the metadata, which is a flatbuffer ``Message``, and the body. Flight leaves the first two out.
CONTINUATION = b"\xff\xff\xff\xff"
LENGTH = Struct("<I")
PREFIX_BYTES = len(CONTINUATION) + LENGTH.size

# The most that a ``FlightData`` has beside metadata and body: two field tags, of one and two bytes, and two lengths.
FRAMING_BYTES = 13

# Flatbuffers: the root's offset; from a table back to its vtable; in that, two sizes, then a slot for every field.
OFFSET = Struct("<I")
_BACK_OFFSET = Struct("<i")
_SLOT = Struct("<H")

BYTE = Struct("<B")
LONG = Struct("<q")

# Slots of ``Message``, the root.
HEADER_TYPE_SLOT = 6
HEADER_SLOT = 8
BODY_LENGTH_SLOT = 10

# The first slot of ``RecordBatch``.
ROWS_SLOT = 4


class HeaderType(IntEnum):
    """What a message is (``MessageHeader`` in Arrow's ``Message.fbs``)."""

    SCHEMA = 1
    DICTIONARY_BATCH = 2
    RECORD_BATCH = 3


class Message(NamedTuple):
    """An IPC message: ``FlightData.data_header``, and the parts that make up ``FlightData.data_body``."""

    header: bytes
    """The flatbuffer ``Message``, without continuation marker and length."""
    body: list[Bytes]
    """Buffers of the batch itself, and padding; to be joined before the batch is let go."""

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.header) + sum(map(len, self.body))


def header_type(header: bytes) -> int:
    """Which ``HeaderType`` a message has, by its metadata; other numbers are of kinds that Flight does not carry."""
    return number(header, root(header), HEADER_TYPE_SLOT, BYTE)


def body_length(header: bytes) -> int:
    """How many bytes the body has, by the metadata."""
    return number(header, root(header), BODY_LENGTH_SLOT, LONG)


def row_count(header: bytes) -> int:
    """How many rows a record batch has, by the metadata; 0 for messages of other types."""
    if header_type(header) != HeaderType.RECORD_BATCH:
        return 0
    return number(header, target(header, field(header, root(header), HEADER_SLOT)), ROWS_SLOT, LONG)


def root(flatbuffer: bytes) -> int:
    """Where the root table is."""
    return target(flatbuffer, 0)


def target(flatbuffer: bytes, place: int) -> int:
    """Where the table or the vector is that the offset at a place leads to."""
    (offset,) = OFFSET.unpack_from(flatbuffer, place)
    return place + int(offset)


def number(flatbuffer: bytes, table: int, slot: int, kind: Struct) -> int:
    """The number in a field of a table, 0 when it is not there."""
    place = field(flatbuffer, table, slot)
    return int(kind.unpack_from(flatbuffer, place)[0]) if place else 0


def field(flatbuffer: bytes, table: int, slot: int) -> int:
    """Where a field of a table is, 0 when it is not there."""
    (back,) = _BACK_OFFSET.unpack_from(flatbuffer, table)
    vtable = table - back
    (vtable_size,) = _SLOT.unpack_from(flatbuffer, vtable)
    if slot >= vtable_size:
        return 0
    (offset,) = _SLOT.unpack_from(flatbuffer, vtable + slot)
    return table + offset if offset else 0
