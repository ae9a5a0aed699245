"""IPC messages with their bodies compressed, as in "Compression" of Arrow's ``Columnar.rst``. Pure, for any thread."""

from collections.abc import Iterator
from itertools import accumulate
from struct import Struct
from typing import Literal, TypeAlias

import pyarrow as pa

from worker.message import (
    BODY_LENGTH_SLOT,
    HEADER_SLOT,
    LENGTH,
    LONG,
    OFFSET,
    ROWS_SLOT,
    Bytes,
    HeaderType,
    Message,
    body_length,
    field,
    header_type,
    number,
    root,
    target,
)

Codec: TypeAlias = Literal["lz4", "zstd"]

# ``CompressionType`` in Arrow's ``Message.fbs``: LZ4_FRAME and ZSTD.
_CODEC_NUMBERS: dict[Codec, int] = {"lz4": 0, "zstd": 1}

# Each buffer is behind its length before it was compressed, or behind this.
_NOT_COMPRESSED = LONG.pack(-1)

# Buffers begin at multiples of this, so that to shrink by less saves nothing.
_ALIGNMENT = 8

# A frame has up to 25 bytes of its own, and compressing takes 1 µs (lz4) or 10 µs (zstd) however little it is.
_TOO_SMALL = 64


class Compressor:
    """Compresses the bodies of messages; it keeps nothing from one to the next."""

    def __init__(self, codec: Codec) -> None:
        """
        Args:
            codec: lz4 in its frame format, or zstd, at the level that Arrow takes by default.
        """
        self._codec = pa.Codec(codec)
        self._number = _CODEC_NUMBERS[codec]

    def compress(self, message: Message) -> Message:
        """The message, every buffer compressed that gets smaller; as it is if all of it would not get smaller.

        The GIL is held between buffers, not while one is compressed.

        Args:
            message: a record or dictionary batch as pyarrow writes it, uncompressed: each buffer is a part of the body.
        """
        header, parts = message
        places = dict(zip(accumulate(map(len, parts), initial=0), parts, strict=False))
        body: list[Bytes] = []
        buffers = []
        end = 0
        for offset, length in _buffers(header):
            size = padding = 0
            if length:
                prefix, data = self._stored(places[offset])
                size = len(prefix) + len(data)
                padding = -size % _ALIGNMENT
                body += (prefix, data, bytes(padding))
            buffers.append((end, size))
            end += size + padding
        if end < body_length(header):
            compressed = Message(_header(header, self._number, buffers, end), body)
            if compressed.size < message.size:
                return compressed
        return message

    def _stored(self, plain: Bytes) -> tuple[Bytes, Bytes]:
        if len(plain) >= _TOO_SMALL:
            compressed = self._codec.compress(plain)
            if len(compressed) <= len(plain) - _ALIGNMENT:
                return LONG.pack(len(plain)), compressed
        return _NOT_COMPRESSED, plain


# Slots of ``RecordBatch`` and ``DictionaryBatch``, and what is in their vectors.
_NODES_SLOT = 6
_BUFFERS_SLOT = 8
_VARIADIC_COUNTS_SLOT = 12
_DATA_SLOT = 6
_NODE = Struct("<qq")
_BUFFER = Struct("<qq")
_VARIADIC_COUNT = LONG

# A ``RecordBatch`` and a ``BodyCompression``, each a vtable (its size, the table's, where in that the fields are) and a
# table (the way back to the vtable, the fields), as they go between two vectors: those are a length of 4 bytes, and
# what has to be at a multiple of 8, as the fields of 64 bits have to.
_TABLES = Struct("<7H2x iqIIII 4H iBB6x")
_GAP = bytes(4)


def _batch_pointer(header: bytes) -> int:
    """Where the offset is that leads to the ``RecordBatch``."""
    pointer = field(header, root(header), HEADER_SLOT)
    if header_type(header) == HeaderType.DICTIONARY_BATCH:
        pointer = field(header, target(header, pointer), _DATA_SLOT)
    return pointer


def _vector(header: bytes, batch: int, slot: int, item: Struct) -> bytes:
    """A vector of the ``RecordBatch`` behind its length, nothing at all when it is not there."""
    place = field(header, batch, slot)
    if not place:
        return b""
    start = target(header, place)
    (length,) = LENGTH.unpack_from(header, start)
    return header[start : start + LENGTH.size + length * item.size]


def _buffers(header: bytes) -> Iterator[tuple[int, int]]:
    """Where in the body the buffers are, and how long."""
    batch = target(header, _batch_pointer(header))
    return _BUFFER.iter_unpack(_vector(header, batch, _BUFFERS_SLOT, _BUFFER)[LENGTH.size :])


def _header(plain: bytes, codec: int, buffers: list[tuple[int, int]], body_size: int) -> bytes:
    """The metadata with these buffers instead, and a ``BodyCompression``.

    A table has no room for another field, so the ``RecordBatch`` is written anew. Offsets only lead forward: it goes
    where the vectors began, which pyarrow writes after all tables, and new vectors after it.
    """
    pointer = _batch_pointer(plain)
    batch = target(plain, pointer)
    nodes = _vector(plain, batch, _NODES_SLOT, _NODE)
    new_buffers = LENGTH.pack(len(buffers)) + b"".join(_BUFFER.pack(*buffer) for buffer in buffers)
    counts = _vector(plain, batch, _VARIADIC_COUNTS_SLOT, _VARIADIC_COUNT)

    places = (field(plain, batch, slot) for slot in (_NODES_SLOT, _BUFFERS_SLOT, _VARIADIC_COUNTS_SLOT))
    start = min(target(plain, place) for place in places if place)
    tables = bytearray(plain[:start])
    LONG.pack_into(tables, field(plain, root(plain), BODY_LENGTH_SLOT), body_size)
    OFFSET.pack_into(tables, pointer, start + 16 - pointer)
    # The offsets are from the fields at 28, 32, 36 and 40, to the table at 52 and the vectors from 64 on.
    tables += _TABLES.pack(
        *(14, 28, 4, 12, 16, 20, 24 if counts else 0),
        *(16, number(plain, batch, ROWS_SLOT, LONG)),
        64 - 28,
        64 - 32 + len(nodes) + len(_GAP),
        52 - 36,
        64 - 40 + len(nodes) + len(_GAP) + len(new_buffers) + len(_GAP),
        *(8, 6, 4, 5),
        *(8, codec, 0),
    )
    return bytes(tables) + _GAP.join(filter(None, (nodes, new_buffers, counts)))
