"""Record batches into Arrow IPC messages, with no copy of their data. Pure: no gRPC, no event loop."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

import pyarrow as pa

from worker.config import Compression
from worker.encoding.compact import compactor
from worker.encoding.compress import Compressor
from worker.encoding.dictionaries import has_dictionaries, is_same, with_dictionary
from worker.encoding.views import is_view, plain_type, without_views
from worker.errors import ExecutionFailed, ResponseTooLarge
from worker.message import FRAMING_BYTES, LENGTH, PREFIX_BYTES, Bytes, HeaderType, Message, body_length, header_type

# Larger batches are divided into messages of about this size, small ones joined up to it: 64 k rows of 8 numbers are
# two. Each costs some 0.1 ms beside its bytes, in which gRPC sends a quarter of a megabyte; parts of less than one
# megabyte made 0.65 to 0.9 of the rate (docs/performance.md).
TARGET_SIZE = 2_200_000

# Joining copies a batch once more, which costs less than a message of its own only for small ones.
SMALL_BATCH = 256 * 1024

# Encoding takes some 0.3 ms for so many bytes, looking at a column whether it is to be compacted up to 0.05 ms.
ENCODED_AT_ONCE = 5_000_000
COMPACTED_AT_ONCE = 20

# To compress so many takes some 0.8 ms. A thread takes 0.1 ms to get there and back, and both cores of a small machine
# have better things to do than to change between threads: a cluster's short queries took a fifth longer.
COMPRESSED_AT_ONCE = {"lz4": 1_000_000, "zstd": 500_000}

# For what is in a message beside the buffers that are counted: metadata and padding.
DICTIONARY_OVERHEAD = 4096


class Encoder:
    """Encodes the batches of one stream, a dictionary ahead of the first batch that needs it.

    Small batches are joined and large ones divided. Values that no row shows are left out, and a dictionary that has
    not changed is not sent again.
    """

    def __init__(
        self,
        schema: pa.Schema,
        max_message_size: int,
        *,
        compression: Compression = "none",
        expand_views: bool = False,
    ) -> None:
        """
        Args:
            schema: the schema of every batch to come.
            max_message_size: bytes that no message may go beyond, framed as ``FlightData``.
            compression: what bodies are compressed with.
            expand_views: columns of views are sent as plain ones.
        """
        self._schema = schema = plain_schema(schema) if expand_views else schema
        self._expands_views = expand_views
        self._compressor = None if compression == "none" else Compressor(compression)
        self._at_once = COMPRESSED_AT_ONCE.get(compression, ENCODED_AT_ONCE)
        self._limit = max_message_size - FRAMING_BYTES
        self._target = min(TARGET_SIZE, self._limit)
        compactors = (compactor(field.type, self._limit - DICTIONARY_OVERHEAD) for field in schema)
        self._compactors = {index: compact for index, compact in enumerate(compactors) if compact is not None}
        self._dictionaries = [index for index, field in enumerate(schema) if has_dictionaries(field.type)]
        self._float_dictionaries: dict[int, pa.Array | None] = {
            index: None for index, field in enumerate(schema) if has_dictionaries(field.type, of_floats=True)
        }
        self._sink = _Sink()
        self._writer = self._new_writer()

    def takes_long(self, batches: Sequence[pa.RecordBatch]) -> bool:
        """Whether encoding them, or the first message of them, would keep an event loop for more than a millisecond."""
        size = sum(batch.get_total_buffer_size() for batch in batches)
        return size > self._at_once or len(self._compactors) > COMPACTED_AT_ONCE

    def schema(self) -> Message:
        """The schema message, which goes before all others.

        Raises:
            ResponseTooLarge: it does not fit into a message.
        """
        message = Message(self._schema.serialize().to_pybytes()[PREFIX_BYTES:], [])
        if message.size > self._limit:
            raise ResponseTooLarge(
                f"the schema takes {message.size} bytes, and a message may have {self._limit}: raise the worker's "
                "max_message_size and your client's limit, or select less"
            )
        return message

    def encode(self, batches: Sequence[pa.RecordBatch]) -> Iterator[Message]:
        """The messages of successive batches: their rows in order, and the dictionaries that they need before them.

        Raises:
            ExecutionFailed: the columns of a batch are not of the stream's types.
            ResponseTooLarge: a single row does not fit into a message.
        """
        # One without rows shows nothing, whatever it holds.
        for batch in self._joined([batch for batch in batches if batch.num_rows]):
            yield from self._messages(self._conform(batch), self._target)

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        schema = batch.schema
        if schema.equals(self._schema):
            return batch
        columns = {}
        if self._expands_views:
            views = [index for index, field in enumerate(schema) if is_view(field.type)]
            columns = {index: without_views(batch.column(index)) for index in views}
            schema = plain_schema(schema)
        if schema.types != self._schema.types:
            raise ExecutionFailed(f"a batch has columns of {schema.types}, those before of {self._schema.types}")
        # Some operators pass on batches that differ from the plan's schema in what their fields say of nulls.
        others = [index for index, field in enumerate(self._schema) if not field.equals(schema.field(index))]
        columns |= {index: batch.column(index) for index in others if index not in columns}
        return self._with_columns(batch, columns)

    def _joined(self, batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches, neighbours that are small joined as far as the target goes."""
        group: list[pa.RecordBatch] = []
        group_size = 0
        for batch in batches:
            size = batch.get_total_buffer_size()
            alike = self._with_dictionaries_of(group[0], batch) if group else batch
            if alike is None or (group and (size > SMALL_BATCH or group_size + size > self._target)):
                yield from _concatenated(group)
                group, group_size = [], 0
            group.append(batch if alike is None else alike)
            group_size += size if size <= SMALL_BATCH else self._target
        yield from _concatenated(group)

    def _with_dictionaries_of(self, first: pa.RecordBatch, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """The batch with the very dictionaries of another; None if it has others, or nested ones, or another schema."""
        if self._dictionaries and not batch.schema.equals(first.schema):
            return None
        columns = {}
        for index in self._dictionaries:
            column, known = batch.column(index), first.column(index)
            if not pa.types.is_dictionary(column.type) or not is_same(column.dictionary, known.dictionary):
                return None
            columns[index] = with_dictionary(column, known.dictionary)
        return self._with_columns(batch, columns)

    def _messages(self, batch: pa.RecordBatch, aim: int) -> Iterator[Message]:
        """The messages of a batch, or of its parts where they would be larger than the aim."""
        batch = self._compacted(batch)
        if self._has_other_float_dictionaries(batch):
            # The writer leaves out a dictionary that is equal to the last, and 0.0 is equal to -0.0.
            self._writer = self._new_writer()
        *dictionaries, whole = self._write(batch)
        plain_size = whole.size
        if self._compressor is not None:
            dictionaries = [self._compressor.compress(dictionary) for dictionary in dictionaries]
            if plain_size <= aim or batch.num_rows == 1:
                whole = self._compressor.compress(whole)
        # A dictionary that does not fit is replaced by those of the parts, which use less of it.
        fits = all(dictionary.size <= self._limit for dictionary in dictionaries)
        if fits:
            yield from dictionaries
        else:
            # The writer takes them for sent, and would leave out what of the parts is equal.
            self._writer = self._new_writer()
        if fits and whole.size <= (aim if batch.num_rows > 1 else self._limit):
            yield whole
        elif batch.num_rows > 1:
            rows = ceil(batch.num_rows / max(2, ceil(plain_size / self._target)))
            for first in range(0, batch.num_rows, rows):
                yield from self._messages(batch.slice(first, rows), self._limit)
        else:
            raise self._too_large(batch)

    def _has_other_float_dictionaries(self, batch: pa.RecordBatch) -> bool:
        """Whether dictionaries with floats are not those of the batch before, or may not be, since they are nested."""
        has_others = False
        for index, last in self._float_dictionaries.items():
            column = batch.column(index)
            dictionary = column.dictionary if pa.types.is_dictionary(column.type) else None
            has_others |= dictionary is None or last is None or not is_same(dictionary, last)
            self._float_dictionaries[index] = dictionary
        return has_others

    def _compacted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = {}
        for index, compact in self._compactors.items():
            column = batch.column(index)
            compacted = compact(column)
            if compacted is not column:
                columns[index] = compacted
        return self._with_columns(batch, columns)

    def _with_columns(self, batch: pa.RecordBatch, columns: Mapping[int, pa.Array]) -> pa.RecordBatch:
        if not columns:
            return batch
        try:
            arrays = [columns.get(index, column) for index, column in enumerate(batch.columns)]
        except KeyError:
            # pyarrow has no class for some intervals. To set one takes as long as there are columns, so not otherwise.
            for index, column in columns.items():
                batch = batch.set_column(index, self._schema.field(index), column)
            return batch
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _new_writer(self) -> pa.ipc.RecordBatchStreamWriter:
        return pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), self._schema)

    def _write(self, batch: pa.RecordBatch) -> list[Message]:
        # Costs next to nothing, since it does not copy.
        self._writer.write_batch(batch)
        # The writer starts with the schema when the first batch comes; ``schema`` has said it already.
        return [message for message in _messages(self._sink.take()) if header_type(message.header) != HeaderType.SCHEMA]

    def _too_large(self, row: pa.RecordBatch) -> ResponseTooLarge:
        sizes = [_size(row.select([index])) for index in range(row.num_columns)]
        largest = max(sizes)
        return ResponseTooLarge(
            f"a row takes {sum(sizes)} bytes, {largest} of them in column "
            f"{self._schema.names[sizes.index(largest)]!r}, and a message may have {self._limit}: raise the worker's "
            "max_message_size and your client's limit, ask for compression, or select less"
        )


def _size(batch: pa.RecordBatch) -> int:
    """Bytes of the messages of a batch, with its dictionaries."""
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return int(sink.size())


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """A schema with plain text and bytes for columns of views, as DataFusion has it with ``expand_views_at_output``."""
    fields = [field.with_type(plain_type(field.type)) if is_view(field.type) else field for field in schema]
    return pa.schema(fields, schema.metadata)


def _concatenated(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    if len(batches) < 2:
        return batches
    try:
        return [pa.concat_batches(batches)]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        # Of other schemas, or with NaN in dictionaries, which are then not equal to themselves.
        return batches


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
