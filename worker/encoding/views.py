"""Arrays of string and binary views without the data that they do not show. Pure."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# A view (Arrow's "Variable-size Binary View Layout") is four of them: length, and the value itself if it has up to 12
# bytes, or else its first four bytes, the number of a data buffer, and an offset in it.
VIEW_INT32S = 4
VIEW_BYTES = 16
LENGTH, BUFFER, OFFSET = 0, 2, 3
INLINE_BYTES = 12

# Rebuilding views copies what is seen, off the GIL, in less time than it takes to send a quarter more.
VIEW_WASTE = 1.25


def is_view(data_type: pa.DataType) -> bool:
    """Whether a type is one of views of text or bytes."""
    return bool(pa.types.is_string_view(data_type) or pa.types.is_binary_view(data_type))


def plain_type(view_type: pa.DataType) -> pa.DataType:
    """What holds the same values as a type of views, as many of them as there may be."""
    return pa.large_string() if pa.types.is_string_view(view_type) else pa.large_binary()


def compact_views(array: pa.Array) -> pa.Array:
    """The array, rebuilt if its data buffers hold much that it does not show.

    Views that were sorted, joined or filtered by DataFusion share the buffers of all that they were taken from: a sort
    of 26 MB of strings would send 4.7 GB.
    """
    size = sum(buffer.size for buffer in array.buffers()[2:])
    if size <= len(array):
        # Less than a byte a row: not worth a look.
        return array
    views = _views(array)
    is_long = views[:, LENGTH] > INLINE_BYTES
    if array.null_count:
        is_long &= is_valid_mask(array)
    seen = int(np.sum(views[:, LENGTH], where=is_long, dtype=np.int64))
    if size <= VIEW_WASTE * seen or seen + INLINE_BYTES * len(array) > np.iinfo(np.int32).max:
        return array

    array = _with_empty_nulls(array)
    if not seen:
        validity, views_buffer = array.buffers()[:2]
        return pa.Array.from_buffers(array.type, len(array), [validity, views_buffer], array.null_count, array.offset)
    values = array.cast(pa.string() if pa.types.is_string_view(array.type) else pa.binary())
    if values.buffers()[2].size <= VIEW_WASTE * seen:
        return values.cast(array.type)
    # Much of the values is inside of views, and would be among the data of a cast nevertheless.
    values = values.filter(pa.array(is_long))
    _, offsets, values_buffer = values.buffers()
    moved_views = _views(array).copy()
    moved_views[is_long, BUFFER] = 0
    moved_views[is_long, OFFSET] = np.frombuffer(offsets, np.int32, len(values))
    return _with_views(array, moved_views, [values_buffer])


def without_views(array: pa.Array) -> pa.Array:
    """The values of views as ``plain_type``."""
    return _with_empty_nulls(array).cast(plain_type(array.type))


def _with_empty_nulls(array: pa.Array) -> pa.Array:
    if not array.null_count:
        return array
    # The view of a null may be anything, for which Arrow's cast is not prepared.
    views = np.where(is_valid_mask(array)[:, np.newaxis], _views(array), np.int32(0))
    return _with_views(array, views, array.buffers()[2:])


def _views(array: pa.Array) -> npt.NDArray[np.int32]:
    """The views of an array, a row for each."""
    views = np.frombuffer(array.buffers()[1], np.int32, VIEW_INT32S * len(array), VIEW_BYTES * array.offset)
    return views.reshape(-1, VIEW_INT32S)


def _with_views(array: pa.Array, views: npt.NDArray[np.int32], data: list[pa.Buffer]) -> pa.Array:
    """An array of the same nulls as another."""
    # The bitmap of what is valid stays as it is, so the rows begin where they do in its first byte.
    first = array.offset % 8
    validity = array.buffers()[0]
    rows = np.concatenate([np.zeros((first, VIEW_INT32S), np.int32), views])
    buffers = [validity and validity.slice(array.offset // 8), pa.py_buffer(rows), *data]
    return pa.Array.from_buffers(array.type, len(array), buffers, array.null_count, first)


def is_valid_mask(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Which values are not null."""
    if not array.null_count:
        return np.ones(len(array), bool)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), bool)
