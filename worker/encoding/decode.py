"""Arrow IPC messages into record batches: the mirror of ``encode``. Pure: no gRPC, no event loop."""

from collections import deque

import pyarrow as pa

from worker.message import CONTINUATION, LENGTH, HeaderType, header_type


class Decoder:
    """Decodes the messages of one stream, in the order in which they came."""

    def __init__(self) -> None:
        self._source = _Source()
        self._reader: pa.ipc.RecordBatchStreamReader | None = None

    @property
    def schema(self) -> pa.Schema | None:
        """The stream's schema, once its message was decoded."""
        return None if self._reader is None else self._reader.schema

    def decode(self, header: bytes, body: bytes) -> pa.RecordBatch | None:
        """The batch of a message, which refers to the body's memory; None for a schema or a dictionary.

        Raises:
            pa.ArrowInvalid: the message is not one that may come here.
        """
        self._source.feed(header, body)
        kind = header_type(header)
        if self._reader is None:
            self._reader = pa.ipc.open_stream(pa.PythonFile(self._source, mode="r"))
        elif kind == HeaderType.RECORD_BATCH:
            return self._reader.read_next_batch()
        elif kind != HeaderType.DICTIONARY_BATCH:
            raise pa.ArrowInvalid(f"a message of type {kind} in the midst of a stream of record batches")
        # A dictionary stays in the source until the batch is read that comes after it.
        return None


class _Source:
    """A file that has what was fed to it, uncopied: Arrow reads it in the pieces that it was fed in."""

    closed = False

    def __init__(self) -> None:
        self._parts: deque[memoryview] = deque()

    def feed(self, header: bytes, body: bytes) -> None:
        self._parts.extend(memoryview(part) for part in (CONTINUATION, LENGTH.pack(len(header)), header, body) if part)

    def read(self, size: int) -> memoryview | bytes:
        if not self._parts:
            return b""
        part = self._parts.popleft()
        if len(part) > size:
            self._parts.appendleft(part[size:])
        return part[:size]

    def close(self) -> None: ...
