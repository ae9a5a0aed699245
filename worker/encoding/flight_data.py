"""``FlightData`` messages as bytes, without protobuf objects: the hot path of everything that is sent and fetched."""

from worker.errors import InvalidRequest
from worker.message import Message

# Tags of ``FlightData.data_header`` (2), ``app_metadata`` (3) and ``data_body`` (1000): number and wire type 2, as
# varints.
_HEADER_TAG = b"\x12"
_METADATA_TAG = b"\x1a"
_BODY_TAG = b"\xc2\x3e"

_HEADER, _METADATA, _BODY = 2, 3, 1000


def serialize(message: Message, app_metadata: bytes = b"") -> bytes:
    """The serialized ``FlightData`` of an IPC message; joining its parts is the only copy made of a batch."""
    header, body = message
    metadata = (_METADATA_TAG, _varint(len(app_metadata)), app_metadata) if app_metadata else ()
    size = sum(map(len, body))
    return b"".join((_HEADER_TAG, _varint(len(header)), header, *metadata, _BODY_TAG, _varint(size), *body))


def parse(data: bytes) -> tuple[memoryview, memoryview, memoryview]:
    """``data_header``, ``app_metadata`` and ``data_body`` of a serialized ``FlightData``, uncopied.

    Raises:
        InvalidRequest: it is none.
    """
    view = memoryview(data)
    fields = {_HEADER: view[:0], _METADATA: view[:0], _BODY: view[:0]}
    place, end = 0, len(data)
    try:
        while place < end:
            tag, place = _read_varint(data, place)
            match tag & 7:
                case 2:
                    size, place = _read_varint(data, place)
                    fields[tag >> 3] = view[place : place + size]
                    place += size
                case 0:
                    _, place = _read_varint(data, place)
                case 1:
                    place += 8
                case 5:
                    place += 4
                case _:
                    raise IndexError
    except IndexError:
        place = end + 1
    if place != end:
        raise InvalidRequest(f"{len(data)} bytes that were received are no FlightData message")
    return fields[_HEADER], fields[_METADATA], fields[_BODY]


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number, and the place after it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
        if shift > 63:
            raise IndexError
