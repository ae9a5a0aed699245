"""Whatever the schema and the batches: Arrow's own reader makes the same of what the encoder sends."""

from collections.abc import Sequence
from typing import get_args

import pyarrow as pa
import pytest
from exact import assert_exact
from hypothesis import given
from hypothesis import strategies as st
from strategies import streams
from support import read_messages

from worker.config import Compression
from worker.encoding import dictionaries, encode
from worker.encoding.encode import Encoder
from worker.message import Message

Stream = tuple[pa.Schema, Sequence[pa.RecordBatch]]

LIMIT = 4 << 20


def _encoded(stream: Stream, compression: Compression = "none") -> list[Message]:
    schema, batches = stream
    encoder = Encoder(schema, LIMIT, compression=compression)
    return [encoder.schema(), *encoder.encode(batches)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "target_size",
    [encode.TARGET_SIZE, 500],
)
@given(
    stream=streams(),
    small_dictionary=st.sampled_from([dictionaries.SMALL_DICTIONARY, 0]),
    compression=st.sampled_from(get_args(Compression)),
)
def test_what_is_read_is_what_was_encoded(
    target_size: int, stream: Stream, small_dictionary: int, compression: Compression
) -> None:
    """However many batches are joined and divided, and whatever part of its dictionaries is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TARGET_SIZE", target_size)
        patch.setattr(dictionaries, "SMALL_DICTIONARY", small_dictionary)
        messages = _encoded(stream, compression)
    assert_exact(read_messages(messages), *stream)


def test_a_row_that_is_larger_than_the_target_is_sent_if_it_fits_the_limit() -> None:
    batch = pa.record_batch({"a": ["x" * ((encode.TARGET_SIZE + LIMIT) // 2)]})
    assert_exact(read_messages(_encoded((batch.schema, [batch]))), batch.schema, [batch])


def test_batches_are_sent_whose_dictionaries_cannot_be_joined() -> None:
    """Arrow takes one with NaN for another than itself, and does not join two with nulls among their values."""
    values = pa.array([float("nan"), None])
    batch = pa.record_batch({"a": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), values)})
    assert_exact(read_messages(_encoded((batch.schema, [batch, batch]))), batch.schema, [batch, batch])


_COUNT = 1_200_000
_WORDS = pa.array(["abc"] * _COUNT)
_LISTS = pa.ListArray.from_arrays(pa.array([*range(_COUNT), *[_COUNT] * _COUNT], pa.int32()), _WORDS)


@pytest.mark.parametrize(
    "shown",
    [_WORDS.slice(5, 0), _LISTS.slice(_COUNT), pa.StructArray.from_arrays([_LISTS], ["a"]).slice(_COUNT)],
    ids=["no rows", "empty lists", "empty lists in structs"],
)
def test_nothing_is_sent_of_what_is_in_no_row(shown: pa.Array) -> None:
    batch = pa.record_batch({"a": shown.slice(0, 9)})
    assert sum(message.size for message in _encoded((batch.schema, [batch]))) < 1000


def test_a_large_batch_of_lists_the_last_of_which_are_empty_is_sent() -> None:
    batch = pa.record_batch({"a": _LISTS})
    messages = _encoded((batch.schema, [batch]))
    assert read_messages(messages).equals(pa.Table.from_batches([batch]))
    assert sum(message.size for message in messages) < 1.05 * batch.nbytes


_NUMBERS, _INDICES = pa.array([1, 2, 3]), pa.array([0, 1], pa.int8())


@pytest.mark.parametrize(
    "distinct",
    [
        [pa.StructArray.from_arrays([_NUMBERS.slice(start, 2)], names=["a"]) for start in (0, 1)],
        [pa.FixedSizeListArray.from_arrays(_NUMBERS.slice(start, 2), 1) for start in (0, 1)],
        [
            pa.StructArray.from_arrays([pa.DictionaryArray.from_arrays(_INDICES, values)], names=["a"])
            for values in (pa.array(["a", "b"]), pa.array(["c", "d"]))
        ],
    ],
    ids=["struct", "fixed-size list", "dictionary"],
)
def test_dictionaries_that_share_memory_are_told_apart(distinct: list[pa.Array]) -> None:
    batches = [pa.record_batch({"a": pa.DictionaryArray.from_arrays(_INDICES, values)}) for values in distinct]
    assert_exact(read_messages(_encoded((batches[0].schema, batches))), batches[0].schema, batches)
