"""Columns without what a receiver cannot see: values of views and of dictionaries that no row shows. Pure."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from worker.encoding.dictionaries import DictionaryCompactor, child_types
from worker.encoding.views import compact_views, is_view

Compactor: TypeAlias = Callable[[pa.Array], pa.Array]

# Intervals for which pyarrow has no class: it raises KeyError where one of their arrays would come out.
_WITHOUT_CLASS = {pa.lib.Type_INTERVAL_MONTHS, pa.lib.Type_INTERVAL_DAY_TIME}

# How many buffers an array of a nested type has itself, before those of its children. Dense unions are not here, since
# nothing takes out of their children what they do not show.
_OWN_BUFFERS = {
    pa.lib.Type_STRUCT: 1,
    pa.lib.Type_FIXED_SIZE_LIST: 1,
    pa.lib.Type_RUN_END_ENCODED: 1,
    pa.lib.Type_LIST: 2,
    pa.lib.Type_LARGE_LIST: 2,
    pa.lib.Type_MAP: 2,
    pa.lib.Type_SPARSE_UNION: 2,
    pa.lib.Type_LIST_VIEW: 3,
    pa.lib.Type_LARGE_LIST_VIEW: 3,
}

_LISTS = {pa.lib.Type_LIST, pa.lib.Type_LARGE_LIST, pa.lib.Type_MAP}
_LIST_VIEWS = {pa.lib.Type_LIST_VIEW, pa.lib.Type_LARGE_LIST_VIEW}


def compactor(data_type: pa.DataType, dictionary_limit: int) -> Compactor | None:
    """What compacts arrays of a type, for one column of one stream; None where there is nothing to compact.

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
    if data_type.id not in _OWN_BUFFERS:
        return None
    types = child_types(data_type)
    if any(child.id in _WITHOUT_CLASS for child in types):
        return None
    children = [compactor(child, dictionary_limit) for child in types]
    if any(children) or data_type.id in _LIST_VIEWS:
        return partial(_compact_children, children)
    return _compact_empty_lists if data_type.id in _LISTS else None


def _compact_storage(compact: Compactor, array: pa.ExtensionArray) -> pa.Array:
    storage = array.storage
    compacted = compact(storage)
    return array if compacted is storage else pa.ExtensionArray.from_storage(array.type, compacted)


def _compact_empty_lists(array: pa.Array) -> pa.Array:
    """The array; where all its lists are empty, without what is in its child nevertheless.

    Arrow's writer leaves that out of lists that have elements, but sends the buffers of children without any whole.
    """
    if not len(_elements(array)) or array.offsets[0].as_py() != array.offsets[len(array)].as_py():
        return array
    return _trimmed(array)


def _compact_children(compactors: Sequence[Compactor | None], array: pa.Array) -> pa.Array:
    if not _shows_all(array) and (array := _trimmed(array)).offset:
        return array
    children = _children(array)
    compacted = [
        child if compact is None else compact(child) for compact, child in zip(compactors, children, strict=True)
    ]
    if all(after is before for after, before in zip(compacted, children, strict=True)):
        return array
    own = array.buffers()[: _OWN_BUFFERS[array.type.id]]
    return pa.Array.from_buffers(array.type, len(array), own, array.null_count, 0, compacted)


def _trimmed(array: pa.Array) -> pa.Array:
    """A copy of what an array shows, from offset 0 on; the array itself where Arrow cannot make one."""
    try:
        return pa.concat_arrays([array])
    except pa.ArrowNotImplementedError:
        return array


def _children(array: pa.Array) -> list[pa.Array]:
    match array.type.id:
        case pa.lib.Type_STRUCT | pa.lib.Type_SPARSE_UNION:
            return [array.field(index) for index in range(array.type.num_fields)]
        case pa.lib.Type_RUN_END_ENCODED:
            return [array.run_ends, array.values]
        case pa.lib.Type_MAP:
            fields = [array.type.key_field, array.type.item_field]
            return [pa.StructArray.from_arrays([array.keys, array.items], fields=fields)]
        case _:
            return [array.values]


def _shows_all(array: pa.Array) -> bool:
    """Whether there is nothing in an array's children but what it shows."""
    if array.offset or not len(array):
        return False
    match array.type.id:
        case pa.lib.Type_STRUCT | pa.lib.Type_SPARSE_UNION:
            return True
        case pa.lib.Type_RUN_END_ENCODED:
            return bool(array.run_ends[-1].as_py() == len(array))
        case pa.lib.Type_FIXED_SIZE_LIST:
            return bool(len(array.values) == len(array) * array.type.list_size)
        case pa.lib.Type_LIST_VIEW | pa.lib.Type_LARGE_LIST_VIEW:
            return bool(len(array.values) <= (pc.sum(array.sizes).as_py() or 0))
        case _:
            return bool(array.offsets[0].as_py() == 0 and array.offsets[len(array)].as_py() == len(_elements(array)))


def _elements(array: pa.Array) -> pa.Array:
    """What the offsets of lists and maps count."""
    return array.keys if pa.types.is_map(array.type) else array.values
