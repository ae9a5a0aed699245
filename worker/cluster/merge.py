"""Messages of several partitions as one stream, of one partition as several streams; and work done at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing

from worker.errors import QueryEnded, Unavailable
from worker.message import Message
from worker.session import is_cancellation

# Messages that wait to be sent. Each partition makes its next one while its last one waits.
READY_MESSAGES = 4

_ENDED = "the coordinator ended the query"


async def together(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Does all of it at the same time; when some of it fails, the rest is cancelled.

    Raises:
        Unavailable: some of it waited for what was cancelled, which the worker does when it is closed.
        Exception: the first that any of it raised, alone.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(_whole(part))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _whole(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except asyncio.CancelledError as error:
        if is_cancellation(error):
            raise
        # A task group takes this for an end like any other: half of something would be taken for the whole.
        raise Unavailable("the worker was closed") from error


async def interleaved(
    sources: Mapping[int, AsyncGenerator[Message, None]],
) -> AsyncGenerator[tuple[int, Message], None]:
    """What comes from any of several partitions, as it comes, with the partition. All are closed with it.

    Raises:
        Exception: the first that any of them raised, after what came before.
    """
    ready: asyncio.Queue[tuple[int, Message] | None] = asyncio.Queue(READY_MESSAGES)

    async def pump(partition: int, source: AsyncGenerator[Message, None]) -> None:
        async with aclosing(source):
            async for message in source:
                await ready.put((partition, message))

    async def pump_all() -> None:
        try:
            await together(pump(partition, source) for partition, source in sources.items())
        except asyncio.CancelledError:
            # Nobody reads on, and there may be no room for an end.
            raise
        except BaseException:
            await ready.put(None)
            raise
        await ready.put(None)

    pumping = asyncio.ensure_future(pump_all())
    try:
        while (item := await ready.get()) is not None:
            yield item
        await pumping
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
        # Its error has this frame in its traceback.
        del pumping


class Replay:
    """Messages that are made once and read from the start by any number of readers, at their own pace."""

    def __init__(self, source: AsyncGenerator[Message, None]) -> None:
        self._source = source
        self._messages: list[Message] = []
        self._error: BaseException | None = None
        self._ended = False
        self._more = asyncio.Event()

    async def run(self) -> None:
        """Makes the messages, to be run once; readers get its error."""
        try:
            async with aclosing(self._source) as source:
                async for message in source:
                    self._messages.append(message)
                    self._wake()
        except BaseException as error:
            # Readers are not cancelled with it, and must not take this for the end.
            self._error = QueryEnded(_ENDED) if isinstance(error, asyncio.CancelledError) else error
            raise
        finally:
            self._ended = True
            self._wake()

    async def messages(self) -> AsyncGenerator[Message, None]:
        """All messages, those to come too."""
        place = 0
        while True:
            while place < len(self._messages):
                yield self._messages[place]
                place += 1
            if self._ended:
                break
            await self._more.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Lets go of everything, to be called when nobody will read on; who does gets an error."""
        self._messages.clear()
        # Its traceback leads back here.
        self._error = QueryEnded(_ENDED)
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
