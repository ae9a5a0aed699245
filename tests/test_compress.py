"""Compressed messages: what Arrow's own reader makes of them, and that nothing gets larger."""

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from support import read_messages
from test_encode import COLUMNS

from worker.encoding.compress import Codec, Compressor
from worker.encoding.encode import Encoder
from worker.message import HeaderType, Message, body_length, header_type

FRAMES: dict[Codec, bytes] = {"lz4": bytes.fromhex("04224d18"), "zstd": bytes.fromhex("28b52ffd")}

ROWS = 1000

LIMIT = 1 << 30


def _batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def _encode(batch: pa.RecordBatch) -> list[Message]:
    return list(Encoder(batch.schema, LIMIT).encode([batch]))


def _decode(schema: pa.Schema, messages: Iterable[Message]) -> pa.Table:
    return read_messages([Encoder(schema, LIMIT).schema(), *messages])


def _random(size: int) -> pa.Array:
    return pa.Array.from_buffers(pa.uint8(), size, [None, pa.py_buffer(random.Random(size).randbytes(size))])


def _zeros(size: int) -> pa.Array:
    return pa.Array.from_buffers(pa.uint8(), size, [None, pa.py_buffer(bytes(size))])


def _dictionary(values: int, rows: int) -> pa.DictionaryArray:
    indices = pa.array([row % values for row in range(rows)], pa.int16())
    return pa.DictionaryArray.from_arrays(indices, [f"word {value} of {values}" for value in range(values)])


@pytest.fixture(params=FRAMES)
def codec(request: pytest.FixtureRequest) -> Codec:
    name: Codec = request.param
    return name


@pytest.fixture
def compressor(codec: Codec) -> Compressor:
    return Compressor(codec)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
@pytest.mark.parametrize("part", [slice(None), slice(3, ROWS - 1)], ids=["whole", "sliced"])
def test_batches_of_a_type_come_back(compressor: Compressor, column: pa.Array, part: slice) -> None:
    length = len(range(ROWS)[part])
    batch = _batch(column=pa.concat_arrays([column] * (ROWS // len(column)))).slice(part.start or 0, length)
    assert batch.num_rows == length
    plain = _encode(batch)
    compressed = [compressor.compress(message) for message in plain]

    assert _decode(batch.schema, compressed).equals(pa.Table.from_batches([batch]))
    assert compressed[-1].size < plain[-1].size or not body_length(plain[-1].header)
    for before, after in zip(plain, compressed, strict=True):
        assert header_type(after.header) == header_type(before.header)
        assert len(after.header) % 8 == 0
        assert sum(map(len, after.body)) == body_length(after.header)
        assert after.size <= before.size


def test_a_buffer_that_does_not_shrink_is_stored_behind_minus_one(codec: Codec, compressor: Compressor) -> None:
    size = 20_002
    batch = _batch(zeros=_zeros(size), noise=_random(size))
    (plain,) = _encode(batch)

    compressed = compressor.compress(plain)

    body = b"".join(compressed.body)
    stored = b"\xff" * 8 + batch["noise"].buffers()[1].to_pybytes() + bytes(6)
    assert body[:8] == size.to_bytes(8, "little")
    assert body[8:12] == FRAMES[codec]
    assert body.endswith(stored)
    assert len(body) - len(stored) < 200
    assert _decode(batch.schema, [compressed]).to_batches() == [batch]


def test_what_is_stored_as_it_was_is_not_copied(compressor: Compressor) -> None:
    batch = _batch(noise=_random(20_000), zeros=_zeros(20_000))
    (plain,) = _encode(batch)
    address = batch["noise"].buffers()[1].address
    assert address in {part.address for part in compressor.compress(plain).body if isinstance(part, pa.Buffer)}


@pytest.mark.parametrize(
    "batch",
    [
        _batch(noise=_random(20_000), more=_random(40_000).slice(1, 20_000)),
        _batch(noise=_random(20_000), empty=pa.nulls(20_000)),
        _batch(a=[1], b=["x"], c=[None]),
        _batch(a=pa.array([], pa.int64()), b=pa.array([], pa.string())),
        _batch(a=["x", "y"]).slice(2),
        _batch(a=[1, 2, 3]).select([]),
    ],
    ids=["noise", "noise and nulls", "a row", "no rows", "none of some rows", "no columns"],
)
def test_a_message_that_would_not_shrink_is_the_same(compressor: Compressor, batch: pa.RecordBatch) -> None:
    for message in _encode(batch):
        assert compressor.compress(message) is message


def test_no_message_gets_larger_however_little_would_be_saved(compressor: Compressor) -> None:
    """The metadata grows, so that a body has to shrink by more."""
    changed = 0
    for size in range(1, 300):
        batch = _batch(zeros=_zeros(size), noise=_random(size))
        (plain,) = _encode(batch)
        compressed = compressor.compress(plain)
        changed += compressed is not plain
        assert compressed is plain or compressed.size < plain.size
        assert _decode(batch.schema, [compressed]).to_batches() == [batch]
    assert 100 < changed < 200


def test_dictionaries_and_their_indices_are_compressed(compressor: Compressor) -> None:
    values = pa.array([f"a word, number {number}" for number in range(1000)])
    batch = _batch(
        d=pa.DictionaryArray.from_arrays(pa.array([number % 7 for number in range(5000)], pa.int32()), values)
    )
    plain = _encode(batch)

    compressed = [compressor.compress(message) for message in plain]

    assert [header_type(header) for header, _ in compressed] == [HeaderType.DICTIONARY_BATCH, HeaderType.RECORD_BATCH]
    assert all(after.size < 0.6 * before.size for before, after in zip(plain, compressed, strict=True))
    assert _decode(batch.schema, compressed).to_batches() == [batch]


@pytest.mark.parametrize("which", [0, 1], ids=["dictionary", "indices"])
def test_plain_and_compressed_messages_go_together(compressor: Compressor, which: int) -> None:
    values = pa.array([f"a word, number {number}" for number in range(1000)])
    batch = _batch(
        d=pa.DictionaryArray.from_arrays(pa.array([number % 7 for number in range(5000)], pa.int32()), values)
    )
    messages = _encode(batch)
    messages[which] = compressor.compress(messages[which])
    assert _decode(batch.schema, messages).to_batches() == [batch]


def test_a_dictionary_of_dictionaries_comes_back_with_the_ids_it_had(compressor: Compressor) -> None:
    inner = pa.StructArray.from_arrays([_dictionary(100, 500), _dictionary(50, 500)], ["a", "b"])
    batch = _batch(d=pa.DictionaryArray.from_arrays(pa.array([None, *range(500)] * 2, pa.int16()), inner))
    plain = _encode(batch)
    compressed = [compressor.compress(message) for message in plain]
    assert len(compressed) == 4
    assert all(after.size < before.size for before, after in zip(plain, compressed, strict=True))
    assert _decode(batch.schema, compressed).to_batches() == [batch]


def test_views_in_several_buffers_come_back(compressor: Compressor) -> None:
    words = [pa.array([f"too long for a view, {part} {n}" for n in range(300)], pa.string_view()) for part in range(5)]
    views = pa.concat_arrays(words)
    assert len(views.buffers()) == 2 + 5
    batch = _batch(views=views, number=pa.array(range(1500)), short=pa.array(["x"] * 1500, pa.string_view()))
    (plain,) = _encode(batch)
    compressed = compressor.compress(plain)
    assert compressed.size < 0.6 * plain.size
    assert _decode(batch.schema, [compressed]).to_batches() == [batch]


def test_threads_may_share_a_compressor(compressor: Compressor) -> None:
    messages = [_encode(_batch(a=range(number, 20_000), b=_zeros(20_000 - number)))[0] for number in range(16)]
    alone = [compressor.compress(message) for message in messages]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(compressor.compress, messages * 4))
    assert [(header, b"".join(body)) for header, body in together] == [
        (header, b"".join(body)) for header, body in alone * 4
    ]
