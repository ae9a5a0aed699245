"""Whether what arrived is what was made: schemas with metadata, values to the bit, wherever batches begin and end."""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pyarrow as pa

# The numbers of types that pyarrow has no Python class for, so that it cannot show their arrays: intervals of months,
# and of days and milliseconds.
UNNAMED_TYPES = {21, 22}

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
    pa.types.is_fixed_size_list,
    pa.types.is_map,
)


def assert_exact(actual: pa.Table, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Asserts that a table is valid, of the schema with all metadata, and has the values of the batches."""
    actual.validate(full=True)
    assert_schema(actual.schema, schema)
    expected = pa.Table.from_batches(batches, schema)
    assert actual.num_rows == expected.num_rows
    for index, field in enumerate(schema):
        theirs, ours = actual.column(index), expected.column(index)
        if _is_unnamed(field.type):
            assert theirs.equals(ours), field
        else:
            assert _all(theirs) == _all(ours), field


def assert_schema(actual: pa.Schema, expected: pa.Schema) -> None:
    """Asserts that schemas are equal with all their metadata."""
    assert actual.equals(expected, check_metadata=True), f"{_shown(actual)}\nis not\n{_shown(expected)}"


def _is_unnamed(type_: pa.DataType) -> bool:
    children = (type_.field(index).type for index in range(type_.num_fields))
    return type_.id in UNNAMED_TYPES or any(map(_is_unnamed, children))


def _shown(schema: pa.Schema) -> str:
    return str(schema.to_string(show_field_metadata=True, show_schema_metadata=True))


def _all(column: pa.ChunkedArray) -> list[Any]:
    return list(chain.from_iterable(map(values, column.chunks)))


def values(array: pa.Array) -> list[Any]:
    """The values of an array as Python objects that are equal only where the values are, to the bit.

    Dictionaries and runs are looked up, unions tell which child a value is of, floats are their bits.
    """
    type_ = array.type
    if isinstance(type_, pa.BaseExtensionType):
        return values(array.storage)
    if pa.types.is_dictionary(type_):
        found = values(array.dictionary)
        return [None if index is None else found[index] for index in array.indices.to_pylist()]
    if pa.types.is_run_end_encoded(type_):
        ends, found = array.run_ends.to_pylist(), values(array.values)
        return [found[bisect_right(ends, array.offset + row)] for row in range(len(array))]
    if pa.types.is_union(type_):
        return _of_union(array)
    if pa.types.is_struct(type_):
        children = [values(array.field(index)) for index in range(type_.num_fields)]
        return [tuple(child[row] for child in children) if there else None for row, there in _valid(array)]
    if any(is_list(type_) for is_list in _LISTS):
        return [None if scalar.values is None else values(scalar.values) for scalar in array]
    if pa.types.is_floating(type_):
        return list(array.view(f"uint{type_.bit_width}").to_pylist())
    if pa.types.is_temporal(type_) and not pa.types.is_interval(type_):
        return list(array.view(f"int{type_.bit_width}").to_pylist())
    return list(array.to_pylist())


def _of_union(array: pa.UnionArray) -> list[Any]:
    children = {code: values(array.field(index)) for index, code in enumerate(array.type.type_codes)}
    # Not ``type_codes`` and ``offsets``, which are those of the first rows, of whatever part the array is.
    codes = _part(array, pa.int8(), 1)
    places = _part(array, pa.int32(), 2) if array.type.mode == "dense" else range(len(array))
    return [(code, children[code][place]) for code, place in zip(codes, places, strict=True)]


def _part(array: pa.Array, type_: pa.DataType, buffer: int) -> list[Any]:
    buffers = [None, array.buffers()[buffer]]
    return list(pa.Array.from_buffers(type_, len(array), buffers, offset=array.offset).to_pylist())


def _valid(array: pa.Array) -> Iterable[tuple[int, bool]]:
    return enumerate(array.is_valid().to_pylist())
