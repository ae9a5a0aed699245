"""Whatever the schema and the batches: Arrow's own reader makes the same of what the encoder sends."""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pytest
from exact import assert_exact
from hypothesis import given
from strategies import streams

from worker.encode import Encoder
from worker.message import Message

Stream = tuple[pa.Schema, Sequence[pa.RecordBatch]]


def _encoded(schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> list[Message]:
    encoder = Encoder(schema, 4 << 20)
    return [encoder.schema(), *encoder.encode(batches)]


def _read(messages: Iterable[Message]) -> pa.Table:
    framed = b"".join(
        b"\xff\xff\xff\xff" + len(header).to_bytes(4, "little") + header + b"".join(body) for header, body in messages
    )
    with pa.ipc.open_stream(framed) as reader:
        return reader.read_all()


@pytest.mark.timeout(1800)
@given(streams())
def test_what_is_read_is_what_was_encoded(stream: Stream) -> None:
    schema, batches = stream
    assert_exact(_read(_encoded(schema, batches)), schema, batches)
