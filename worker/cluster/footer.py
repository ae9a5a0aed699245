"""The footer of an Arrow IPC file, around the schema's message as it came. Pure: bytes to bytes.

A flatbuffer ``Footer`` (Arrow's ``File.fbs``). Its ``Schema`` is that inside of the message, whose own offsets are from
where they stand, so that they stay right wherever the message is put.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from worker.message import HEADER_SLOT, OFFSET, field, root, target


class Block(NamedTuple):
    """Where a message is in the file, in bytes; ``Block`` in Arrow's ``File.fbs``."""

    offset: int
    metadata_size: int
    """Of continuation marker, length, metadata and padding."""
    body_size: int


# The root's offset; its vtable: its size, the table's, where in that the fields are; the table: the way back to the
# vtable, the offsets of schema, dictionaries and record batches, the version, which is V5.
_ROOT = Struct("<I 6H iIIIh6x")
_TABLE, _SCHEMA, _DICTIONARIES, _BATCHES, _VERSION = 16, 20, 24, 28, 32
_V5 = 4

# A vector's length, where its blocks are at a multiple of 8.
_LENGTH = Struct("<4xI")
_BLOCK = Struct("<qi4xq")


def footer(schema: bytes, dictionaries: Sequence[Block], batches: Sequence[Block]) -> bytes:
    """The footer of a file with such messages, to be at a multiple of 8 bytes in it.

    Args:
        schema: the schema message's metadata, without continuation marker and length.
        dictionaries: where the dictionary batches are, in the order in which they are to be read.
        batches: where the record batches are, likewise.
    """
    message = schema + bytes(-len(schema) % 8)
    first = _vector(dictionaries)
    table = _ROOT.size + target(schema, field(schema, root(schema), HEADER_SLOT))
    vectors = _ROOT.size + len(message) + _LENGTH.size - OFFSET.size
    places = (_VERSION, _SCHEMA, _DICTIONARIES, _BATCHES)
    head = _ROOT.pack(
        _TABLE,
        *(12, 18, *(place - _TABLE for place in places)),
        _TABLE - OFFSET.size,
        table - _SCHEMA,
        vectors - _DICTIONARIES,
        vectors + len(first) - _BATCHES,
        _V5,
    )
    return head + message + first + _vector(batches)


def _vector(blocks: Sequence[Block]) -> bytes:
    return _LENGTH.pack(len(blocks)) + b"".join(_BLOCK.pack(*block) for block in blocks)
