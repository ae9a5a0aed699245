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

# Flatbuffers: the root's offset; from the root back to its vtable; in that, two sizes, then a slot for every field.
_OFFSET = Struct("<I")
_BACK_OFFSET = Struct("<i")
_SLOT = Struct("<H")
_HEADER_TYPE_SLOT = 6
_BODY_LENGTH_SLOT = 10
_BODY_LENGTH = Struct("<q")


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
    return header[_slot(header, _HEADER_TYPE_SLOT)]


def body_length(header: bytes) -> int:
    """How many bytes the body has, by the metadata."""
    place = _slot(header, _BODY_LENGTH_SLOT)
    if not place:
        return 0
    length: int = _BODY_LENGTH.unpack_from(header, place)[0]
    return length


def _slot(header: bytes, slot: int) -> int:
    """Where a field of the root table is, 0 when it is not there."""
    (table,) = _OFFSET.unpack_from(header)
    (back,) = _BACK_OFFSET.unpack_from(header, table)
    vtable = table - back
    (vtable_size,) = _SLOT.unpack_from(header, vtable)
    if slot >= vtable_size:
        return 0
    (offset,) = _SLOT.unpack_from(header, vtable + slot)
    return table + offset if offset else 0
