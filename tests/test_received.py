"""What was received of others: read by DataFusion as it was sent, from memory and from files."""

import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from struct import pack_into

import pyarrow as pa
import pytest
from datafusion import ExecutionPlan, SessionContext
from datafusion.object_store import LocalFileSystem
from exact import assert_exact
from type_cases import CASES

from worker import plan_proto
from worker.cluster.received import INLINE, Part, Received
from worker.config import Compression
from worker.encoding.encode import Encoder
from worker.errors import ExecutionFailed
from worker.message import HEADER_SLOT, HEADER_TYPE_SLOT, HeaderType, field, header_type, root, target

STORE = "exchange://received/"
COMPRESSIONS: Sequence[Compression] = ("none", "lz4", "zstd")

Messages = Sequence[tuple[bytes, Sequence[Part]]]
Rows = list[tuple[object, ...]]


def schema_of(batches: Sequence[pa.RecordBatch]) -> plan_proto.Message:
    """The ``datafusion_common.Schema`` of batches."""
    names = batches[0].schema.names
    # A table has no two columns of one name.
    numbered = [_numbered(batch) for batch in batches]
    plan = SessionContext().create_dataframe([numbered]).execution_plan().to_bytes()
    schema = plan_proto.parse(plan).memory_scan.schema
    for column, name in zip(schema.columns, names, strict=True):
        column.name = name
    return schema


def _numbered(batch: pa.RecordBatch) -> pa.RecordBatch:
    numbers = map(str, range(batch.num_columns))
    return batch.rename_columns(list(numbers)).replace_schema_metadata(batch.schema.metadata)


def encoded(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: Compression = "none", size: int = 4_000_000
) -> Messages:
    """As a worker sends it, a message a batch."""
    encoder = Encoder(schema, size, compression=compression)
    return [encoder.schema(), *(message for batch in batches for message in encoder.encode([batch]))]


def written(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: Compression = "none", deltas: bool = False
) -> Messages:
    """As pyarrow writes it."""
    options = pa.ipc.IpcWriteOptions(
        compression=None if compression == "none" else compression, emit_dictionary_deltas=deltas
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return messages_of(sink.getvalue())


def messages_of(stream: bytes | pa.Buffer) -> Messages:
    reader = pa.ipc.MessageReader.open_stream(stream)
    return [(m.metadata.to_pybytes(), [memoryview(m.body)] if m.body else []) for m in reader]


def written_in_rust(batches: Sequence[pa.RecordBatch]) -> Messages:
    """As DataFusion writes it into a plan."""
    plan = plan_proto.parse(SessionContext().create_dataframe([list(batches)]).execution_plan().to_bytes())
    return messages_of(plan.memory_scan.partitions[0])


def session(folder: Path) -> SessionContext:
    context = SessionContext()
    context.register_object_store("exchange://", LocalFileSystem(prefix=str(folder)), "received")
    # As the worker has it: partitions of a scan share their files otherwise.
    context.sql("SET datafusion.execution.enable_file_stream_work_stealing = false").collect()
    return context


def partitions(folder: Path, plan: plan_proto.Message) -> list[list[pa.RecordBatch]]:
    """The batches of every partition of a plan, as DataFusion makes them."""
    context = session(folder)
    decoded = ExecutionPlan.from_bytes(context, plan.SerializeToString())
    return [[b.to_pyarrow() for b in context.execute(decoded, p)] for p in range(decoded.partition_count)]


def files_of(plan: plan_proto.Message) -> list[list[str]]:
    return [[file.path for file in group.files] for group in plan.arrow_scan.base_conf.file_groups]


def batches_of(file: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(file)
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def rows(batches: Iterable[pa.RecordBatch]) -> Rows:
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def add(received: Received, partition: int, source: int, messages: Messages) -> None:
    for header, body in messages:
        received.add(partition, source, header, body)


@pytest.fixture(params=[False, True], ids=["memory", "files"])
def in_files(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("name", CASES)
def test_all_types_are_read_as_they_were_sent(tmp_path: Path, name: str, in_files: bool) -> None:
    stream = CASES[name].stream("whole")
    ways = [(way, compression) for way in (encoded, written) for compression in COMPRESSIONS]
    schema = schema_of(stream.batches or [pa.RecordBatch.from_pylist([], stream.schema)])
    sent = [way(stream.schema, stream.batches, compression) for way, compression in ways]
    # A table has batches, and no two columns of one name.
    if stream.batches and len(set(stream.schema.names)) == len(stream.schema):
        sent.append(written_in_rust(stream.batches))
    received = Received(schema, len(sent), tmp_path, "leaf")
    for partition, messages in enumerate(sent):
        add(received, partition, 0, messages)
    received.finish(to_files=in_files)
    plan = received.scan(STORE, None)
    assert plan_proto.kind(plan) == ("arrow_scan" if in_files else "memory_scan")
    # DataFusion's protobuf has no flag for ordered dictionaries, IPC streams have.
    expected = CASES[name].schema_alone if in_files else None
    made = [batch.cast(expected) for batch in stream.batches] if expected else stream.batches
    for batches in partitions(tmp_path, plan):
        table = pa.Table.from_batches(batches, None if batches else stream.schema)
        assert_exact(table, expected or stream.schema, made)
    for files in files_of(plan):
        # Another implementation reads them as well.
        read = [batch for file in files for batch in batches_of(tmp_path / file)]
        assert_exact(pa.Table.from_batches(read, stream.schema), stream.schema, stream.batches)


def batch(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64())})


def test_sources_come_in_any_order_each_in_its_own(tmp_path: Path, in_files: bool) -> None:
    sources = [[batch(source, n) for n in range(20)] for source in range(3)]
    received = Received(schema_of(sources[0]), 2, tmp_path, "leaf")
    messages = [encoded(batches[0].schema, batches) for batches in sources]
    for index, together in enumerate(zip(*messages, strict=True)):
        for source, (header, body) in enumerate(together):
            received.add(source % 2, source, header, body)
        if in_files and index % 5 == 0:
            received.flush()
            assert received.held == 0
    received.finish()
    even, odd = partitions(tmp_path, received.scan(STORE, None))
    assert [rows([b])[0] for b in odd] == [(1,)] * 20
    assert rows(odd) == rows(sources[1])
    for source in (0, 2):
        assert [b for b in even if b["n"][0].as_py() == source] == sources[source]
    assert [b["n"][0].as_py() for b in even] == [0, 2] * 20


def test_what_is_much_goes_to_files_and_what_is_little_does_not(tmp_path: Path) -> None:
    for size, kind in ((INLINE // 2, "memory_scan"), (INLINE + 8, "arrow_scan")):
        batches = [pa.record_batch({"n": pa.array(range(size // 8))})]
        received = Received(schema_of(batches), 1, tmp_path, kind)
        add(received, 0, 0, encoded(batches[0].schema, batches))
        assert size < received.held < size + 1000
        received.finish()
        plan = received.scan(STORE, None)
        assert plan_proto.kind(plan) == kind
        assert [rows(p) for p in partitions(tmp_path, plan)] == [rows(batches)]
    assert all(file.name.startswith("arrow_scan") for file in tmp_path.iterdir())


def test_the_folder_is_made_when_it_is_needed(tmp_path: Path, in_files: bool) -> None:
    folder = tmp_path / "made"
    received = Received(schema_of([batch()]), 1, folder, "leaf")
    add(received, 0, 0, encoded(batch().schema, [batch(1)]))
    received.finish(to_files=in_files)
    assert folder.exists() == received.is_in_files == in_files


def test_bodies_are_not_copied(tmp_path: Path) -> None:
    body = memoryview(bytes(8000))
    (schema, _), (header, _) = encoded(batch().schema, [batch(*range(1000))])
    received = Received(schema_of([batch()]), 1, tmp_path, "leaf")
    received.add(0, 0, memoryview(schema), [])
    tracemalloc.start()
    received.add(0, 0, memoryview(header), [body[:4000], body[4000:]])
    assert tracemalloc.get_traced_memory()[1] < 4000
    tracemalloc.stop()


def test_partitions_without_rows_are_empty(tmp_path: Path, in_files: bool) -> None:
    """Also such as have sent a schema alone, and a batch without rows."""
    received = Received(schema_of([batch()]), 5, tmp_path, "leaf")
    add(received, 1, 0, encoded(batch().schema, []))
    add(received, 2, 0, encoded(batch().schema, [batch(7)]))
    add(received, 3, 0, written(batch().schema, [batch(), batch(8), batch()]))
    received.finish(to_files=in_files)
    plan = received.scan(STORE, None)
    assert [rows(p) for p in partitions(tmp_path, plan)] == [[], [], [(7,)], [(8,)], []]
    assert len(list(tmp_path.iterdir())) == 2 * in_files


def test_a_leaf_that_nobody_sent_anything_for_is_empty(tmp_path: Path, in_files: bool) -> None:
    received = Received(schema_of([batch()]), 2, tmp_path, "leaf")
    received.finish(to_files=in_files)
    plan = received.scan(STORE, None)
    assert plan_proto.kind(plan) == ("arrow_scan" if in_files else "memory_scan")
    assert partitions(tmp_path, plan) == [[], []]


# --- Dictionaries


def words(first: Sequence[str], second: Sequence[str]) -> pa.RecordBatch:
    """A batch of two dictionaries, which both begin with the last value."""
    return pa.record_batch(
        {str(i): pa.array([v[-1], *v]).dictionary_encode() for i, v in enumerate((first, second))},
    )


# The first stays when the second is replaced, and the other way round.
WORDS = [
    words(["a", "b"], ["c", "d"]),
    words(["a", "b"], ["e", "f"]),
    words(["a", "b"], ["e", "f"]),
    words(["g", "h"], ["e", "f"]),
    words(["i", "j"], ["c", "d"]),
]


@pytest.mark.parametrize("flushed_after", [1, 2, 100])
@pytest.mark.parametrize("send", [encoded, written])
def test_dictionaries_that_are_replaced_stay_with_their_batches(
    tmp_path: Path, in_files: bool, send: Callable[..., Messages], flushed_after: int
) -> None:
    messages = send(WORDS[0].schema, WORDS)
    assert sum(header_type(header) == HeaderType.DICTIONARY_BATCH for header, _ in messages) == 6
    received = Received(schema_of(WORDS), 1, tmp_path, "leaf")
    for index, (header, body) in enumerate(messages):
        received.add(0, 0, header, body)
        if in_files and index % flushed_after == flushed_after - 1:
            received.flush()
    received.finish(to_files=in_files)
    plan = received.scan(STORE, None)
    assert [rows(p) for p in partitions(tmp_path, plan)] == [rows(WORDS)]
    assert len(list(tmp_path.iterdir())) == 4 * in_files
    # A file has one dictionary for an id, which is all that pyarrow reads.
    assert rows(b for files in files_of(plan) for file in files for b in batches_of(tmp_path / file)) == (
        rows(WORDS) if in_files else []
    )


def test_dictionaries_that_grow(tmp_path: Path, in_files: bool) -> None:
    batches = [
        pa.record_batch({"d": pa.DictionaryArray.from_arrays([n - 1, 0], list("abcdef"[:n]))}) for n in range(1, 6)
    ]
    messages = written(batches[0].schema, batches, deltas=True)
    received = Received(schema_of(batches), 1, tmp_path, "leaf")
    add(received, 0, 0, messages)
    received.finish(to_files=in_files)
    assert [rows(p) for p in partitions(tmp_path, received.scan(STORE, None))] == [rows(batches)]


def test_each_source_has_dictionaries_of_its_own(tmp_path: Path, in_files: bool) -> None:
    other = WORDS[::-1]
    received = Received(schema_of(WORDS), 1, tmp_path, "leaf")
    ways = encoded(WORDS[0].schema, WORDS), encoded(WORDS[0].schema, other)
    for one, two in zip(*ways, strict=True):
        received.add(0, 0, *one)
        received.add(0, 1, *two)
    received.finish(to_files=in_files)
    assert [rows(p) for p in partitions(tmp_path, received.scan(STORE, None))] == [rows(WORDS) + rows(other)]


def renumbered(messages: Messages) -> Iterator[tuple[bytes, Sequence[Part]]]:
    """With another id for the second dictionary, as another implementation may choose it."""
    for header, body in messages:
        changed = bytearray(header)
        table = target(header, field(header, root(header), HEADER_SLOT))
        if header_type(header) == HeaderType.SCHEMA:
            # The second of ``Schema.fields``, ``Field.dictionary``, ``DictionaryEncoding.id``.
            second = target(header, target(header, field(header, table, 6)) + 8)
            pack_into("<q", changed, field(header, target(header, field(header, second, 12)), 4), 7)
        elif header_type(header) == HeaderType.DICTIONARY_BATCH and (place := field(header, table, 4)):
            pack_into("<q", changed, place, 7)
        yield bytes(changed), body


def test_sources_may_number_dictionaries_otherwise(tmp_path: Path) -> None:
    """Then they are no one stream, so they go to files, however small."""
    received = Received(schema_of(WORDS), 1, tmp_path, "leaf")
    messages = encoded(WORDS[0].schema, WORDS)
    add(received, 0, 0, messages)
    add(received, 0, 1, list(renumbered(messages)))
    received.finish()
    plan = received.scan(STORE, None)
    assert [rows(p) for p in partitions(tmp_path, plan)] == [rows(WORDS) * 2]
    assert plan_proto.kind(plan) == "arrow_scan"


# --- In a plan


def hash_partitioning(count: int) -> plan_proto.Message:
    partitioning = plan_proto.PhysicalPlanNode().repartition.partitioning
    partitioning.hash.hash_expr.add().column.name = "n"
    partitioning.hash.partition_count = count
    return partitioning


def keyed(numbers: Iterable[int], count: int) -> list[list[pa.RecordBatch]]:
    """The numbers in as many partitions, as DataFusion deals them out by their hashes."""
    context = SessionContext()
    plan = plan_proto.PhysicalPlanNode()
    frame = context.create_dataframe([[batch(*numbers)]])
    plan.repartition.input.MergeFromString(frame.execution_plan().to_bytes())
    plan.repartition.partitioning.CopyFrom(hash_partitioning(count))
    decoded = ExecutionPlan.from_bytes(context, plan.SerializeToString())
    return [[b.to_pyarrow() for b in context.execute(decoded, p)] for p in range(count)]


def received_keyed(folder: Path, numbers: Iterable[int], count: int, name: str) -> Received:
    received = Received(schema_of([batch()]), count, folder, name)
    for partition, batches in enumerate(keyed(numbers, count)):
        add(received, partition, 0, encoded(batch().schema, batches))
    return received


def test_files_are_partitioned_as_the_plan_is_told(tmp_path: Path) -> None:
    received = received_keyed(tmp_path, range(100), 3, "leaf")
    received.finish(to_files=True)
    plan = ExecutionPlan.from_bytes(session(tmp_path), received.scan(STORE, hash_partitioning(3)).SerializeToString())
    assert (plan.output_partitioning.scheme, plan.partition_count) == ("Hash", 3)
    assert plan.output_partitioning.hash_expressions == ["n@0"]


def interleave(*scans: plan_proto.Message) -> plan_proto.Message:
    node = plan_proto.PhysicalPlanNode()
    for scan in scans:
        node.interleave.inputs.add().CopyFrom(scan)
    return node


def test_an_interleave_takes_two(tmp_path: Path) -> None:
    both = [received_keyed(tmp_path, range(start, start + 100), 3, str(start)) for start in (0, 1000)]
    for received in both:
        received.finish(to_files=True)
    read = partitions(tmp_path, interleave(*(received.scan(STORE, hash_partitioning(3)) for received in both)))
    assert all(read)
    assert [set(rows(p)) for p in read] == [set(rows(p)) for p in keyed([*range(100), *range(1000, 1100)], 3)]


def test_an_interleave_takes_none_from_memory(tmp_path: Path) -> None:
    """Which is why they can be sent to files."""
    received = received_keyed(tmp_path, range(10), 2, "leaf")
    received.finish()
    scan = received.scan(STORE, hash_partitioning(2))
    with pytest.raises(Exception, match="Not all InterleaveExec children have a consistent hash or range partitioning"):
        partitions(tmp_path, interleave(scan, scan))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) AS c, sum(t.n) AS s FROM t",
        "SELECT t.n % 7 AS k, count(*) AS c FROM t JOIN u ON t.n = u.n GROUP BY k ORDER BY k LIMIT 5",
        "SELECT t.n FROM t WHERE n IN (SELECT n FROM u) AND n > 10 ORDER BY n DESC",
        "SELECT n FROM t WHERE n = 5",
        "SELECT * FROM t UNION ALL SELECT * FROM u ORDER BY n",
        "SELECT t.n AS a, u.n AS b, row_number() OVER (ORDER BY t.n, u.n) AS r FROM t CROSS JOIN u WHERE t.n + u.n < 9",
    ],
)
def test_plans_work_over_it(tmp_path: Path, in_files: bool, query: str) -> None:
    """Whatever they ask it for, such as statistics and other projections."""
    context = session(tmp_path)
    tables = {"t": [[batch(*range(50))], [batch(*range(50, 90))]], "u": [[batch(*range(0, 90, 3))], []]}
    for name, parts in tables.items():
        context.register_record_batches(name, parts)
    frame = context.sql(query)
    plan = plan_proto.parse(frame.execution_plan().to_bytes())
    for index, node in enumerate([n for n in plan_proto.nodes(plan) if plan_proto.kind(n) == "memory_scan"]):
        received = Received(node.memory_scan.schema, len(node.memory_scan.partitions), tmp_path, str(index))
        for partition, stream in enumerate(node.memory_scan.partitions):
            add(received, partition, 0, messages_of(stream) if stream else [])
        received.finish(to_files=in_files)
        scan = received.scan(STORE, None)
        # The batches are of all columns, here of one.
        assert node.memory_scan.projection == [0]
        node.CopyFrom(scan)
    read = chain.from_iterable(partitions(tmp_path, plan))
    assert sorted(rows(read)) == sorted(rows(frame.collect()))


# --- Much of it


def test_much_of_it_is_not_in_memory(tmp_path: Path) -> None:
    (schema, _), (header, body) = encoded(batch().schema, [batch(*range(250_000))])
    size = sum(map(len, body))
    received = Received(schema_of([batch()]), 4, tmp_path, "leaf")
    tracemalloc.start()
    for partition in range(4):
        received.add(partition, 0, schema, [])
    for index in range(50):
        received.add(index % 4, 0, header, [b"".join(body)])
        if received.held > 5_000_000:
            received.flush()
    received.finish()
    assert tracemalloc.get_traced_memory()[1] < 5_000_000 + 2 * size
    tracemalloc.stop()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 50 * size == 100_000_000
    read = partitions(tmp_path, received.scan(STORE, None))
    assert [sum(b.num_rows for b in p) for p in read] == [250_000 * n for n in (13, 13, 12, 12)]
    assert [p[-1]["n"][-1].as_py() for p in read] == [249_999] * 4


def test_a_thread_writes_while_more_comes(tmp_path: Path) -> None:
    # Threads change places as often as they can.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _write_while_more_comes(tmp_path)
    finally:
        sys.setswitchinterval(interval)


def _write_while_more_comes(tmp_path: Path) -> None:
    received = Received(schema_of([batch()]), 3, tmp_path, "leaf")
    sent = [batch(*range(n, n + 50)) for n in range(3000)]
    with ThreadPoolExecutor(1) as thread:
        flushing = thread.submit(received.flush)
        for header, body in encoded(batch().schema, sent):
            for partition in range(3):
                received.add(partition, 0, header, body)
            if flushing.done():
                flushing.result()
                flushing = thread.submit(received.flush)
    received.finish()
    assert received.held == 0
    for read in partitions(tmp_path, received.scan(STORE, None)):
        assert read == sent


# --- What is wrong


def test_messages_may_not_be_padded(tmp_path: Path, in_files: bool) -> None:
    received = Received(schema_of([batch()]), 1, tmp_path, "leaf")
    for header, body in encoded(batch().schema, [batch(1, 2), batch(3)]):
        received.add(0, 0, header + bytes(4), body)
    received.finish(to_files=in_files)
    plan = received.scan(STORE, None)
    assert [rows(p) for p in partitions(tmp_path, plan)] == [[(1,), (2,), (3,)]]
    # Which pyarrow does not read unless all is at multiples of 8.
    assert [rows(batches_of(tmp_path / file)) for files in files_of(plan) for file in files] == (
        [[(1,), (2,), (3,)]] if in_files else []
    )


def test_nothing_is_known_of_the_rows(tmp_path: Path) -> None:
    """So that no plan is answered from statistics."""
    received = Received(schema_of([batch()]), 1, tmp_path, "leaf")
    received.finish(to_files=True)
    context = session(tmp_path)
    decoded = ExecutionPlan.from_bytes(context, received.scan(STORE, None).SerializeToString())
    statistics = plan_proto.parse(decoded.to_bytes(context)).arrow_scan.base_conf.statistics
    (column,) = statistics.column_stats
    known = [statistics.num_rows, statistics.total_byte_size, column.null_count, column.distinct_count]
    known += [column.min_value, column.max_value, column.sum_value, column.byte_size]
    absent = known[0].DESCRIPTOR.fields_by_name["precision_info"].enum_type.values_by_name["ABSENT"].number
    assert [precision.precision_info for precision in known] == [absent] * 8


def test_messages_that_have_not_what_they_say_are_refused(tmp_path: Path) -> None:
    received = Received(schema_of([batch()]), 1, tmp_path, "leaf")
    schema, (header, body) = encoded(batch().schema, [batch(1)])
    with pytest.raises(ExecutionFailed, match="before the schema"):
        received.add(0, 0, header, body)
    received.add(0, 0, *schema)
    with pytest.raises(ExecutionFailed, match="sent a message of 0 bytes whose metadata says 8"):
        received.add(0, 0, header, [])
    tensor = bytearray(header)
    tensor[field(header, root(header), HEADER_TYPE_SLOT)] = 4
    with pytest.raises(ExecutionFailed, match="a message of type 4"):
        received.add(0, 0, bytes(tensor), body)


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Also where the first part of it could."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    received = Received(schema_of([batch()]), 1, tmp_path, "leaf")
    add(received, 0, 0, encoded(batch().schema, [batch(*range(1000))] * 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            received.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert next(tmp_path.iterdir()).stat().st_size == 10_000
