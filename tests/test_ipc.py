"""Embedded IPC: what the check lets through does not end the process that decodes it; what is refused says why."""

import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest
from datafusion import SessionContext
from type_cases import CASES

from worker import ipc, plan, plan_proto
from worker.message import (
    BODY_LENGTH_SLOT,
    CONTINUATION,
    HEADER_SLOT,
    LENGTH,
    LONG,
    PREFIX_BYTES,
    field,
    number,
    root,
    target,
)

LIMIT = 1 << 20

NUMBERS = pa.record_batch({"a": pa.array([1, 2, None]), "b": ["x", "yy", None]})


def stream(*batches: pa.RecordBatch, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def messages(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the metadata of each message is, and how long."""
    place = 0
    while size := LENGTH.unpack_from(data, place + 4)[0]:
        yield place + PREFIX_BYTES, size
        header = data[place + PREFIX_BYTES :]
        place += PREFIX_BYTES + size + number(header, root(header), BODY_LENGTH_SLOT, LONG)


def scan(data: bytes) -> bytes:
    """A plan with the stream inside, whose schema is not compared with the plan's."""
    node = plan_proto.PhysicalPlanNode()
    node.memory_scan.schema.CopyFrom(plan.schema_message(NUMBERS.schema))
    node.memory_scan.partitions.append(data)
    serialized: bytes = node.SerializeToString()
    return serialized


@pytest.mark.parametrize("name", CASES)
def test_every_type_passes_with_the_same_size_however_it_is_compressed(name: str) -> None:
    written = CASES[name].stream("whole")
    if not written.batches:
        pytest.skip("the case has no batch")
    sizes = {ipc.check(stream(*written.batches, compression=how), max_bytes=LIMIT) for how in (None, "lz4", "zstd")}
    assert len(sizes) == 1
    for partition in plan_proto.parse(written.plan).memory_scan.partitions:
        ipc.check(partition, max_bytes=LIMIT)


def test_an_empty_partition_and_a_stream_without_end_pass() -> None:
    assert ipc.check(b"", max_bytes=0) == 0
    data = stream(NUMBERS)
    assert ipc.check(data[:-PREFIX_BYTES], max_bytes=LIMIT) == ipc.check(data, max_bytes=LIMIT) > 0


def changed(data: bytes, message: int, slot: int, value: int) -> bytes:
    """The stream with another number in a field of a message's root."""
    start, _ = list(messages(data))[message]
    changed_data = bytearray(data)
    header = data[start:]
    LONG.pack_into(changed_data, start + field(header, root(header), slot), value)
    return bytes(changed_data)


def changed_pair(data: bytes, slot: int, index: int, value: int) -> bytes:
    """The stream with another number among the buffers or nodes of its first batch."""
    start, _ = list(messages(data))[1]
    header = data[start:]
    batch = target(header, field(header, root(header), HEADER_SLOT))
    place = start + target(header, field(header, batch, slot)) + LENGTH.size + index * LONG.size
    return data[:place] + LONG.pack(value) + data[place + LONG.size :]


def with_one_field_many_times(fields: int, name: str) -> bytes:
    """A schema's message all of whose fields are one and the same, as flatbuffers allow."""
    schema = pa.schema([pa.field(name, pa.int8())] + [pa.field("", pa.int8())] * (fields - 1))
    header: bytes = schema.serialize().to_pybytes()[PREFIX_BYTES:]
    start = target(header, field(header, target(header, field(header, root(header), HEADER_SLOT)), 6))
    places = [start + 4 + 4 * index for index in range(fields)]
    same = b"".join(LENGTH.pack(target(header, places[0]) - place) for place in places)
    header = header[: places[0]] + same + header[places[-1] + 4 :]
    return CONTINUATION + LENGTH.pack(len(header)) + header


def compressed(codec: str, plain: bytes, says: int) -> bytes:
    """A stream with one compressed buffer that says what it likes about its size."""
    batch = pa.record_batch({"c": pa.array([plain], pa.binary())})
    data = stream(batch, compression=codec)
    before, prefix, after = data.rpartition(LONG.pack(len(plain)))
    assert prefix
    return before + LONG.pack(says) + after


def nested(depth: int) -> pa.DataType:
    return pa.list_(nested(depth - 1)) if depth else pa.int8()


def empty(data_type: pa.DataType) -> bytes:
    return stream(pa.RecordBatch.from_arrays([pa.array([], data_type)], ["c"]))


GROWING = [
    pa.record_batch({"d": pa.array(["x" * 200 + str(n) for n in range(m)]).dictionary_encode()}) for m in range(1, 99)
]

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no marker": (lambda: stream(NUMBERS)[4:], "message 0 does not begin with a continuation marker and a length"),
    "metadata beyond the end": (lambda: stream(NUMBERS)[:100], r"message 0 says \d+ bytes of metadata, 92 are left"),
    "metadata of nothing": (
        lambda: CONTINUATION + LENGTH.pack(4) + b"\xff" * 4,
        "message 0 has metadata that is no fl",
    ),
    "body beyond the end": (
        lambda: changed(stream(NUMBERS), 1, BODY_LENGTH_SLOT, 1 << 40),
        r"message 1 says 1099511627776 bytes of body, \d+ are left",
    ),
    "a negative body": (lambda: changed(stream(NUMBERS), 1, BODY_LENGTH_SLOT, -8), "message 1 says -8 bytes of body"),
    "no schema": (
        lambda: stream(NUMBERS)[next(messages(stream(NUMBERS)))[1] + 8 :],
        "message 0: a stream is one schema",
    ),
    "two schemas": (lambda: stream(NUMBERS)[:-8] + stream(NUMBERS), "message 2: a stream is one schema"),
    "bytes after the end": (lambda: stream(NUMBERS) + b"x", "1 bytes follow the end of the stream"),
    "a buffer beyond the body": (
        lambda: changed_pair(stream(NUMBERS), 8, 3, 1 << 40),
        "message 1: it has a buffer outside",
    ),
    "a negative buffer": (lambda: changed_pair(stream(NUMBERS), 8, 3, -1), "message 1: it has a buffer outside"),
    "negative rows": (lambda: changed_pair(stream(NUMBERS), 6, 0, -1), "message 1: it has fewer rows than none"),
    "rows of nothing": (
        lambda: changed_pair(stream(pa.record_batch({"n": pa.nulls(3)})), 6, 0, 1 << 40),
        rf"message 1: it takes 879609302\d+ bytes, {LIMIT} are left",
    ),
    "one buffer many times": (
        lambda: stream(*[pa.record_batch({"c": pa.array(range(1000))})] * 200),
        r"message 132: it takes 8000 bytes, \d+ are left",
    ),
    "a zstd bomb": (
        lambda: compressed("zstd", bytes(40 << 20), 40 << 20),
        "message 1: it takes 41943048 bytes, 1048576 are",
    ),
    "an lz4 bomb": (
        lambda: compressed("lz4", bytes(80 << 20), 80),
        "message 1: it takes 8....... bytes, 1048576 are",
    ),
    "a claim": (
        lambda: compressed("zstd", bytes(999), 1 << 50),
        "message 1: it takes 11258999068426.. bytes, 1048576 are",
    ),
    "a negative claim": (
        lambda: compressed("lz4", bytes(999), -2),
        "message 1: it has a compressed buffer that says -2 b",
    ),
    "wide binary": (
        lambda: empty(pa.binary(1 << 30)),
        "column 'c' is of a type of 1073741824 bytes a row, 1048576 are",
    ),
    "wide lists": (
        lambda: empty(pa.list_(pa.list_(pa.int8(), 1000), 1000)),
        "column 'c' is of a type of 8000000 bytes",
    ),
    "deep types": (lambda: empty(nested(40)), "message 0: its types are nested more than 32 deep"),
    "many columns": (
        lambda: pa.schema([("", pa.int8())] * 10_001).serialize().to_pybytes(),
        "message 0: its schema has more than 10000 fields",
    ),
    "shared names": (lambda: with_one_field_many_times(5000, "x" * 1000), "message 0: its schema repeats texts again"),
    "a NUL": (
        lambda: empty(pa.timestamp("us", "Europe/Rome")).replace(b"Europe/Rome", b"Europe\0Rome"),
        r"message 0: a name in its schema has a NUL: b'Europe\\x00Rome'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lies_are_refused_and_named(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ipc.check(make(), max_bytes=LIMIT)


def test_copies_of_growing_dictionaries_are_counted() -> None:
    data = stream(*GROWING)
    size = ipc.check(data, max_bytes=LIMIT)
    with pytest.raises(ValueError, match=rf"message \d+: its deltas copy \d+ bytes, 16 times {size} are allowed"):
        ipc.check(data, max_bytes=size)


LITERALS = (
    "SELECT [1, 2, 3] AS a",
    "SELECT named_struct('a', 1, 'b', [NULL])",
    "SELECT arrow_cast(['a', 'b'], 'List(Dictionary(Int32, Utf8))')",
)


def literal(sql: str) -> tuple[plan_proto.Message, plan_proto.Message]:
    """A plan with one nested literal, and that."""
    message = plan_proto.parse(SessionContext().sql(sql).execution_plan().to_bytes())
    value = message.projection.expr[0].literal
    return message, getattr(value, value.WhichOneof("value"))


@pytest.mark.parametrize("sql", LITERALS)
def test_literals_pass_and_are_refused_where_they_lie(sql: str) -> None:
    _, value = literal(sql)
    size = ipc.check_nested(value, max_bytes=LIMIT)
    assert size > 0
    with pytest.raises(ValueError, match=r"it takes \d+ bytes, \d+ are left"):
        ipc.check_nested(value, max_bytes=size - 1)
    value.arrow_data = b""
    with pytest.raises(ValueError, match="it has a buffer outside of its body of 0 bytes"):
        ipc.check_nested(value, max_bytes=LIMIT)
    value.ipc_message = b""
    with pytest.raises(ValueError, match="its metadata is no flatbuffer"):
        ipc.check_nested(value, max_bytes=LIMIT)


# Decodes and executes each plan of its input, in 3 GiB, and says how many there were.
DECODER = """
import resource, struct, sys
from datafusion import ExecutionPlan, SessionContext
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
session, plans = SessionContext(), 0
while size := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(*struct.unpack("<I", size))
    plans += 1
    try:
        for batch in session.execute(ExecutionPlan.from_bytes(session, data), 0):
            batch.to_pyarrow()
    except BaseException:
        pass
print(plans)
"""


def decoded(plans: list[bytes]) -> int | None:
    """How many plans a process of its own has decoded, rightly or with an error; None if it did not survive them."""
    process = subprocess.run(
        [sys.executable, "-c", DECODER],
        input=b"".join(LENGTH.pack(len(data)) + data for data in plans),
        capture_output=True,
        timeout=120,
    )
    return int(process.stdout) if process.returncode == 0 else None


NUMBERS_OF_LIARS = (0, 1, -1, -2, 255, 65535, 1 << 24, 1 << 31, 1 << 32, 1 << 40, 1 << 62, -(1 << 31), -(1 << 63))


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with some changes: bits, numbers of 4 and 8 bytes in their places, pieces left out or doubled."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.randrange(len(mutant))
        match chance.randrange(5):
            case 0:
                mutant[place] ^= 1 << chance.randrange(8)
            case 1 | 2:
                place &= -8
                mutant[place : place + 8] = LONG.pack(chance.choice(NUMBERS_OF_LIARS))
            case 3:
                place &= -4
                mutant[place : place + 4] = struct.pack("<q", chance.choice(NUMBERS_OF_LIARS))[:4]
            case 4:
                piece = mutant[place : place + chance.randrange(1, 64)]
                mutant[place : place + len(piece)] = piece * chance.choice((0, 2))
    return bytes(mutant)


def test_what_passes_does_not_end_the_process() -> None:
    chance = random.Random(6)
    sources = [case.stream("whole").batches for case in CASES.values() if case.batches]
    passed = []
    for data in [stream(*batches, compression=how) for batches in sources for how in (None, "lz4", "zstd")] * 6:
        mutant = mutated(chance, data)
        try:
            ipc.check(mutant, max_bytes=LIMIT)
        except ValueError:
            continue
        passed.append(scan(mutant))
    for sql in LITERALS * 100:
        message, value = literal(sql)
        value.ipc_message = mutated(chance, value.ipc_message)
        try:
            ipc.check_nested(value, max_bytes=LIMIT)
        except ValueError:
            continue
        passed.append(message.SerializeToString())
    assert len(passed) > 200
    assert decoded(passed) == len(passed)


def test_what_is_refused_would_have_ended_the_process() -> None:
    data = changed(stream(NUMBERS), 1, BODY_LENGTH_SLOT, 1 << 40)
    assert decoded([scan(data)]) is None
