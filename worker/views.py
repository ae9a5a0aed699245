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
    validity, views_buffer, *data = array.buffers()
    size = sum(buffer.size for buffer in data)
    if size <= len(array):
        # Less than a byte a row: not worth a look.
        return array
    views = np.frombuffer(views_buffer, np.int32, VIEW_INT32S * len(array), VIEW_BYTES * array.offset)
    views = views.reshape(-1, VIEW_INT32S)
    is_long = views[:, LENGTH] > INLINE_BYTES
    if array.null_count:
        # The view of a null may be anything.
        is_valid = is_valid_mask(array)
        is_long &= is_valid
    seen = int(np.sum(views[:, LENGTH], where=is_long, dtype=np.int64))
    if size <= VIEW_WASTE * seen or seen > np.iinfo(np.int32).max:
        return array
    if not seen and not array.null_count:
        return pa.Array.from_buffers(array.type, len(array), [None, views_buffer], 0, array.offset)

    values = array.cast(plain_type(array.type))
    if values.buffers()[2].size <= VIEW_WASTE * seen:
        return values.cast(array.type)
    # Much of the values is inline in views, and would be among the data of a cast nevertheless.
    values = values.filter(pa.array(is_long))
    _, offsets, values_buffer = values.buffers()
    # The bitmap of what is valid stays as it is, so the rows begin where they do in its first byte.
    first = array.offset % 8
    rebuilt: npt.NDArray[np.int32] = np.zeros((first + len(array), VIEW_INT32S), np.int32)
    rows = rebuilt[first:]
    rows[:] = views
    if array.null_count:
        rows[~is_valid] = 0
    rows[is_long, BUFFER] = 0
    rows[is_long, OFFSET] = np.frombuffer(offsets, np.int64, len(values))
    buffers = [validity and validity.slice(array.offset // 8), pa.py_buffer(rebuilt), values_buffer]
    return pa.Array.from_buffers(array.type, len(array), buffers, array.null_count, first)


def is_valid_mask(array: pa.Array) -> npt.NDArray[np.bool_]:
    """Which values are not null."""
    if not array.null_count:
        return np.ones(len(array), bool)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), bool)
