"""Messages of several partitions in one stream, and of one partition in several; and what is done at the same time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from worker.cluster.merge import Replay, interleaved, together
from worker.errors import QueryEnded, Unavailable
from worker.message import Message


def message(number: int) -> Message:
    return Message(str(number).encode(), [])


class Source:
    """Messages that come when they are let."""

    def __init__(self, *numbers: int, error: BaseException | None = None, is_endless: bool = False) -> None:
        self.made = 0
        self.closed = False
        self.more = asyncio.Semaphore(0)
        self._numbers = numbers
        self._error = error
        self._is_endless = is_endless

    async def messages(self) -> AsyncGenerator[Message, None]:
        try:
            for number in self._numbers:
                await self.more.acquire()
                self.made += 1
                yield message(number)
            if self._error is not None:
                await self.more.acquire()
                raise self._error
            while self._is_endless:
                self.made += 1
                yield message(0)
        finally:
            self.closed = True


async def numbers(messages: AsyncIterator[Message]) -> list[int]:
    return [int(each.header) async for each in messages]


async def test_work_is_done_at_the_same_time() -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def meet(mine: asyncio.Event, other: asyncio.Event) -> None:
        mine.set()
        await other.wait()

    await asyncio.wait_for(together([meet(first, second), meet(second, first)]), 2)
    await together([])


async def test_the_first_error_is_raised_alone_and_ends_the_rest() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
            raise KeyError("another")

    async def fail() -> None:
        await begun.wait()
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        await together([hang(), fail()])
    assert ended.is_set()


async def test_a_cancel_is_passed_on() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    working = asyncio.ensure_future(together([hang()]))
    await begun.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended.is_set()


async def test_work_that_waits_for_what_was_cancelled_has_not_been_done() -> None:
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()

    async def wait() -> None:
        await cancelled

    with pytest.raises(Unavailable, match="the worker was closed"):
        await together([wait()])


async def test_messages_come_as_they_are_made_those_of_a_partition_in_their_order() -> None:
    first, second = Source(1, 2), Source(3, 4)
    merged = interleaved({7: first.messages(), 8: second.messages()})
    for source, expected in ((second, (8, 3)), (first, (7, 1)), (first, (7, 2)), (second, (8, 4))):
        source.more.release()
        assert await anext(merged) == (expected[0], message(expected[1]))
    assert await anext(merged, None) is None
    assert first.closed
    assert second.closed
    assert [each async for each in interleaved({})] == []


async def test_an_error_comes_after_what_was_made_before_it() -> None:
    failing, other = Source(1, error=ValueError("it failed")), Source(2, 3)
    for source, times in ((failing, 2), (other, 1)):
        for _ in range(times):
            source.more.release()
    merged = interleaved({0: failing.messages(), 1: other.messages()})
    assert [await anext(merged), await anext(merged)] == [(0, message(1)), (1, message(2))]
    with pytest.raises(ValueError, match="it failed"):
        await anext(merged)
    assert failing.closed
    assert other.closed


async def test_a_partition_that_is_cut_short_by_a_cancel_is_an_error() -> None:
    source = Source(1, error=asyncio.CancelledError())
    source.more.release()
    source.more.release()
    merged = interleaved({0: source.messages()})
    assert await anext(merged) == (0, message(1))
    with pytest.raises(Unavailable):
        await anext(merged)


@pytest.mark.parametrize("partitions", [1, 10])
async def test_who_reads_no_further_closes_all_and_little_was_made_in_vain(partitions: int) -> None:
    sources = [Source(is_endless=True) for _ in range(partitions)]
    merged = interleaved({index: source.messages() for index, source in enumerate(sources)})
    await anext(merged)
    for _ in range(100):
        await asyncio.sleep(0)

    async def close() -> bool:
        await merged.aclose()
        return all(source.closed for source in sources)

    # No timeout here, which would cancel it: that helps a close that hangs.
    closing = asyncio.ensure_future(close())
    done, _ = await asyncio.wait([closing], timeout=2)
    assert done
    assert closing.result()
    assert sum(source.made for source in sources) <= partitions + 5


async def test_messages_are_made_once_for_all_readers() -> None:
    source = Source(1, 2, 3)
    replay = Replay(source.messages())
    running = asyncio.ensure_future(replay.run())
    early = replay.messages()
    for _ in range(2):
        source.more.release()
    assert [await anext(early), await anext(early)] == [message(1), message(2)]
    late = asyncio.ensure_future(numbers(replay.messages()))
    source.more.release()
    assert await late == [1, 2, 3]
    assert await numbers(early) == [3]
    assert await numbers(replay.messages()) == [1, 2, 3]
    await running
    assert source.made == 3


async def test_a_reader_that_goes_away_leaves_the_messages_to_others() -> None:
    source = Source(1, 2)
    replay = Replay(source.messages())
    running = asyncio.ensure_future(replay.run())
    source.more.release()
    gone = replay.messages()
    await anext(gone)
    await gone.aclose()
    source.more.release()
    assert await numbers(replay.messages()) == [1, 2]
    await running


async def test_every_reader_gets_the_error_after_the_messages() -> None:
    source = Source(1, error=ValueError("it failed"))
    replay = Replay(source.messages())
    running = asyncio.ensure_future(replay.run())
    early = replay.messages()
    source.more.release()
    source.more.release()
    for reader in (early, replay.messages()):
        assert await anext(reader) == message(1)
        with pytest.raises(ValueError, match="it failed"):
            await anext(reader)
    with pytest.raises(ValueError, match="it failed"):
        await running


async def test_a_closed_replay_ends_its_readers_with_an_error() -> None:
    source = Source(1, 2)
    replay = Replay(source.messages())
    running = asyncio.ensure_future(replay.run())
    source.more.release()
    reader = replay.messages()
    assert await anext(reader) == message(1)
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    replay.close()
    assert source.closed
    with pytest.raises((QueryEnded, asyncio.CancelledError)):
        await waiting
    with pytest.raises(QueryEnded):
        await anext(replay.messages())
