"""Record batches into Arrow IPC messages, with no copy of their data. Pure: no gRPC, no event loop."""

from collections.abc import Iterator

import pyarrow as pa

from worker.errors import ExecutionFailed
from worker.message import LENGTH, PREFIX_BYTES, Bytes, HeaderType, Message, body_length, header_type

# Halved beyond this: clients of gRPC refuse messages over 4 MiB unless told otherwise, and what is sent at once keeps
# the event loop busy. Much less would be slower, since each write waits for gRPC's threads.
LARGE_MESSAGE = 3 << 20

# Protobuf's limit for a message, less what else is in a ``FlightData``.
LARGEST_MESSAGE = (2 << 30) - (1 << 20)

# Halves that together are so much larger than the whole share what cannot be divided, such as views in lists.
SHARED_BY_HALVES = 1.5

# A view is a length and 12 bytes, of the value if it fits there, or else of where in the data it is.
VIEW_INT32S = 4
INLINE_BYTES = 12

# With less data than so many bytes a row, there is not much that could be left out.
VIEW_DATA_PER_ROW = 32

# Compacting copies what is seen: worth it when at least as much is not.
UNSEEN_PER_SEEN = 2


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
        return Message(self._schema.serialize().to_pybytes()[PREFIX_BYTES:], [])

    def encode(self, batch: pa.RecordBatch) -> list[Message]:
        """The messages of one batch: the dictionaries that it needs, if any, and the batch, last.

        Raises:
            ExecutionFailed: its columns are not of the stream's types, or a row or a dictionary is larger than gRPC can
                carry.
        """
        if not batch.schema.equals(self._schema):
            batch = self._conform(batch)
        batch = _without_unseen_data(batch)
        messages = self._divided(batch, self._write(batch))
        for message in messages:
            if message.size > LARGEST_MESSAGE:
                kind = HeaderType(header_type(message.header)).name.lower().replace("_", " ")
                raise ExecutionFailed(f"a {kind} is a message of {message.size} bytes, gRPC carries {LARGEST_MESSAGE}")
        return messages

    def _write(self, batch: pa.RecordBatch) -> list[Message]:
        self._writer.write_batch(batch)
        # The writer starts with the schema when the first batch comes; ``schema`` has said it already.
        return [message for message in _messages(self._sink.take()) if header_type(message.header) != HeaderType.SCHEMA]

    def _divided(self, batch: pa.RecordBatch, messages: list[Message]) -> list[Message]:
        """The messages of a batch that was written, those of its halves instead where it is too large."""
        *dictionaries, whole = messages
        size = whole.size
        if size > LARGE_MESSAGE and batch.num_rows > 1:
            middle = batch.num_rows // 2
            halves = [_without_unseen_data(half) for half in (batch.slice(0, middle), batch.slice(middle))]
            # Writing costs next to nothing, since it does not copy, and slices have the dictionaries of their batch.
            written = [self._write(half) for half in halves]
            if sum(half[-1].size for half in written) < SHARED_BY_HALVES * size:
                first, second = (self._divided(half, done) for half, done in zip(halves, written, strict=True))
                return [*dictionaries, *first, *second]
        return messages

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        # Some operators pass on batches that differ from the plan's schema in what their fields say of nulls.
        if batch.schema.types != self._schema.types:
            raise ExecutionFailed(f"a batch has columns of {batch.schema.types}, those before of {self._schema.types}")
        return pa.RecordBatch.from_arrays(batch.columns, schema=self._schema)


def _without_unseen_data(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, views compacted whose buffers hold much that the batch does not show.

    Views that were sorted, joined or filtered by DataFusion share the buffers of all that they were taken from: a sort
    of 26 MB of strings would send 4.7 GB.
    """
    for index, field in enumerate(batch.schema):
        if pa.types.is_string_view(field.type):
            plain_type = pa.large_string()
        elif pa.types.is_binary_view(field.type):
            plain_type = pa.large_binary()
        else:
            continue
        column = batch.column(index)
        data = sum(buffer.size for buffer in column.buffers()[2:])
        if data > VIEW_DATA_PER_ROW * len(column) and data >= UNSEEN_PER_SEEN * _seen(column):
            batch = batch.set_column(index, field, column.cast(plain_type).cast(field.type))
    return batch


def _seen(column: pa.Array) -> int:
    """How many bytes of data the views of a column show, those that several show counted for each."""
    start, stop = VIEW_INT32S * column.offset, VIEW_INT32S * (column.offset + len(column))
    lengths = memoryview(column.buffers()[1]).cast("i")[start:stop:VIEW_INT32S]
    return sum(length for length in lengths.tolist() if length > INLINE_BYTES)


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
        (length,) = LENGTH.unpack(next(parts))
        header = b"".join(_take(parts, length))
        yield Message(header, _take(parts, body_length(header)))


def _take(parts: Iterator[Bytes], size: int) -> list[Bytes]:
    taken = []
    while size > 0:
        part = next(parts)
        taken.append(part)
        size -= len(part)
    return taken
