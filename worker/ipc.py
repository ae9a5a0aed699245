"""A check of Arrow IPC bytes that come from a stranger, before DataFusion reads them. Pure, and it copies nothing.

DataFusion's reader (arrow-rs 59) verifies the metadata's flatbuffers, and every array against its buffers: what is
wrong there is an error, or a panic at worst. But it believes what it is told of sizes, and a failed allocation ends the
process. So this is about sizes alone: of metadata and body, of buffers before they are compressed, of rows that no
buffer stands for, of types, and of schemas that name one part many times.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from operator import add
from struct import Struct
from typing import Any, TypeAlias

from worker.message import (
    BODY_LENGTH_SLOT,
    BYTE,
    CONTINUATION,
    HEADER_SLOT,
    HEADER_TYPE_SLOT,
    LENGTH,
    LONG,
    PREFIX_BYTES,
    ROWS_SLOT,
    HeaderType,
    field,
    number,
    root,
    target,
)

Data: TypeAlias = bytes | memoryview

# More than any table has, while DataFusion needs a few kilobytes for each.
MAX_FIELDS = 10_000

# Levels of types inside of types. The verifier of flatbuffers has a limit of this order too.
MAX_DEPTH = 32

# Bytes that one null of a type may take: 8,192 of them are made wherever a join finds no match. Vectors of some
# thousand numbers are a tenth of it.
MAX_WIDTH = 1 << 20

# Names and metadata may be counted more than once, since flatbuffers can share them, up to so many bytes or to the
# metadata's own. Writers do not share.
_SHARED_TEXT = 1 << 20

# Schemas of up to so many bytes are remembered, if they are right.
_CACHED_BYTES = 1 << 16

# A row that stands in no buffer, of nulls or of runs, is a number as soon as anything is computed for it.
_ROW_BYTES = 8
_ROWS_OF_A_BYTE = 8

# Each delta makes DataFusion copy the dictionary so far. That is given back, so there may be more of it.
_COPIES = 16

# A byte of an LZ4 block makes at most so many. What a frame may become by that is believed up to so many bytes, which
# are given back at once if they are not what the buffer says.
_LZ4_RATIO = 255
_LZ4_TRUSTED = 64 << 20
_LZ4_FRAME = Struct("<IB B")
_LZ4_MAGIC = 0x184D2204
_LZ4_BLOCK_BYTES = {4: 1 << 16, 5: 1 << 18, 6: 1 << 20, 7: 1 << 22}
_LZ4_STORED = 1 << 31

# ``CompressionType``, and the length that says that a buffer is not compressed (Arrow's ``Message.fbs``).
_LZ4 = 0
_NOT_COMPRESSED = -1

# Slots of ``RecordBatch``, ``DictionaryBatch`` and ``BodyCompression`` (``Message.fbs``).
_NODES_SLOT = 6
_BUFFERS_SLOT = 8
_COMPRESSION_SLOT = 10
_CODEC_SLOT = 4
_ID_SLOT = 4
_DATA_SLOT = 6
_IS_DELTA_SLOT = 8

# Slots of ``Schema``, ``Field`` and ``KeyValue`` (``Schema.fbs``).
_FIELDS_SLOT = 6
_SCHEMA_METADATA_SLOT = 8
_NAME_SLOT = 4
_TYPE_KIND_SLOT = 8
_TYPE_SLOT = 10
_CHILDREN_SLOT = 14
_FIELD_METADATA_SLOT = 16
_KEY_SLOT = 4
_VALUE_SLOT = 6

# Kinds of types, and slots of theirs.
_TIMESTAMP = 10
_TIMEZONE_SLOT = 6
_FIXED_SIZE_BINARY = 15
_FIXED_SIZE_LIST = 16
_SIZE_SLOT = 4

_INT = Struct("<i")


def check(data: Data, *, max_bytes: int) -> int:
    """Checks an IPC stream, as ``MemoryScan.partitions`` has them: a schema and batches; empty bytes are none.

    Args:
        data: all of it. Streams as Arrow wrote them before 0.15, without continuation markers, are refused.
        max_bytes: what everything in it may take, once it is decompressed.

    Returns:
        How many bytes that is: of all buffers, and 8 for each row beyond those that the buffers can stand for.

    Raises:
        ValueError: something is not as it should be; the text says where, and what.
    """
    size = copied = 0
    dictionaries: dict[int, int] = {}
    for index, (header, body) in enumerate(_messages(data)):
        try:
            kind = number(header, root(header), HEADER_TYPE_SLOT, BYTE)
            if (kind == HeaderType.SCHEMA) != (index == 0):
                raise ValueError("a stream is one schema, and batches after it")
            added = check_message(header, body, max_bytes=max_bytes - size)
            size += added
            if kind == HeaderType.DICTIONARY_BATCH:
                id_, is_delta = _dictionary(header)
                dictionaries[id_] = added + (dictionaries.get(id_, 0) if is_delta else 0)
                copied += dictionaries[id_] if is_delta else 0
                if copied > _COPIES * max_bytes:
                    raise ValueError(f"its deltas copy {copied} bytes, {_COPIES} times {max_bytes} are allowed")
        except (struct.error, IndexError) as error:
            raise ValueError(f"message {index} has metadata that is no flatbuffer: {error}") from error
        except ValueError as error:
            raise ValueError(f"message {index}: {error}") from None
    return size


def check_nested(value: Any, *, max_bytes: int) -> int:
    """Checks the IPC of a literal, a ``datafusion_common.ScalarNestedValue``: one row, and dictionaries.

    Its types are in the protobuf beside it, and not looked at.

    Returns, raises:
        As ``check``.
    """
    size = 0
    for part in (value, *value.dictionaries):
        size += check_message(part.ipc_message, part.arrow_data, max_bytes=max_bytes - size)
    return size


def check_message(header: bytes, body: Data, *, max_bytes: int) -> int:
    """Checks one message, as Flight carries it. Takes 4 to 10 µs for a batch of some ten columns.

    Args:
        header: the metadata, without continuation marker and length.
        body: all of the body.
        max_bytes: what it may take, once it is decompressed.

    Returns, raises:
        As ``check``.
    """
    try:
        table = root(header)
        pointer = field(header, table, HEADER_SLOT)
        kind = number(header, table, HEADER_TYPE_SLOT, BYTE)
        if not pointer:
            raise ValueError("it has no header")
        content = target(header, pointer)
        if kind == HeaderType.SCHEMA:
            # Partitions have the same schema, mostly, and the streams of a query.
            (_check_cached if len(header) <= _CACHED_BYTES else _check_schema)(header, content)
            return 0
        if kind == HeaderType.DICTIONARY_BATCH:
            pointer = field(header, content, _DATA_SLOT)
            if not pointer:
                raise ValueError("it is a dictionary without values")
            content = target(header, pointer)
        elif kind != HeaderType.RECORD_BATCH:
            raise ValueError(f"it is of type {kind}: schemas, dictionaries and record batches are known")
        size = _batch_bytes(header, content, body)
    except (struct.error, IndexError) as error:
        raise ValueError(f"its metadata is no flatbuffer: {error}") from error
    if size > max_bytes:
        raise ValueError(f"it takes {size} bytes, {max_bytes} are left")
    return size


def _messages(data: Data) -> Iterator[tuple[bytes, memoryview]]:
    """The metadata and the body of each message of a stream."""
    view = memoryview(data)
    place, index = 0, 0
    while place < len(view):
        if view[place : place + len(CONTINUATION)] != CONTINUATION or place + PREFIX_BYTES > len(view):
            raise ValueError(f"message {index} does not begin with a continuation marker and a length")
        (size,) = LENGTH.unpack_from(view, place + len(CONTINUATION))
        place += PREFIX_BYTES
        if not size:
            if place != len(view):
                raise ValueError(f"{len(view) - place} bytes follow the end of the stream")
            return
        if size > len(view) - place:
            raise ValueError(f"message {index} says {size} bytes of metadata, {len(view) - place} are left")
        header = bytes(view[place : place + size])
        place += size
        try:
            body_size = number(header, root(header), BODY_LENGTH_SLOT, LONG)
        except struct.error as error:
            raise ValueError(f"message {index} has metadata that is no flatbuffer: {error}") from error
        if not 0 <= body_size <= len(view) - place:
            raise ValueError(f"message {index} says {body_size} bytes of body, {len(view) - place} are left")
        yield header, view[place : place + body_size]
        place += body_size
        index += 1


def _dictionary(header: bytes) -> tuple[int, bool]:
    batch = target(header, field(header, root(header), HEADER_SLOT))
    return number(header, batch, _ID_SLOT, LONG), bool(number(header, batch, _IS_DELTA_SLOT, BYTE))


def _batch_bytes(header: bytes, batch: int, body: Data) -> int:
    """The bytes of a ``RecordBatch``."""
    buffers = _pairs(header, batch, _BUFFERS_SLOT)
    offsets, lengths = buffers[::2], buffers[1::2]
    if buffers and (min(buffers) < 0 or max(map(add, offsets, lengths)) > len(body)):
        raise ValueError(f"it has a buffer outside of its body of {len(body)} bytes")
    compression = field(header, batch, _COMPRESSION_SLOT)
    if compression:
        codec = number(header, target(header, compression), _CODEC_SLOT, BYTE)
        size = sum(
            _plain_bytes(body, offset, length, codec) for offset, length in zip(offsets, lengths, strict=True) if length
        )
    else:
        size = sum(lengths)
    nodes = _pairs(header, batch, _NODES_SLOT)
    rows = number(header, batch, ROWS_SLOT, LONG)
    if rows < 0 or (nodes and min(nodes) < 0):
        raise ValueError("it has fewer rows than none")
    backed = _ROWS_OF_A_BYTE * size
    if rows > backed or (nodes and max(nodes) > backed):
        return size + _ROW_BYTES * sum(max(0, count - backed) for count in (rows, *nodes[::2]))
    return size


def _pairs(header: bytes, table: int, slot: int) -> tuple[int, ...]:
    """The numbers of a vector of ``FieldNode`` or ``Buffer``, each of which has two."""
    place = field(header, table, slot)
    if not place:
        return ()
    start = target(header, place)
    (count,) = LENGTH.unpack_from(header, start)
    if LENGTH.size + count * 2 * LONG.size > len(header) - start:
        raise ValueError(f"it says {count} nodes or buffers, more than its metadata holds")
    return struct.unpack_from(f"<{2 * count}q", header, start + LENGTH.size)


def _plain_bytes(body: Data, offset: int, length: int, codec: int) -> int:
    """The bytes that a buffer has once it is decompressed."""
    if length < LONG.size:
        raise ValueError(f"it has a compressed buffer of {length} bytes, which are no length")
    plain: int = LONG.unpack_from(body, offset)[0]
    if plain == _NOT_COMPRESSED:
        return length - LONG.size
    if plain < 0:
        raise ValueError(f"it has a compressed buffer that says {plain} bytes")
    # DataFusion's zstd writes no more than that, its lz4 goes on to the end before it compares.
    if plain and codec == _LZ4 and _LZ4_RATIO * length > _LZ4_TRUSTED:
        return max(plain, _lz4_bytes(body[offset + LONG.size : offset + length]))
    return plain


def _lz4_bytes(frame: Data) -> int:
    """The most that an LZ4 frame can become, by its blocks."""
    try:
        magic, flags, sizes = _LZ4_FRAME.unpack_from(frame, 0)
        block_bytes = _LZ4_BLOCK_BYTES.get(sizes >> 4 & 7)
        if magic != _LZ4_MAGIC or block_bytes is None:
            raise ValueError("it has a compressed buffer that is no LZ4 frame")
        # What follows are the content's size, a dictionary's id, and a byte of checksum.
        place = _LZ4_FRAME.size + (8 if flags & 8 else 0) + (4 if flags & 1 else 0) + 1
        checksum = 4 if flags & 16 else 0
        most = 0
        while size := LENGTH.unpack_from(frame, place)[0]:
            stored = size & ~_LZ4_STORED
            most += stored if size & _LZ4_STORED else min(block_bytes, _LZ4_RATIO * stored)
            place += LENGTH.size + stored + checksum
    except struct.error as error:
        raise ValueError("it has a compressed buffer whose LZ4 frame has no end") from error
    return most


class _Schema:
    """A walk through a schema, as DataFusion makes fields of it."""

    def __init__(self, header: bytes) -> None:
        self._header = header
        self._fields = MAX_FIELDS
        self._text = max(_SHARED_TEXT, len(header))

    def check(self, schema: int) -> None:
        """Raises ValueError as ``check``."""
        self._metadata(schema, _SCHEMA_METADATA_SLOT)
        self._check_fields(self._tables(schema, _FIELDS_SLOT), 1)

    def _check_fields(self, tables: Iterator[int], depth: int) -> int:
        """Returns the bytes of a null of each."""
        if depth > MAX_DEPTH:
            raise ValueError(f"its types are nested more than {MAX_DEPTH} deep")
        return sum(self._check_field(table, depth) for table in tables)

    def _check_field(self, table: int, depth: int) -> int:
        header = self._header
        self._fields -= 1
        if self._fields < 0:
            raise ValueError(f"its schema has more than {MAX_FIELDS} fields")
        name = self._string(table, _NAME_SLOT)
        self._metadata(table, _FIELD_METADATA_SLOT)
        width = self._check_fields(self._tables(table, _CHILDREN_SLOT), depth + 1) or _ROW_BYTES
        kind = number(header, table, _TYPE_KIND_SLOT, BYTE)
        pointer = field(header, table, _TYPE_SLOT)
        if kind in (_FIXED_SIZE_BINARY, _FIXED_SIZE_LIST) and pointer:
            size = number(header, target(header, pointer), _SIZE_SLOT, _INT)
            if size < 0:
                raise ValueError(f"column {name!r} is of a type of {size} bytes or elements")
            width = size if kind == _FIXED_SIZE_BINARY else size * width
        elif kind == _TIMESTAMP and pointer:
            self._string(target(header, pointer), _TIMEZONE_SLOT)
        if width > MAX_WIDTH:
            raise ValueError(f"column {name!r} is of a type of {width} bytes a row, {MAX_WIDTH} are allowed")
        return width

    def _tables(self, table: int, slot: int) -> Iterator[int]:
        """Where the tables of a vector are."""
        place = field(self._header, table, slot)
        if place:
            start = target(self._header, place)
            (count,) = LENGTH.unpack_from(self._header, start)
            for index in range(count):
                yield target(self._header, start + LENGTH.size + index * LENGTH.size)

    def _string(self, table: int, slot: int) -> str:
        """A name, in which a NUL would end the process where it becomes one of C."""
        start, size = self._text_place(table, slot)
        text = self._header[start : start + size]
        if b"\0" in text:
            raise ValueError(f"a name in its schema has a NUL: {text[:100]!r}")
        return text.decode(errors="replace")

    def _metadata(self, table: int, slot: int) -> None:
        for entry in self._tables(table, slot):
            self._text_place(entry, _KEY_SLOT)
            self._text_place(entry, _VALUE_SLOT)

    def _text_place(self, table: int, slot: int) -> tuple[int, int]:
        """Where a text is, and how long, and counts it."""
        place = field(self._header, table, slot)
        if not place:
            return 0, 0
        start = target(self._header, place)
        (size,) = LENGTH.unpack_from(self._header, start)
        self._text -= LENGTH.size + size
        if self._text < 0:
            raise ValueError("its schema repeats texts again and again")
        return start + LENGTH.size, size


def _check_schema(header: bytes, schema: int) -> None:
    _Schema(header).check(schema)


_check_cached = lru_cache(maxsize=256)(_check_schema)
