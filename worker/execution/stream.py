"""The batches of one executed partition, read ahead, and several at a time where they come fast."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
from datafusion import ExecutionPlan, RecordBatchStream

from worker import plan
from worker.encoding.encode import TARGET_SIZE
from worker.errors import Unavailable
from worker.execution.interrupt import Interruptible

# An awaited read costs 0.1 ms of wake-ups between DataFusion's threads and the event loop; one that blocks a thread, a
# fourth. A stream that finds no thread free is awaited, so that none ever waits for another to be read.
READ_THREADS = 8

# A stream flows while none of its reads takes longer. Only then is a thread blocked for it, and a batch held back for
# more to go with it: for as long again at most.
FLOW_SECONDS = 0.01

# So many fast reads make a flow: a result of one batch ends with the second.
READS_BEFORE_FLOW = 2

# Nodes that read about as much as they give. Others, such as a filter that finds no more rows, may compute for long in
# the midst of a flow, and what blocks a thread computes on, after the stream was closed, until DataFusion looks for
# signals: that is once a second. So they are awaited, which costs a plan that computes something little.
_STEADY_NODES = frozenset(
    {
        "CoalescePartitionsExec",
        "CooperativeExec",
        "DataSourceExec",
        "EmptyExec",
        "GlobalLimitExec",
        "LazyMemoryExec",
        "LocalLimitExec",
        "PlaceholderRowExec",
        "ProjectionExec",
        "UnionExec",
    }
)

# How much of a stream is read and not taken yet, before its last batch: reading goes no further.
READ_AHEAD_BYTES = TARGET_SIZE

# What one stream holds at most, if its batches are no larger: as much, and a batch more, both of what was taken and of
# what is read ahead, and a message that is joined, with gRPC's copy of it.
STREAM_BYTES = 6 * READ_AHEAD_BYTES


class ReadThreads:
    """Threads for reads that block, for whoever finds one free."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="worker-read")
        self._free = READ_THREADS

    def run(self, read: Callable[[], None]) -> "asyncio.Future[None] | None":
        """Starts a read in a thread; None if none is free."""
        if not self._free:
            return None
        self._free -= 1
        reading = self._pool.submit(read)
        loop = asyncio.get_running_loop()
        # Not when the future is done: that of asyncio may be cancelled while the thread goes on.
        reading.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        return asyncio.wrap_future(reading)

    def close(self) -> None:
        """Lets the threads end with what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _release(self) -> None:
        self._free += 1


class PartitionStream:
    """The batches of one executed partition, read ahead while those before are on their way."""

    def __init__(self, stream: RecordBatchStream, instance: ExecutionPlan, threads: ReadThreads) -> None:
        """
        Args:
            stream: an executed partition.
            instance: what it is a partition of.
            threads: for reads of a stream that flows.
        """
        # The inner stream: its ``__anext__`` is a future that runs already, the outer one's a coroutine to be awaited.
        self._stream = stream.rbs
        self._instance: ExecutionPlan | None = instance
        self._steady = False
        self._threads = threads
        self._batches: deque[pa.RecordBatch] = deque()
        self._fast_reads = 0
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self.is_broken_off = False
        """Whether it was closed in the midst of a read."""
        self._blocking = Interruptible()
        self._reading: asyncio.Future[Any] | None = self._start_reading()

    @property
    def ended_well(self) -> bool:
        """Whether it was read to its end, and DataFusion did not fail."""
        return self._ended and self._error is None and not self._batches

    async def read(self) -> list[pa.RecordBatch]:
        """The next batches: one, or as many as come close together; none after the last.

        Raises:
            ExecutionFailed, ResourcesExhausted, EnginePanicked: DataFusion failed.
            Unavailable: the stream was closed.
        """
        start = time.monotonic()
        while self._reading is not None and (self._reading.done() or not self._has_enough()):
            if not self._reading.done():
                left = start + FLOW_SECONDS - time.monotonic()
                if left <= 0:
                    # First this: a thread that reads looks at it after each batch, and ends with that.
                    self._fast_reads = -1
                    if self._batches:
                        self._fast_reads = 0
                        break
                await asyncio.wait((self._reading,), timeout=left if left > 0 else None)
            if self._closed:
                break
            if self._reading.done():
                self._finish(self._reading)
        if self._closed:
            raise Unavailable("the worker was closed")
        batches = []
        while self._batches:
            batches.append(self._batches.popleft())
        if not batches and self._error is not None:
            raise self._error
        if self._reading is None and not self._ended:
            self._reading = self._start_reading()
        return batches

    def close(self) -> None:
        """Stops DataFusion's work on this partition, unless it has ended."""
        self._closed = True
        self._blocking.interrupt()
        if self._reading is not None:
            self.is_broken_off = self.is_broken_off or not self._reading.done()
            let_go(self._reading)
        self._stream = self._instance = None
        self._batches.clear()

    def _has_enough(self) -> bool:
        if not self._batches or self._fast_reads < READS_BEFORE_FLOW:
            return bool(self._batches)
        size: int = sum(batch.get_total_buffer_size() for batch in list(self._batches))
        return size >= TARGET_SIZE

    def _start_reading(self) -> "asyncio.Future[Any]":
        if self._fast_reads >= READS_BEFORE_FLOW and self._is_steady():
            read = partial(self._read_blocking, self._stream, time.monotonic())
            reading = self._threads.run(partial(self._blocking.run, read))
            if reading is not None:
                return reading
        started: asyncio.Future[Any] = self._stream.__anext__()
        return started

    def _is_steady(self) -> bool:
        """Whether the plan gives batches without pause, once it does; found out when that first matters."""
        if self._instance is not None:
            self._steady = all(map(_is_steady, plan.walk(self._instance)))
            self._instance = None
        return self._steady

    def _finish(self, reading: "asyncio.Future[Any]") -> None:
        self._reading = None
        try:
            with plan.execution_errors():
                batch = reading.result()
                # A name that C has no string for is an error of the plan's, too.
                batch = None if batch is None else batch.to_pyarrow()
        except StopAsyncIteration:
            self._ended = True
        except BaseException as error:
            # What was read before comes first.
            self._ended, self._error = True, error
        else:
            self._fast_reads += 1
            if batch is not None:
                self._batches.append(batch)
        if not self._ended and not self._has_enough():
            self._reading = self._start_reading()

    def _read_blocking(self, stream: Any, start: float) -> None:
        """Reads, in a thread, until there is enough, or until the stream does not flow any more."""
        size = 0
        while size < READ_AHEAD_BYTES and not self._closed:
            try:
                batch = next(stream).to_pyarrow()
            except StopIteration:
                self._ended = True
                return
            self._batches.append(batch)
            size += batch.get_total_buffer_size()
            last, start = start, time.monotonic()
            if start - last > FLOW_SECONDS or self._fast_reads < 0:
                self._fast_reads = -1
                return


def _is_steady(node: ExecutionPlan) -> bool:
    description = node.display()
    # A scan with a predicate may leave out rows.
    return description.partition(":")[0].strip() in _STEADY_NODES and "predicate=" not in description


def let_go(read: "asyncio.Future[Any]") -> None:
    """Stops a read of a stream, or takes note of how it ended."""
    if not read.cancel() and not read.cancelled():
        read.exception()
