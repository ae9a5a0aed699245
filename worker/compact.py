"""Columns without what a receiver cannot see: values of views and of dictionaries that no row shows. Pure."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import pyarrow as pa

from worker.dictionaries import DictionaryCompactor
from worker.views import compact_views, is_view

Compactor: TypeAlias = Callable[[pa.Array], pa.Array]

# Intervals for which pyarrow has no class: it raises KeyError where one of their arrays would come out.
_WITHOUT_CLASS = {pa.lib.Type_INTERVAL_MONTHS, pa.lib.Type_INTERVAL_DAY_TIME}

_NESTED = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_struct, pa.types.is_map)


def compactor(data_type: pa.DataType, dictionary_limit: int) -> Compactor | None:
    """What compacts arrays of a type, for one column of one stream; None where there is nothing to compact.

    Looks into extension types, lists, structs and maps; not into list views, unions and run-end encoded arrays.

    Args:
        data_type: the type of the arrays to come.
        dictionary_limit: bytes beyond which a dictionary cannot be sent whole.
    """
    if isinstance(data_type, pa.BaseExtensionType):
        storage = compactor(data_type.storage_type, dictionary_limit)
        return storage and partial(_compact_storage, storage)
    if is_view(data_type):
        return compact_views
    if pa.types.is_dictionary(data_type):
        return DictionaryCompactor(dictionary_limit)
    if any(is_type(data_type) for is_type in _NESTED):
        fields = [data_type.field(index) for index in range(data_type.num_fields)]
        if any(field.type.id in _WITHOUT_CLASS for field in fields):
            return None
        children = [compactor(field.type, dictionary_limit) for field in fields]
        if any(children):
            return partial(_compact_children, children)
        is_list = pa.types.is_list(data_type) or pa.types.is_large_list(data_type) or pa.types.is_map(data_type)
        return _compact_empty_lists if is_list else None
    return None


def _compact_storage(compact: Compactor, array: pa.ExtensionArray) -> pa.Array:
    storage = array.storage
    compacted = compact(storage)
    return array if compacted is storage else pa.ExtensionArray.from_storage(array.type, compacted)


def _compact_empty_lists(array: pa.Array) -> pa.Array:
    """The array; where all its lists are empty, without what is in its child nevertheless.

    Arrow's writer leaves that out of lists that have elements, but sends the buffers of children without any whole.
    """
    values = array.keys if pa.types.is_map(array.type) else array.values
    if not len(values) or array.offsets[0].as_py() != array.offsets[len(array)].as_py():
        return array
    return pa.concat_arrays([array])


def _compact_children(compactors: Sequence[Compactor | None], array: pa.Array) -> pa.Array:
    if not _shows_all(array):
        array = pa.concat_arrays([array])
    children = _children(array)
    compacted = [
        child if compact is None else compact(child) for compact, child in zip(compactors, children, strict=True)
    ]
    if all(after is before for after, before in zip(compacted, children, strict=True)):
        return array
    own = 1 if pa.types.is_struct(array.type) or pa.types.is_fixed_size_list(array.type) else 2
    return pa.Array.from_buffers(array.type, len(array), array.buffers()[:own], array.null_count, 0, compacted)


def _children(array: pa.Array) -> list[pa.Array]:
    if pa.types.is_struct(array.type):
        return [array.field(index) for index in range(array.type.num_fields)]
    if pa.types.is_map(array.type):
        fields = [array.type.key_field, array.type.item_field]
        return [pa.StructArray.from_arrays([array.keys, array.items], fields=fields)]
    return [array.values]


def _shows_all(array: pa.Array) -> bool:
    """Whether there is nothing in an array's children but what it shows."""
    if array.offset:
        return False
    if pa.types.is_struct(array.type):
        return True
    if pa.types.is_fixed_size_list(array.type):
        return bool(len(array.values) == len(array) * array.type.list_size)
    if not len(array):
        return False
    values = array.keys if pa.types.is_map(array.type) else array.values
    return bool(array.offsets[0].as_py() == 0 and array.offsets[len(array)].as_py() == len(values))
