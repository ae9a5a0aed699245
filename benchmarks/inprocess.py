"""What the worker does with a result before gRPC gets it, in this process: the parts of the wall time."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pyarrow as pa
from datafusion import ExecutionPlan

from benchmarks.plans import Case
from benchmarks.wire import LARGEST
from worker import SessionStateBuilder, keep_freed_memory
from worker.encoding import flight_data
from worker.encoding.encode import Encoder
from worker.execution.stream import READ_AHEAD_BYTES

Use: TypeAlias = Callable[[Iterable[pa.RecordBatch]], None]


def read_seconds(case: Case) -> float:
    """DataFusion alone: its batches are read and dropped."""
    return _seconds(case, _read)


def encode_seconds(case: Case) -> float:
    """The same, and each batch encoded into the bytes that gRPC would send."""
    return _seconds(case, _encode)


def _seconds(case: Case, use: Use) -> float:
    """All partitions at once, each in a thread."""
    keep_freed_memory()
    with ThreadPoolExecutor(case.partitions) as threads:
        start = time.perf_counter()
        list(threads.map(lambda partition: use(_batches(case.plan, partition)), range(case.partitions)))
        return time.perf_counter() - start


def _batches(plan: bytes, partition: int) -> Iterator[pa.RecordBatch]:
    session = SessionStateBuilder().build()
    return (batch.to_pyarrow() for batch in session.execute(ExecutionPlan.from_bytes(session, plan), partition))


def _read(batches: Iterable[pa.RecordBatch]) -> None:
    for _batch in batches:
        pass


def _encode(batches: Iterable[pa.RecordBatch]) -> None:
    encoder = None
    for group in _groups(batches):
        encoder = encoder or Encoder(group[0].schema, LARGEST)
        for message in encoder.encode(group):
            flight_data.serialize(message)


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """As many batches together as are read ahead of who sends them."""
    group: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += batch.get_total_buffer_size()
        if size >= READ_AHEAD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
