"""The end of an Arrow IPC file, made of the schema message of a stream, which is not decoded.

Arrow's "IPC File Format": a magic number, the messages as in a stream, a flatbuffer ``Footer``, its length, and the
magic number again.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from worker.message import CONTINUATION, HEADER_SLOT, LENGTH, field, root, target

MAGIC = b"ARROW1"
START = MAGIC + b"\0\0"
END_OF_STREAM = CONTINUATION + LENGTH.pack(0)

# ``MetadataVersion.V5``.
_VERSION = 4

# Where the root table is, its vtable (its size, the table's, and where the fields version, schema, dictionaries and
# recordBatches are in the table), and the table (where its vtable is, and the fields, the last three of which are
# offsets), filled up to eight bytes.
_ROOT = Struct("<I 6H ihxx3I 4x")
_VTABLE, _TABLE = 4, 16
_FIELDS = (4, 8, 12, 16)
_TABLE_SIZE = 20

_VECTOR = Struct("<4xI")
_BLOCK = Struct("<qi4xq")


class Block(NamedTuple):
    """Where a message is in a file."""

    offset: int
    metadata_length: int
    """Of the metadata with what precedes it."""
    body_length: int


def footer(schema: bytes, dictionaries: Sequence[Block], batches: Sequence[Block]) -> bytes:
    """What follows the last message of a file.

    Args:
        schema: the metadata of the schema message.
        dictionaries: the dictionary batches.
        batches: the record batches.
    """
    # Offsets in a flatbuffer count from where they stand, so that one that is put into another as it is stays right, if
    # it begins at a multiple of eight.
    embedded = schema + bytes(-len(schema) % 8)
    schema_place = _ROOT.size + target(schema, field(schema, root(schema), HEADER_SLOT))
    vectors = _vector(dictionaries), _vector(batches)
    dictionaries_place = _ROOT.size + len(embedded) + 4
    batches_place = dictionaries_place + len(vectors[0])
    places = (schema_place, dictionaries_place, batches_place)
    offsets = (place - _TABLE - slot for place, slot in zip(places, _FIELDS[1:], strict=True))
    start = _ROOT.pack(_TABLE, _TABLE - _VTABLE, _TABLE_SIZE, *_FIELDS, _TABLE - _VTABLE, _VERSION, *offsets)
    flatbuffer = b"".join((start, embedded, *vectors))
    return END_OF_STREAM + flatbuffer + LENGTH.pack(len(flatbuffer)) + MAGIC


def _vector(blocks: Sequence[Block]) -> bytes:
    return _VECTOR.pack(len(blocks)) + b"".join(_BLOCK.pack(*block) for block in blocks)
