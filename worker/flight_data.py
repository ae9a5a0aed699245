"""``FlightData`` messages as bytes, without protobuf objects: the hot path of everything that is sent."""

from worker.message import Message

# Tags of ``FlightData.data_header`` (2) and ``FlightData.data_body`` (1000): number and wire type 2, as varints.
_HEADER_TAG = b"\x12"
_BODY_TAG = b"\xc2\x3e"


def serialize(message: Message) -> bytes:
    """The serialized ``FlightData`` of an IPC message; joining its parts is the only copy made of a batch."""
    header, body = message
    return b"".join((_HEADER_TAG, _varint(len(header)), header, _BODY_TAG, _varint(sum(map(len, body))), *body))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
