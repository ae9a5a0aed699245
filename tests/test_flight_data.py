"""``FlightData`` that is serialized by hand is what protobuf serializes."""

import pyarrow as pa
import pytest

from worker.encoding.encode import Encoder
from worker.encoding.flight_data import serialize
from worker.message import Message
from worker.proto import Flight_pb2

# On both sides of where a length takes one more byte.
SIZES = [1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 5 * 1024 * 1024]


@pytest.mark.parametrize("header_size", [1, 127, 128, 16_383, 16_384])
@pytest.mark.parametrize("body_size", SIZES)
def test_the_bytes_are_protobufs_own(header_size: int, body_size: int) -> None:
    header, body = b"\x0a" * header_size, b"\x12" * body_size
    expected = Flight_pb2.FlightData(data_header=header, data_body=body).SerializeToString()
    assert serialize(Message(header, [body])) == expected


@pytest.mark.parametrize("header_size", [0, 1, 127, 128])
@pytest.mark.parametrize("body_size", [0, 1, 128])
def test_the_bytes_parse_as_what_was_serialized(header_size: int, body_size: int) -> None:
    """Also where a part is empty, which protobuf would leave out."""
    header, body = b"h" * header_size, b"b" * body_size
    parsed = Flight_pb2.FlightData.FromString(serialize(Message(header, [body])))
    assert parsed == Flight_pb2.FlightData(data_header=header, data_body=body)


@pytest.mark.parametrize(
    "parts", [[], [b""], [b"ab", b"", b"c"], [pa.py_buffer(b"ab"), b"\x00" * 6, pa.py_buffer(b"")]]
)
def test_the_parts_of_a_body_are_joined(parts: list[bytes | pa.Buffer]) -> None:
    parsed = Flight_pb2.FlightData.FromString(serialize(Message(b"header", parts)))
    assert parsed.data_header == b"header"
    assert parsed.data_body == b"".join(parts)


def test_the_messages_of_a_batch_are_protobufs_own() -> None:
    batch = pa.RecordBatch.from_pydict({"a": [1, 2, None], "b": pa.array(["x", "y", "x"]).dictionary_encode()})
    messages = list(Encoder(batch.schema, 4 << 20).encode([batch]))
    assert len(messages) == 2
    for message in messages:
        expected = Flight_pb2.FlightData(data_header=message.header, data_body=b"".join(message.body))
        assert serialize(message) == expected.SerializeToString()
