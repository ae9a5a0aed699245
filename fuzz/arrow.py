"""Arrow IPC that lies: where in a stream its numbers are, so that others can take their place.

The format is that of https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc;
slots of tables are numbered in the order of the fields in ``Message.fbs``.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CONTINUATION = b"\xff\xff\xff\xff"

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3
_LENGTH, _NODES, _BUFFERS = 0, 1, 2
_DICTIONARY_DATA = 1


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where in bytes the numbers of a record batch or dictionary are; all of 64 bits if not told."""

    framing: int | None
    """The length of the metadata, of 32 bits; None where the metadata stands alone."""
    body_length: int | None
    """None where it is the default, and not written."""
    length: int | None
    nodes: tuple[int, ...]
    """Length and number of nulls of each field, in turn."""
    buffers: tuple[int, ...]
    """Offset and length of each buffer, in turn."""
    body: int
    """Where the body begins."""
    size: int
    """How long the body is."""


def stream(batch: pa.RecordBatch, compression: str | None = None) -> bytes:
    """A stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Where the metadata and the body of each message of a stream begin and end, as far as it makes sense."""
    at = 0
    while data[at : at + 4] == CONTINUATION and at + 8 <= len(data):
        (size,) = struct.unpack_from("<i", data, at + 4)
        start, end = at + 8, at + 8 + size
        if size <= 0 or end > len(data):
            return
        position = _slot(data, start, _table(data, start), _BODY_LENGTH)
        body = struct.unpack_from("<q", data, position)[0] if position else 0
        yield start, end, end, end + body
        at = end + body


def batches(data: bytes) -> Iterator[Numbers]:
    """The batches and dictionaries of a stream.

    Raises:
        struct.error: the metadata is none.
    """
    for start, end, body, body_end in messages(data):
        if numbers := _numbers(data, start, end, body, body_end - body, start - 4):
            yield numbers


def metadata_numbers(data: bytes) -> Numbers | None:
    """Those of a message's metadata alone, None if it is no batch; an ``ipc_message`` of a literal is one.

    Raises:
        struct.error: the metadata is none.
    """
    start = 8 if data[:4] == CONTINUATION else 0
    return _numbers(data, start, len(data), len(data), 0, None)


def put(data: bytes, at: int, value: int, width: int = 8) -> bytes:
    """The bytes with another number at a place; what does not fit is cut off."""
    number = (value & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
    return data[:at] + number + data[at + width :]


def _numbers(data: bytes, start: int, end: int, body: int, size: int, framing: int | None) -> Numbers | None:
    message = _table(data, start)
    kind = data[_required(_slot(data, start, message, _HEADER_TYPE))]
    header = _indirect(data, _required(_slot(data, start, message, _HEADER)))
    if kind == _DICTIONARY:
        header = _indirect(data, _required(_slot(data, start, header, _DICTIONARY_DATA)))
    elif kind != _BATCH:
        return None
    return Numbers(
        framing,
        _slot(data, start, message, _BODY_LENGTH),
        _slot(data, start, header, _LENGTH),
        _pairs(data, _slot(data, start, header, _NODES)),
        _pairs(data, _slot(data, start, header, _BUFFERS)),
        body,
        size,
    )


def _pairs(data: bytes, vector: int | None) -> tuple[int, ...]:
    if vector is None:
        return ()
    at = _indirect(data, vector)
    (count,) = struct.unpack_from("<I", data, at)
    if at + 4 + 16 * count > len(data):
        raise struct.error("a vector is longer than what there is")
    return tuple(at + 4 + 8 * each for each in range(2 * count))


def _table(data: bytes, start: int) -> int:
    return _indirect(data, start)


def _indirect(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _slot(data: bytes, start: int, table: int, number: int) -> int | None:
    """Where a field of a table is; None if it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < start:
        raise struct.error("a table's description is outside of the message")
    size, _ = struct.unpack_from("<HH", data, vtable)
    if 4 + 2 * number + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else None


def _required(position: Any) -> int:
    if position is None:
        raise struct.error("a field is missing")
    return int(position)
