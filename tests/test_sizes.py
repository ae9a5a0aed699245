"""How batches are cut into messages: small ones joined, large ones divided, none beyond the limit."""

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pytest
from support import read_messages

from worker import ResponseTooLarge
from worker.encoding.dictionaries import SMALL_DICTIONARY
from worker.encoding.encode import SMALL_BATCH, TARGET_SIZE, Encoder
from worker.encoding.flight_data import serialize
from worker.message import HeaderType, Message, header_type

LIMIT = 4 << 20
SMALL_LIMIT = 64 << 10


def _batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def _encode(batches: Sequence[pa.RecordBatch], limit: int = LIMIT, **options: Any) -> list[Message]:
    """The messages of batches that come together, none of which is larger than the limit, and what they hold."""
    encoder = Encoder(batches[0].schema, limit, **options)
    schema, messages = encoder.schema(), list(encoder.encode(batches))
    assert max(len(serialize(message)) for message in messages) <= limit
    decoded = read_messages([schema, *messages])
    assert _values(decoded) == _values(pa.Table.from_batches(batches))
    return messages


def _values(table: pa.Table) -> pa.Table:
    """The table with values where it has dictionaries, which are equal if what they stand for is."""
    types = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in table.schema.types]
    return table.cast(pa.schema(zip(table.schema.names, types, strict=True))).combine_chunks()


def _kinds(messages: Iterable[Message]) -> list[int]:
    return [header_type(message.header) for message in messages]


def _numbers(rows: int, start: int = 0) -> pa.RecordBatch:
    texts = pa.array([f"row {row}" for row in range(rows)], pa.string())
    return _batch(number=pa.array(range(start, start + rows), pa.int64()), text=texts)


def test_small_batches_that_come_together_are_one_message() -> None:
    (message,) = _encode([_numbers(100, start) for start in range(10)])
    assert message.size < 10 * 100 * (8 + 4 + 7) + 1000


def test_joining_goes_as_far_as_the_target() -> None:
    batches = [_batch(number=pa.array(range(SMALL_BATCH // 8), pa.int64())) for _ in range(30)]
    messages = _encode(batches)
    assert max(message.size for message in messages) <= TARGET_SIZE + 1000
    assert len(messages) == 30 // (TARGET_SIZE // SMALL_BATCH) + 1


def test_batches_that_are_not_small_are_not_copied_together() -> None:
    batches = [_batch(number=pa.array(range(SMALL_BATCH // 8 + 1), pa.int64())) for _ in range(3)]
    sent = {part.address for message in _encode(batches) for part in message.body if isinstance(part, pa.Buffer)}
    assert sent == {batch["number"].buffers()[1].address for batch in batches}


def test_rows_keep_their_order_among_small_and_large_batches() -> None:
    sizes = [10, 10, SMALL_BATCH, 10, SMALL_BATCH, SMALL_BATCH, 1, 1, 0, 1]
    batches = [_numbers(size, 1000 * number) for number, size in enumerate(sizes)]
    _encode(batches)


def test_rows_without_columns_are_joined_too() -> None:
    batch = _numbers(3).select([])
    encoder = Encoder(batch.schema, LIMIT)
    (message,) = encoder.encode([batch, batch, batch])
    assert read_messages([encoder.schema(), message]).num_rows == 9


def test_a_batch_without_rows_is_no_message() -> None:
    encoder = Encoder(_numbers(0).schema, LIMIT)
    assert list(encoder.encode([_numbers(0), _numbers(9).slice(9)])) == []


def test_thousands_of_columns_that_are_compacted_and_joined_take_no_longer_each() -> None:
    views = pa.array(["x" * 40] * 1000, pa.string_view()).slice(5, 20)
    words = pa.DictionaryArray.from_arrays([0, 1] * 10, ["a", "b"])
    arrays = [views, words] * 2000
    batch = pa.RecordBatch.from_arrays(arrays, [str(number) for number in range(len(arrays))])
    encoder = Encoder(batch.schema, LIMIT)
    start = time.process_time()
    list(encoder.encode([batch, batch]))
    assert time.process_time() - start < 3


def _with_dictionary(values: Sequence[str], indices: Sequence[int | None]) -> pa.RecordBatch:
    column = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int16()), pa.array(values))
    return _batch(number=range(len(indices)), word=column)


def test_batches_of_one_dictionary_are_joined_and_of_others_are_not() -> None:
    first = _with_dictionary(["a", "b"], [0, 1, None])
    # As DataFusion's batches are: other objects, the same memory.
    again = pa.RecordBatch._import_from_c_capsule(*first.__arrow_c_array__())
    assert again["word"].dictionary is not first["word"].dictionary
    other = _with_dictionary(["c", "d"], [1, 0])

    messages = _encode([first, again, other, other, first])

    assert _kinds(messages) == 3 * [HeaderType.DICTIONARY_BATCH, HeaderType.RECORD_BATCH]


def test_a_large_batch_is_divided_evenly() -> None:
    rows = 5 * TARGET_SIZE // 8
    messages = _encode([_batch(number=pa.array(range(rows), pa.int64()))])
    sizes = [message.size for message in messages]
    assert 5 <= len(sizes) <= 6
    assert max(sizes) <= TARGET_SIZE + 1000
    assert min(sizes) > 0.8 * max(sizes)


def test_a_large_batch_has_its_dictionary_sent_once() -> None:
    rows = 3 * TARGET_SIZE // 2
    messages = _encode([_with_dictionary(["a", "b", "c"], [row % 3 for row in range(rows)])])
    assert _kinds(messages).count(HeaderType.DICTIONARY_BATCH) == 1
    assert len(messages) > 5


@pytest.mark.parametrize("limit", [SMALL_LIMIT, LIMIT])
@pytest.mark.parametrize("seed", range(10))
def test_no_message_goes_beyond_the_limit_however_uneven_the_rows(limit: int, seed: int) -> None:
    generator = random.Random(seed)
    texts = ["x" * generator.choice([0, 10, 1000, limit // 4, limit - 2000]) for _ in range(generator.randint(1, 20))]
    batch = _batch(
        text=texts,
        view=pa.array(reversed(texts), pa.string_view()) if limit == SMALL_LIMIT else range(len(texts)),
        lists=pa.array([[text[:100]] for text in texts], pa.list_(pa.string_view())),
        word=pa.array([text[: limit // 3] for text in texts]).dictionary_encode(),
    )
    if limit == SMALL_LIMIT:
        batch = batch.drop_columns("view")
    _encode([batch], limit)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["", "x" * LIMIT]),
        pa.array([[], ["x" * LIMIT]]),
        pa.array(["", "x" * LIMIT], pa.string_view()),
        pa.array(["", "x" * LIMIT]).dictionary_encode(),
        pa.array([{"a": "y"}, {"a": "x" * LIMIT}]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_row_larger_than_the_limit_is_an_error_that_names_column_and_size(column: pa.Array) -> None:
    batch = _batch(small=["a", "b"], large=column)
    encoder = Encoder(batch.schema, LIMIT)
    with pytest.raises(ResponseTooLarge, match=r"419\d{4} of them in column 'large', .* may have 41942\d\d:") as caught:
        list(encoder.encode([batch]))
    assert "max_message_size" in str(caught.value)
    # With a larger limit it is sent.
    _encode([batch], 2 * LIMIT)
    _encode([batch.slice(1)], 2 * LIMIT)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_the_size_of_a_row_is_its_own_and_not_that_of_its_batch(kind: pa.DataType) -> None:
    texts = ["y" * 1000] * 2000
    batch = _batch(small=texts, large=pa.array([None] * 1999 + ["x" * LIMIT], kind))
    with pytest.raises(ResponseTooLarge, match=r"a row takes 419\d{4} bytes, 419\d{4} of them in column 'large'"):
        list(Encoder(batch.schema, LIMIT).encode([batch]))


def test_columns_that_are_too_large_together_are_added_up() -> None:
    batch = _batch(a=["x" * (LIMIT // 2)], b=["x" * (LIMIT // 2)])
    with pytest.raises(ResponseTooLarge, match=r"a row takes 419\d{4} bytes, 209\d{4} of them in column 'a'"):
        list(Encoder(batch.schema, LIMIT).encode([batch]))


@pytest.mark.parametrize("nest", ["list view", "union of views", "runs of views"])
def test_columns_that_are_not_looked_into_are_divided_too(nest: str) -> None:
    rows = 2000
    texts = pa.array([f"{row:0100}" for row in range(rows)], pa.string_view())
    match nest:
        case "list view":
            column = pa.array([[row] * 10 for row in range(rows)], pa.list_view(pa.int64()))
        case "union of views":
            column = pa.UnionArray.from_sparse(pa.array([0] * rows, pa.int8()), [texts])
        case _:
            column = pa.RunEndEncodedArray.from_arrays(pa.array(range(1, rows + 1), pa.int32()), texts)
    encoder = Encoder(pa.schema([("column", column.type)]), SMALL_LIMIT)
    messages = [encoder.schema(), *encoder.encode([_batch(column=column)])]
    assert read_messages(messages).num_rows == rows


def test_a_schema_larger_than_the_limit_is_an_error() -> None:
    schema = pa.schema([pa.field("a", pa.int8(), metadata={"k": "v" * SMALL_LIMIT})])
    with pytest.raises(ResponseTooLarge, match="the schema takes"):
        Encoder(schema, SMALL_LIMIT).schema()


def test_a_dictionary_larger_than_the_limit_goes_in_parts() -> None:
    values = [f"{number:0500}" for number in range(3 * LIMIT // 500)]
    indices = [number * 7919 % len(values) for number in range(len(values))]
    messages = _encode([_with_dictionary(values, indices)])
    assert _kinds(messages).count(HeaderType.DICTIONARY_BATCH) > 2


def test_a_dictionary_larger_than_the_limit_of_which_all_parts_use_the_same_is_sent_as_they_need_it() -> None:
    """The first parts use all of it, too, and still do not fit."""
    values = [f"{number:0500}" for number in range(LIMIT // 400)]
    _encode([_with_dictionary(["a"], [0]), _with_dictionary(values, [*range(len(values))] * 2)])


@pytest.mark.parametrize("nest", ["dense union", "wide struct"])
def test_a_dictionary_larger_than_the_limit_that_cannot_be_reduced_is_an_error(nest: str) -> None:
    """What its indices would mean otherwise is chance: there is one that was sent before."""

    def batch(count: int) -> pa.RecordBatch:
        words = pa.DictionaryArray.from_arrays(range(count), [f"{number:0100}" for number in range(count)])
        match nest:
            case "dense union":
                codes, offsets = pa.array([0] * count, pa.int8()), pa.array(range(count), pa.int32())
                column = pa.UnionArray.from_dense(codes, offsets, [words])
            case _:
                # More metadata than is allowed for, and what comes to the limit without it.
                texts = pa.array(["x" * (SMALL_LIMIT // 110 - 6)] * (count // 2000) + ["x"])
                struct = pa.StructArray.from_arrays([texts] * 100, [str(field) for field in range(100)])
                column = pa.DictionaryArray.from_arrays([0] * count, struct)
        return _batch(column=column)

    encoder = Encoder(batch(2).schema, SMALL_LIMIT)
    list(encoder.encode([batch(2)]))
    with pytest.raises(ResponseTooLarge, match="column 'column'"):
        list(encoder.encode([batch(2000)]))


def test_of_a_dictionary_no_more_is_sent_than_is_used_until_that_comes_to_all_of_it() -> None:
    values = pa.array([f"{number:0100}" for number in range(SMALL_DICTIONARY // 10)])
    batches = [
        _batch(word=pa.DictionaryArray.from_arrays(pa.array([number, number + 1], pa.int32()), values))
        for number in range(0, len(values) - 1, 100)
    ]
    encoder = Encoder(batches[0].schema, LIMIT)
    dictionaries = [
        message.size
        for batch in batches * 100
        for message in encoder.encode([batch])
        if header_type(message.header) == HeaderType.DICTIONARY_BATCH
    ]
    *parts, whole = dictionaries
    assert max(parts) < 1000
    assert whole > values.nbytes
    assert values.nbytes / 2 < len(parts) * 208 <= values.nbytes


def test_compression_counts_for_the_limit() -> None:
    batch = _batch(text=["x" * (2 * LIMIT)])
    with pytest.raises(ResponseTooLarge):
        _encode([batch])
    for compression in ("lz4", "zstd"):
        (message,) = _encode([batch], compression=compression)
        assert message.size < LIMIT // 10


def test_views_leave_as_plain_text_and_bytes_where_that_is_asked_for() -> None:
    batch = _batch(a=pa.array(["x", None], pa.string_view()), b=pa.array([b"y", b""], pa.binary_view()), c=[1, 2])
    encoder = Encoder(batch.schema, LIMIT, expand_views=True)
    decoded = read_messages([encoder.schema(), *encoder.encode([batch])])
    assert decoded.schema.types == [pa.large_string(), pa.large_binary(), pa.int64()]
    assert decoded.to_pylist() == batch.to_pylist()
