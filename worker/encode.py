"""Record batches into Arrow IPC messages, with no copy of their data. Pure: no gRPC, no event loop."""

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, TypeAlias

import pyarrow as pa

from worker.errors import ExecutionFailed

Bytes: TypeAlias = bytes | pa.Buffer

# Encapsulated messages (Arrow's "IPC Streaming Format"): a continuation marker and the metadata's length, four bytes
# each, the metadata, which is a flatbuffer ``Message``, and the body.
_PREFIX_BYTES = 8
_LENGTH = Struct("<I")
# Flatbuffers: the root's offset; from the root back to its vtable; in that, two sizes, then a slot for every field.
_OFFSET = Struct("<I")
_BACK_OFFSET = Struct("<i")
_SLOT = Struct("<H")
_HEADER_TYPE_SLOT = 6
_BODY_LENGTH_SLOT = 10
_BODY_LENGTH = Struct("<q")
_SCHEMA_HEADER = 1


class Message(NamedTuple):
    """An IPC message: ``FlightData.data_header``, and the parts that make up ``FlightData.data_body``."""

    header: bytes
    """The flatbuffer ``Message``, without continuation marker and length."""
    body: list[Bytes]
    """Buffers of the batch itself, and padding; to be joined before the batch is let go."""


class Encoder:
    """Encodes the batches of one stream, a dictionary ahead of the first batch that needs it.

    The first messages are those of the schema. A dictionary that has not changed since is not sent again.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """
        Args:
            schema: the schema of every batch to come.
        """
        self._schema = schema
        self._sink = _Sink()
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), schema)

    def schema(self) -> Message:
        """The schema message, which goes before all others."""
        return Message(self._schema.serialize().to_pybytes()[_PREFIX_BYTES:], [])

    def encode(self, batch: pa.RecordBatch) -> list[Message]:
        """The messages of one batch: the dictionaries that it needs, if any, and the batch, last.

        Raises:
            ExecutionFailed: its columns are not of the stream's types.
        """
        if not batch.schema.equals(self._schema):
            batch = self._conform(batch)
        self._writer.write_batch(batch)
        # The writer starts with the schema when the first batch comes; ``schema`` has said it already.
        return [message for message in _messages(self._sink.take()) if _header_type(message.header) != _SCHEMA_HEADER]

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        # Some operators pass on batches that differ from the plan's schema in what their fields say of nulls.
        if batch.schema.types != self._schema.types:
            raise ExecutionFailed(f"a batch has columns of {batch.schema.types}, those before of {self._schema.types}")
        return pa.RecordBatch.from_arrays(batch.columns, schema=self._schema)


class _Sink:
    """A file that keeps what is written to it: metadata as ``bytes``, a batch's buffers as they are, uncopied."""

    closed = False

    def __init__(self) -> None:
        self._written: list[Bytes] = []

    def write(self, data: Bytes) -> int:
        size = len(data)
        if size:
            self._written.append(data)
        return size

    def take(self) -> list[Bytes]:
        """What was written since the last time."""
        written, self._written = self._written, []
        return written

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _messages(written: list[Bytes]) -> Iterator[Message]:
    parts = iter(written)
    for _continuation in parts:
        (length,) = _LENGTH.unpack(next(parts))
        header = b"".join(_take(parts, length))
        yield Message(header, _take(parts, _body_length(header)))


def _take(parts: Iterator[Bytes], size: int) -> list[Bytes]:
    taken = []
    while size > 0:
        part = next(parts)
        taken.append(part)
        size -= len(part)
    return taken


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


def _header_type(header: bytes) -> int:
    return header[_slot(header, _HEADER_TYPE_SLOT)]


def _body_length(header: bytes) -> int:
    place = _slot(header, _BODY_LENGTH_SLOT)
    if not place:
        return 0
    length: int = _BODY_LENGTH.unpack_from(header, place)[0]
    return length
