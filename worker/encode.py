"""Record batches into Arrow IPC messages, with no copy of their data. Pure: no gRPC, no event loop."""

from collections.abc import Iterator

import pyarrow as pa

from worker.errors import ExecutionFailed
from worker.message import LENGTH, PREFIX_BYTES, Bytes, HeaderType, Message, body_length, header_type


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
            ExecutionFailed: its columns are not of the stream's types.
        """
        if not batch.schema.equals(self._schema):
            batch = self._conform(batch)
        self._writer.write_batch(batch)
        # The writer starts with the schema when the first batch comes; ``schema`` has said it already.
        return [message for message in _messages(self._sink.take()) if header_type(message.header) != HeaderType.SCHEMA]

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
