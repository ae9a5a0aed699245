"""Messages taken in as they come, in memory up to a limit and in files beyond it, and the scan of them."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from datafusion import SessionContext
from datafusion.object_store import LocalFileSystem

from worker.cluster.folder import ExchangeFolder
from worker.cluster.received import INLINE, Received
from worker.execution.executor import Executor
from worker.message import Bytes
from worker.plan_proto import Message as PlanMessage
from worker.policy import EXCHANGE


class Store:
    """A folder for the files of a task, which its session alone reads."""

    def __init__(self, folder: Path, session: SessionContext, exchange: ExchangeFolder) -> None:
        """
        Args:
            folder: made when it is first needed.
            session: the task's.
            exchange: the folder that it is in.
        """
        self.folder = folder
        self._exchange = exchange
        self._size = 0
        self.url = f"{EXCHANGE}{folder.name}/"
        self._session = session
        self._is_registered = False
        self._is_made = False
        self._writing: set[asyncio.Future[None]] = set()

    async def write(self, executor: Executor, write: Callable[[], None]) -> None:
        """Writes in a thread, which goes on if who waits for it is cancelled."""
        self._is_made = True
        writing = executor.in_thread(write)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        await asyncio.shield(writing)

    def take(self, size: int) -> None:
        """Counts what was written.

        Raises:
            ResourcesExhausted: as ``ExchangeFolder.take``.
        """
        self._size += size
        self._exchange.take(size)

    def register(self) -> None:
        """Lets the session read it, once it is there."""
        if not self._is_registered:
            self._session.register_object_store(EXCHANGE, LocalFileSystem(prefix=str(self.folder)), self.folder.name)
            self._is_registered = True

    async def close(self) -> None:
        """Deletes it, once nothing is written any more, and lets go of the session."""
        if self._writing:
            await asyncio.wait(self._writing)
        if self._is_registered:
            self._session.deregister_object_store(EXCHANGE, self.folder.name)
        del self._session
        if self._is_made:
            await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        self._exchange.take(-self._size)
        self._size = 0


class Intake:
    """The input of one leaf, while it comes."""

    def __init__(
        self, schema: PlanMessage, partitions: int, store: Store, name: str, executor: Executor, held_bytes: int
    ) -> None:
        """
        Args:
            schema: the leaf's ``datafusion_common.Schema``.
            partitions: how many it has.
            store: for what is not held in memory.
            name: one that no other intake of the store has.
            executor: whose threads write.
            held_bytes: beyond so many, what is held in memory is written to files.
        """
        self._received = Received(schema, partitions, store.folder, name)
        self._store = store
        self._executor = executor
        self._held_bytes = held_bytes
        self._writing = asyncio.Lock()

    async def add(self, partition: int, source: int, header: bytes, body: Sequence[Bytes]) -> None:
        """Adds a message, as ``Received.add``; waits while there is too much in memory."""
        self._received.add(partition, source, header, body)
        while self._received.held > self._held_bytes:
            async with self._writing:
                if self._received.held > self._held_bytes:
                    await self._write(self._received.flush)

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._received.held

    async def scan(self, partitioning: PlanMessage | None) -> PlanMessage:
        """A scan of everything that was added.

        Args:
            partitioning: what the plan has to be told of how rows are distributed over the partitions, if anything.
        """
        to_files = partitioning is not None
        finish = partial(self._received.finish, to_files=to_files)
        if self._received.held > INLINE or to_files or self._received.is_in_files:
            await self._write(finish)
        else:
            finish()
        if self._received.is_in_files:
            self._store.register()
        return self._received.scan(self._store.url, partitioning)

    def close(self) -> None:
        """Lets go of what is in memory. A fetch that fails is easily in a circle with its error, for long."""
        self._received.clear()

    async def _write(self, write: Callable[[], None]) -> None:
        before = self._received.written
        await self._store.write(self._executor, write)
        self._store.take(self._received.written - before)
