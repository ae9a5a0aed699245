"""Views: what of their data is sent, and that nothing of what they show is lost."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from worker.encoding.compact import compactor
from worker.encoding.views import compact_views, without_views

LONG = [f"a string too long to stand inside of a view, number {number}" for number in range(10_000)]


def _views(values: list[str | None], view: pa.DataType) -> pa.Array:
    return pa.array(values).cast(pa.string() if view == pa.string_view() else pa.binary()).cast(view)


def _data(array: pa.Array) -> int:
    return sum(buffer.size for buffer in array.buffers()[2:])


def _compacted(array: pa.Array) -> pa.Array:
    compacted = compact_views(array)
    compacted.validate(full=True)
    assert compacted.equals(array)
    assert compacted.type == array.type
    return compacted


@pytest.mark.parametrize("view", [pa.string_view(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("start", [0, 1, 9_003])
def test_data_that_is_not_shown_is_dropped(view: pa.DataType, start: int) -> None:
    part = _views([*LONG], view).slice(start, 3)
    compacted = _compacted(part)
    assert _data(compacted) == sum(len(value) for value in LONG[start : start + 3])


@pytest.mark.parametrize("start", [0, 1, 5, 8])
@pytest.mark.parametrize("step", [2, 3])
def test_nulls_and_values_inside_of_views_stay_what_they_are(start: int, step: int) -> None:
    inside = "twelve bytes"
    values = [(None, inside, inside, long, inside, "")[number // step % 6] for number, long in enumerate(LONG)]
    part = _views(values, pa.string_view()).slice(start, 1000)
    compacted = _compacted(part)
    assert _data(compacted) == sum(len(value) for value in part.to_pylist() if value and len(value) > 12)


def test_views_with_all_values_inside_need_no_data() -> None:
    words = _views([*LONG[:100], *(["short"] * 1000)], pa.string_view()).slice(100)
    compacted = _compacted(words)
    assert _data(compacted) == 0
    assert compacted.buffers()[1].address == words.buffers()[1].address


def test_the_views_of_nulls_may_be_anything() -> None:
    nonsense = b"\xff" * 16
    validity = pa.array([False, True] * 500).buffers()[1]
    shown = (3).to_bytes(4, "little") + b"abc" + bytes(9)
    buffers = [validity, pa.py_buffer((nonsense + shown) * 500), pa.py_buffer(b"x" * 10_000)]
    array = pa.Array.from_buffers(pa.string_view(), 1000, buffers)
    compacted = compact_views(array)
    compacted.validate(full=True)
    assert compacted.to_pylist() == [None, "abc"] * 500
    assert _data(compacted) == 0
    plain = without_views(array)
    plain.validate(full=True)
    assert plain.to_pylist() == [None, "abc"] * 500


def test_views_that_show_most_of_their_data_are_sent_as_they_are() -> None:
    array = _views([*LONG], pa.string_view())
    assert compact_views(array) is array
    assert compact_views(array.slice(1000)).buffers() is not None


def test_views_that_show_one_large_value_in_every_row_are_sent_as_they_are() -> None:
    """Compacted, each row would have the value for itself."""
    value = b"x" * 1_000_000
    view = (len(value)).to_bytes(4, "little") + value[:4] + bytes(8)
    buffers = [None, pa.py_buffer(view * 8192), pa.py_buffer(value)]
    array = pa.Array.from_buffers(pa.string_view(), 8192, buffers)
    assert compact_views(array) is array


NESTED: list[tuple[pa.DataType, Callable[[str], Any]]] = [
    (pa.list_(pa.string_view()), lambda text: [text, None]),
    (pa.large_list(pa.string_view()), lambda text: [text]),
    (pa.list_(pa.string_view(), 2), lambda text: [text, "short"]),
    (pa.struct([("number", pa.int8()), ("text", pa.string_view())]), lambda text: {"number": 1, "text": text}),
    (pa.map_(pa.string(), pa.string_view()), lambda text: [("key", text)]),
    (pa.map_(pa.string_view(), pa.int8()), lambda text: [(text, None)]),
    (pa.list_(pa.struct([("inner", pa.list_(pa.binary_view()))])), lambda text: [{"inner": [text.encode()]}, None]),
]


@pytest.mark.parametrize(("nested", "make"), NESTED, ids=[str(nested) for nested, _ in NESTED])
@pytest.mark.parametrize("start", [0, 1, 8, 301])
def test_views_inside_of_other_types_are_compacted_too(
    nested: pa.DataType, make: Callable[[str], Any], start: int
) -> None:
    array = pa.array([None if number % 5 == 4 else make(text) for number, text in enumerate(LONG[:1000])], nested)
    part = array.slice(start, 3)
    compact = compactor(nested, 1 << 20)
    assert compact is not None

    compacted = compact(part)

    compacted.validate(full=True)
    assert compacted.equals(part)
    assert compacted.type == nested
    assert compacted.get_total_buffer_size() < 2_000 < part.get_total_buffer_size()


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.string(), pa.list_(pa.string(), 2), pa.struct([("a", pa.int8())])], ids=str
)
def test_types_without_views_and_lists_have_nothing_to_compact(kind: pa.DataType) -> None:
    assert compactor(kind, 1 << 20) is None
