"""Batches as IPC messages: what Arrow's own reader makes of them, what is sent once, and what is not copied."""

import datetime
import decimal
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from support import read_messages

from worker import ExecutionFailed
from worker.encoding.encode import Encoder
from worker.message import HeaderType, Message, body_length, header_type

LIMIT = 4 << 20

WORDS = pa.array(["alpha", "beta", None, "gamma", "a string that is too long to stand inside of a view"])
LISTS = pa.array([[1, 2], None, [], [3, None], [4]], pa.list_(pa.int64()))
STRUCTS = pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}, {"a": 2, "b": None}, {"a": 3, "b": "z"}])
MAP = pa.map_(pa.string(), pa.int32())
DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def _dictionary(indices: list[int | None], values: Any) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))


COLUMNS = [
    pa.array([True, False, None, True, False]),
    pa.array([1, 2, None, 4, -5], pa.int8()),
    pa.array([1, 2, 3, 4, 2**64 - 1], pa.uint64()),
    pa.array([1.5, None, float("inf"), -0.0, 2.0], pa.float32()),
    pa.nulls(5),
    WORDS,
    WORDS.cast(pa.large_string()),
    WORDS.cast(pa.string_view()),
    WORDS.cast(pa.binary()).cast(pa.binary_view()),
    WORDS.cast(pa.large_binary()),
    pa.array([b"abc", None, b"def", b"ghi", b"jkl"], pa.binary(3)),
    pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-9.99"), decimal.Decimal(0), None], pa.decimal128(9, 2)),
    pa.array([decimal.Decimal(10) ** 70, None, None, None, None], pa.decimal256(76, 0)),
    pa.array([datetime.date(2024, 2, 29), None, datetime.date(1969, 1, 1), None, None], pa.date32()),
    pa.array([0, 86_400_000, None, None, -86_400_000], pa.date64()),
    pa.array([1, None, 3, 4, 5], pa.timestamp("ns", "Europe/Rome")),
    pa.array([1, None, 3, 4, 5], pa.timestamp("s")),
    pa.array([1, None, 3, 4, 5], pa.time64("us")),
    pa.array([1, None, 3, 4, 5], pa.duration("ms")),
    pa.array([pa.MonthDayNano([1, 2, 3]), None, None, None, None], pa.month_day_nano_interval()),
    LISTS,
    LISTS.cast(pa.large_list(pa.int64())),
    pa.array([[1, 2], None, [3, 4], [5, 6], [7, 8]], pa.list_(pa.int16(), 2)),
    pa.array([["a"], None, [], ["b", None], ["a string that is too long to stand inside of a view"]]).cast(
        pa.list_(pa.string_view())
    ),
    STRUCTS,
    pa.array([[("k", 1)], None, [], [("l", None), ("m", 2)], [("n", 3)]], MAP),
    WORDS.dictionary_encode(),
    _dictionary([0, None, 1, 0, 1], ["x", "y"]),
    pa.ListArray.from_arrays([0, 2, 2, 3, 4, 5], _dictionary([0, 1, 0, None, 1], ["x", "y"])),
    pa.StructArray.from_arrays([_dictionary([0, 1, 0, None, 1], ["x", "y"])], ["d"]),
]


def _messages(encoder: Encoder, batches: Iterable[pa.RecordBatch]) -> list[Message]:
    """Of the schema, and of the batches, each encoded for itself."""
    return [encoder.schema(), *(message for batch in batches for message in encoder.encode([batch]))]


def _encoder(schema: pa.Schema, limit: int = LIMIT) -> Encoder:
    return Encoder(schema, limit)


def _round_trip(*batches: pa.RecordBatch) -> pa.Table:
    return read_messages(_messages(_encoder(batches[0].schema), batches))


def _kinds(messages: Iterable[Message]) -> list[int]:
    return [header_type(message.header) for message in messages]


def _batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
@pytest.mark.parametrize("part", [slice(None), slice(1, 4), slice(2, 2)], ids=["whole", "sliced", "empty"])
def test_batches_of_a_type_come_back(column: pa.Array, part: slice) -> None:
    length = len(range(len(column))[part])
    batch = _batch(column=column, row=pa.array(range(len(column)))).slice(part.start or 0, length)
    assert batch.num_rows == length
    assert _round_trip(batch, batch).equals(pa.Table.from_batches([batch, batch]))


def test_the_columns_above_are_of_one_length() -> None:
    assert {len(column) for column in COLUMNS} == {5}


def test_a_stream_of_its_schema_alone_is_an_empty_table() -> None:
    schema = pa.schema([pa.field("a", pa.int32(), nullable=False, metadata={"k": "v"}), ("d", DICTIONARY)], {"m": "n"})
    decoded = read_messages([_encoder(schema).schema()])
    assert decoded.num_rows == 0
    assert decoded.schema.equals(schema, check_metadata=True)


def test_metadata_of_schema_and_fields_is_in_the_schema_message() -> None:
    schema = pa.schema([pa.field("a", pa.int64(), metadata={"k": "v"})], {"m": "n"})
    batch = pa.RecordBatch.from_arrays([pa.array([1])], schema=schema)
    assert _round_trip(batch).schema.equals(schema, check_metadata=True)


def test_rows_without_columns_are_counted() -> None:
    batch = _batch(a=[1, 2, 3]).select([])
    assert batch.num_rows == 3
    messages = _messages(_encoder(batch.schema), [batch])
    assert _kinds(messages) == [HeaderType.SCHEMA, HeaderType.RECORD_BATCH]
    assert read_messages(messages).num_rows == 3


def test_the_schema_is_said_once_and_not_by_the_first_batch() -> None:
    encoder = _encoder(pa.schema([("a", pa.int64())]))
    assert _kinds([encoder.schema()]) == [HeaderType.SCHEMA]
    assert _kinds(encoder.encode([_batch(a=[1])])) == [HeaderType.RECORD_BATCH]
    assert _kinds(encoder.encode([_batch(a=[2])])) == [HeaderType.RECORD_BATCH]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_a_body_is_as_long_as_its_header_says_and_padded(column: pa.Array) -> None:
    for header, body in _messages(_encoder(pa.schema([("a", column.type)])), [_batch(a=column)]):
        assert sum(map(len, body)) == body_length(header)
        assert body_length(header) % 8 == 0
        assert len(header) % 8 == 0


D, R = HeaderType.DICTIONARY_BATCH, HeaderType.RECORD_BATCH
X, Y, GROWN = ["x", "y"], ["y", "z"], ["x", "y", "z"]


@pytest.mark.parametrize(
    ("dictionaries", "kinds"),
    [
        ([X, X, X], [D, R, R, R]),
        ([X, Y, X], [D, R, D, R, D, R]),
        ([X, GROWN, GROWN], [D, R, D, R, R]),
        ([X, X, Y, Y], [D, R, R, D, R, R]),
    ],
)
def test_a_dictionary_goes_before_the_batch_that_needs_it_and_only_when_it_is_new(
    dictionaries: list[list[str]], kinds: list[int]
) -> None:
    batches = [_batch(d=_dictionary([0, None, 1], values)) for values in dictionaries]
    messages = _messages(_encoder(batches[0].schema), batches)
    assert _kinds(messages)[1:] == kinds
    assert read_messages(messages).to_pylist() == [row for batch in batches for row in batch.to_pylist()]


def test_of_two_dictionaries_only_the_changed_one_is_sent_again() -> None:
    batches = [_batch(a=_dictionary([0, 1], X), b=_dictionary([1, 0], values)) for values in (X, Y)]
    messages = _messages(_encoder(batches[0].schema), batches)
    assert _kinds(messages)[1:] == [D, D, R, D, R]
    assert read_messages(messages).to_pylist() == batches[0].to_pylist() + batches[1].to_pylist()


@pytest.mark.parametrize("codes", [(0, 1 << 63), (0x7FF8 << 48, (0x7FF8 << 48) + 1)], ids=["zeros", "NaNs"])
def test_dictionaries_of_floats_that_differ_in_their_bits_are_others(codes: tuple[int, int]) -> None:
    batches = [_batch(d=_dictionary([0], pa.array([code], pa.uint64()).view(pa.float64()))) for code in codes]
    decoded = _round_trip(*batches)
    assert [chunk.dictionary.view(pa.uint64())[0].as_py() for chunk in decoded["d"].chunks] == list(codes)


def test_an_unchanged_dictionary_of_floats_is_not_sent_again() -> None:
    batch = _batch(d=_dictionary([0, 1], pa.array([0.0, float("nan")])))
    assert _kinds(_messages(_encoder(batch.schema), [batch, batch]))[1:] == [D, R, R]


def _nested(values: list[str]) -> pa.RecordBatch:
    """A dictionary whose values are structs of a dictionary."""
    inner = pa.StructArray.from_arrays([_dictionary([1, 0, 1], values)], ["inner"])
    return _batch(d=pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 1], pa.int8()), inner))


def test_dictionaries_in_dictionaries_come_back_however_they_change() -> None:
    batches = [_nested(values) for values in (X, X, Y, GROWN, X)]
    assert _round_trip(*batches).to_pylist() == [row for batch in batches for row in batch.to_pylist()]


def _addresses(arrays: Iterable[pa.Array]) -> set[int]:
    return {buffer.address for array in arrays for buffer in array.buffers() if buffer is not None}


@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(1000), pa.int64()),
        pa.array([float(number) for number in range(1000)]),
        pa.array([f"word {number}" for number in range(1000)]),
        pa.array([f"a string that is too long for a view {number}" for number in range(1000)], pa.string_view()),
        pa.array([[number, number] for number in range(1000)]),
        pa.array([{"a": number} for number in range(1000)]),
        pa.array([None if number % 3 else number for number in range(1000)], pa.int64()),
    ],
    ids=lambda column: str(column.type),
)
def test_the_body_of_a_batch_is_the_buffers_of_its_columns(column: pa.Array) -> None:
    batch = _batch(a=column)
    encoder = _encoder(batch.schema)
    for message in (list(encoder.encode([batch]))[-1], list(encoder.encode([batch]))[-1]):
        sent = [part for part in message.body if isinstance(part, pa.Buffer) and part.size > 8]
        assert sent
        assert {part.address for part in sent} == _addresses([column])


def test_the_body_of_a_dictionary_is_the_buffers_of_its_values() -> None:
    values = pa.array([f"word {number}" for number in range(1000)])
    dictionary, _ = _encoder(pa.schema([("d", DICTIONARY)])).encode([_batch(d=_dictionary([1, 2], values))])
    sent = {part.address for part in dictionary.body if isinstance(part, pa.Buffer) and part.size > 8}
    assert sent == _addresses([values])


def test_of_a_slice_only_its_part_is_sent_uncopied() -> None:
    column = pa.array(range(10_000), pa.int64())
    part = _batch(a=column).slice(2_000, 500)
    (message,) = _encoder(part.schema).encode([part])
    (data,) = message.body
    assert isinstance(data, pa.Buffer)
    assert data.address == column.buffers()[1].address + 2_000 * 8
    assert data.size == 500 * 8


def test_text_of_a_slice_is_its_part_alone() -> None:
    part = _batch(a=[f"{number:05}" for number in range(10_000)]).slice(2_000, 500)
    (message,) = _encoder(part.schema).encode([part])
    assert sum(map(len, message.body)) < 500 * 5 + 501 * 4 + 2 * 64


def test_a_batch_that_says_less_of_nulls_is_sent_as_the_stream_says() -> None:
    strict = pa.schema([pa.field("a", pa.int64(), nullable=False, metadata={"k": "v"})], {"m": "n"})
    loose = pa.schema([pa.field("a", pa.int64())])
    batches = [pa.RecordBatch.from_arrays([pa.array([number])], schema=strict) for number in (1, 3)]
    batches.insert(1, pa.RecordBatch.from_arrays([pa.array([2])], schema=loose))
    for schema in (strict, loose):
        decoded = read_messages(_messages(_encoder(schema), batches))
        assert decoded.schema.equals(schema, check_metadata=True)
        assert decoded.to_pydict() == {"a": [1, 2, 3]}


@pytest.mark.parametrize(
    "other", [_batch(a=["text"]), _batch(a=pa.array([1], pa.int32())), _batch(a=[1], b=[2]), _batch(a=[1]).select([])]
)
def test_a_batch_of_other_types_is_refused_and_the_stream_goes_on(other: pa.RecordBatch) -> None:
    encoder = _encoder(pa.schema([("a", pa.int64())]))
    messages = [encoder.schema(), *encoder.encode([_batch(a=[1])])]
    with pytest.raises(ExecutionFailed, match="those before of") as caught:
        list(encoder.encode([other]))
    assert "int64" in str(caught.value)
    messages += encoder.encode([_batch(a=[2])])
    assert read_messages(messages).to_pydict() == {"a": [1, 2]}


def test_an_encoder_keeps_nothing_of_what_it_has_encoded() -> None:
    batch = _batch(a=pa.array(range(100_000), pa.int64()))
    encoder = _encoder(batch.schema)
    before = pa.total_allocated_bytes()
    for _ in range(10):
        list(encoder.encode([pa.RecordBatch.from_arrays([pa.array(range(100_000), pa.int64())], schema=batch.schema)]))
    assert pa.total_allocated_bytes() - before < 100_000


class Unhashable(pa.ExtensionType):  # type: ignore[misc]
    """As extension types are that say what they are equal to, and no more."""

    def __init__(self) -> None:
        super().__init__(pa.string_view(), "tests.unhashable")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Unhashable":
        return cls()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)


def test_a_column_of_an_extension_type_is_sent_whatever_its_class_lacks() -> None:
    kind = Unhashable()
    batch = _batch(column=pa.ExtensionArray.from_storage(kind, WORDS.cast(pa.string_view())))
    with pytest.raises(TypeError):
        hash(kind)
    messages = _messages(_encoder(batch.schema), [batch])
    assert read_messages(messages)["column"].to_pylist() == WORDS.to_pylist()
