"""A client that goes on with its query, whatever others do to the worker."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
from datafusion import SessionContext

from worker.client import WorkerClient

# A worker that has died is asked again after a moment.
QUERY_SECONDS = 60.0
RETRY_SECONDS = 0.05
PAUSE_SECONDS = 0.05

QUERY = "SELECT value % 7 AS k, sum(value) AS s FROM range(0, 100000) WHERE value % 3 = 1 GROUP BY 1 ORDER BY 1"
ROWS = [(k, sum(value for value in range(100_000) if value % 3 == 1 and value % 7 == k)) for k in range(7)]


class Customer:
    """A client that means well, and knows what the rows are."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._plan = SessionContext().sql(QUERY).execution_plan()
        self.answers = 0
        self.retries = 0
        self.slowest = 0.0
        self.problems: list[str] = []

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """While the block lasts, it asks the same over and over."""
        asking = asyncio.ensure_future(self._go_on())
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.wait((asking,))
        if not asking.cancelled():
            asking.result()

    async def wait(self) -> None:
        """Asks until there is an answer."""
        while True:
            # Each time over a new connection: one that was refused is not tried again for a second or more.
            async with WorkerClient(self._url, headers={"authorization": "Bearer customer"}) as client:
                if await self._ask(client):
                    return
            self.retries += 1
            await asyncio.sleep(RETRY_SECONDS)

    async def _go_on(self) -> None:
        while True:
            await self.wait()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, client: WorkerClient) -> bool:
        """Whether the worker was there."""
        rows: list[tuple[int, int]] = []
        start = time.monotonic()
        try:
            async with aclosing(client.execute(self._plan, timeout=QUERY_SECONDS)) as batches:
                async for batch in batches:
                    rows += zip(*batch.to_pydict().values(), strict=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            self.problems.append(f"the client beside was answered with {error.code().name}: {error.details()}")
            return True
        if rows != ROWS:
            self.problems.append(f"the client beside got wrong rows: {rows}")
        self.answers += 1
        self.slowest = max(self.slowest, time.monotonic() - start)
        return True
