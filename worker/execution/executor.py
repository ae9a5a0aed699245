"""Where plans are decoded and executed: the threads for it, the streams that are open, and work in the background."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
from datafusion import ExecutionPlan, RecordBatchStream, SessionContext

from worker import plan
from worker.config import MEBIBYTE, PlanLimits
from worker.durations import Durations
from worker.encoding.encode import Encoder
from worker.errors import Unavailable, WorkerBusy
from worker.execution.leftover import LeftoverCalls
from worker.execution.stream import PartitionStream, ReadThreads
from worker.message import Message
from worker.supervision.journal import Journal

T = TypeVar("T")

# Decoding holds the GIL, so that more threads make nothing faster. ``execute`` waits for a free thread of DataFusion's
# runtime; while other plans keep those busy for long, nothing that is decoded behind it could run either.
THREADS = 8

# Bytes of their stacks. Chains of operands are flat in a plan, and as deep as they are long in what is decoded. As much
# memory is used as there is of calls.
STACK = 512 * MEBIBYTE

# Plans of up to so many bytes are decoded on the event loop: a thread would hold the GIL, and the loop with it, for as
# long (0.1 to 0.5 ms), and to get there and back takes longer than that.
SMALL_PLAN = 8 * 1024

# A function that DataFusion still calls for who went away is looked for so often, and broken off.
LEFTOVER_SECONDS = 0.1


class Executor:
    """What the tasks of a worker share."""

    def __init__(self, limits: PlanLimits, *, max_streams: int, journal: Journal | None = None) -> None:
        """
        Args:
            limits: what a plan may hold.
            max_streams: how many partitions are executed and read at the same time.
            journal: where it is noted which plans run.
        """
        self.limits = limits
        self.journal = journal or Journal()
        self.users: set[object] = set()
        """The tasks that there are."""
        self.plans_decoded = 0
        self.partitions_executed = 0
        self.decoding = Durations()
        self._max_streams = max_streams
        self._places_taken = 0
        self._closed = False
        self._background: set[asyncio.Future[Any]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="worker-plan")
        self._read_threads = ReadThreads()
        self._streams: set[PartitionStream] = set()
        self._leftover = LeftoverCalls()
        self._looking: asyncio.TimerHandle | None = None

    @property
    def streams(self) -> int:
        """How many are open; from any thread."""
        return len(self._streams)

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """So many partitions are executed and read while the block lasts.

        Raises:
            WorkerBusy: that would be too many.
        """
        if self._places_taken + count > self._max_streams:
            raise WorkerBusy(
                f"the worker is busy: {self._places_taken} partitions are being read, and {count} more would be over "
                f"max_streams ({self._max_streams}): try again later"
            )
        self._places_taken += count
        try:
            yield
        finally:
            self._places_taken -= count

    def stream(self, executed: RecordBatchStream, instance: ExecutionPlan) -> PartitionStream:
        """What reads an executed partition of an instance.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        return PartitionStream(executed, instance, self._read_threads)

    @contextmanager
    def open(self, stream: PartitionStream) -> Iterator[PartitionStream]:
        """Counts a stream for as long as the block lasts, and closes it."""
        self._streams.add(stream)
        self.partitions_executed += 1
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.close()
            if stream.is_broken_off and self._looking is None:
                self._look_for_leftovers()

    async def messages(self, encoder: Encoder, batches: Sequence[pa.RecordBatch]) -> AsyncGenerator[Message, None]:
        """The messages of batches, encoded in a thread where that takes long."""
        messages = encoder.encode(batches)
        if encoder.takes_long(batches):
            while message := await self.in_thread(next, messages, None):
                yield message
        else:
            for message in messages:
                yield message

    async def decode(self, session: SessionContext, plan_bytes: bytes) -> ExecutionPlan:
        """A fresh instance of a plan, decoded in a thread if it is large."""
        self.count_decoded()
        return await self.in_thread_if(len(plan_bytes) > SMALL_PLAN, self.timed, plan.decode, session, plan_bytes)

    def count_decoded(self) -> None:
        """Counts a plan that is about to be decoded."""
        self.plans_decoded += 1

    def timed(self, decode: Callable[..., T], *arguments: Any) -> T:
        """What a function that decodes a plan returns; how long that takes is in the statistics. In any thread."""
        start = time.perf_counter()
        try:
            return decode(*arguments)
        finally:
            self.decoding.add(time.perf_counter() - start)

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """What a blocking function returns.

        Raises:
            Unavailable: the worker was closed.
        """
        if self._closed:
            raise Unavailable("the worker was closed")
        loop = asyncio.get_running_loop()
        # A thread is started in here, if it is.
        usual = threading.stack_size(STACK)
        try:
            return loop.run_in_executor(self._threads, function, *arguments)
        finally:
            threading.stack_size(usual)

    async def in_thread_if(self, takes_long: bool, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns, called here unless that would keep the event loop for long.

        Raises:
            Unavailable: the worker was closed.
        """
        return await self.in_thread(function, *arguments) if takes_long else function(*arguments)

    def in_background(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Runs what may outlive the request that caused it; ``close`` ends it."""
        running = asyncio.ensure_future(work)
        self._background.add(running)
        running.add_done_callback(self._background.discard)
        return running

    async def close(self) -> None:
        """Ends everything. Streams that are still open, and requests that come now, end with ``Unavailable``."""
        self._closed = True
        for stream in self._streams:
            stream.close()
        while self._background:
            for running in self._background:
                running.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._read_threads.close()

    def _look_for_leftovers(self) -> None:
        self._looking = None
        if self._leftover.look(self.users) and not self._closed:
            self._looking = asyncio.get_running_loop().call_later(LEFTOVER_SECONDS, self._look_for_leftovers)
