"""Dictionaries of successive arrays: which are the same, and how much of one is worth to be sent. Pure."""

import numpy as np
import pyarrow as pa

from worker.encoding.views import is_valid_mask, is_view, without_views

# Dictionaries up to this size are sent whole: a message costs more than such a copy.
SMALL_DICTIONARY = 64 * 1024

# A dictionary is compacted when at least half of it is waste, since what comes after may use the other half.
DICTIONARY_WASTE = 2.0


def has_dictionaries(data_type: pa.DataType, *, of_floats: bool = False) -> bool:
    """Whether there are dictionaries in arrays of a type, however deep; if asked so, only those with floats in them."""
    if pa.types.is_dictionary(data_type):
        return not of_floats or _has_floats(data_type.value_type)
    return any(has_dictionaries(child, of_floats=of_floats) for child in child_types(data_type))


def _has_floats(data_type: pa.DataType) -> bool:
    return pa.types.is_floating(data_type) or any(map(_has_floats, child_types(data_type)))


def child_types(data_type: pa.DataType) -> list[pa.DataType]:
    """The types of what is inside of arrays of a type; none for those without."""
    if isinstance(data_type, pa.BaseExtensionType):
        return [data_type.storage_type]
    if pa.types.is_run_end_encoded(data_type):
        return [data_type.run_end_type, data_type.value_type]
    if pa.types.is_dictionary(data_type):
        return [data_type.value_type]
    return [data_type.field(index).type for index in range(data_type.num_fields)]


def is_same(array: pa.Array, other: pa.Array) -> bool:
    """Whether two arrays of a type are equal, for most types by where they are in memory."""
    if array is other:
        return True
    if _is_flat(array.type):
        return _place(array) == _place(other)
    # Buffers do not tell where in a child an array begins, and 0.0 is equal to -0.0.
    return not _has_floats(array.type) and bool(array.equals(other))


def with_dictionary(array: pa.DictionaryArray, dictionary: pa.Array) -> pa.DictionaryArray:
    """The array with an equal dictionary: for Arrow, only one object is certain to be the same dictionary."""
    return pa.DictionaryArray.from_arrays(array.indices, dictionary, ordered=array.type.ordered, safe=False)


class DictionaryCompactor:
    """Chooses the dictionary that is sent with each array of a column.

    A receiver keeps what it was sent, and later rows may use what the first do not. So the used part of a dictionary is
    sent only until all such parts have come to as much as the whole, which is then sent once: together never more than
    twice what would have been best.
    """

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes beyond which a dictionary cannot be sent whole.
        """
        self._limit = limit
        # Both are held, so that nothing else can come to be where they are.
        self._source: pa.Array | None = None
        self._sent: pa.Array | None = None
        self._spent = 0

    def __call__(self, array: pa.DictionaryArray) -> pa.DictionaryArray:
        """The array, its dictionary whole or reduced to what it uses; the very object as before if it is the same."""
        dictionary = self._known(array.dictionary)
        size = dictionary.nbytes
        # Also of a slice of what was returned, whose dictionary is reduced already.
        if dictionary is self._sent and size <= self._limit:
            return with_dictionary(array, dictionary)
        if dictionary is not self._source and dictionary is not self._sent:
            self._source, self._spent = dictionary, 0
        self._sent = dictionary
        if size > SMALL_DICTIONARY or size > self._limit:
            reduced = _with_used_values(array)
            reduced_size = reduced.dictionary.nbytes
            is_worth_it = DICTIONARY_WASTE * reduced_size <= size and self._spent + reduced_size <= size
            if is_worth_it or size > self._limit:
                self._sent = reduced.dictionary
                self._spent += reduced_size
                return reduced
        return with_dictionary(array, dictionary)

    def _known(self, dictionary: pa.Array) -> pa.Array:
        """The very object that was seen before, if the dictionary is the same."""
        for known in (self._source, self._sent):
            if known is not None and is_same(dictionary, known):
                return known
        return dictionary


def _with_used_values(array: pa.DictionaryArray) -> pa.DictionaryArray:
    """The array with a dictionary of the values that it uses, in their order; as it is where Arrow cannot take them."""
    is_valid = is_valid_mask(array.indices)
    indices = array.indices.fill_null(0).to_numpy()
    is_used = np.zeros(len(array.dictionary), bool)
    is_used[indices[is_valid]] = True
    used = np.flatnonzero(is_used)
    try:
        dictionary = _taken(array.dictionary, pa.array(used))
    except pa.ArrowNotImplementedError:
        return array
    places = np.zeros(max(1, len(is_used)), indices.dtype)
    places[used] = np.arange(len(used))
    moved = pa.array(places[indices], array.indices.type, mask=~is_valid)
    return pa.DictionaryArray.from_arrays(moved, dictionary, ordered=array.type.ordered, safe=False)


def _taken(array: pa.Array, indices: pa.Array) -> pa.Array:
    # Arrow takes and filters nothing out of views.
    if is_view(array.type):
        return without_views(array).take(indices).cast(array.type)
    return array.take(indices)


def _is_flat(data_type: pa.DataType) -> bool:
    is_nested = pa.types.is_nested(data_type) or pa.types.is_dictionary(data_type)
    return not is_nested and not isinstance(data_type, pa.BaseExtensionType)


def _place(array: pa.Array) -> tuple[object, ...]:
    """Where an array is in memory."""
    buffers = array.buffers()
    return (array.offset, len(array), *((buffer.address, buffer.size) if buffer else None for buffer in buffers))
