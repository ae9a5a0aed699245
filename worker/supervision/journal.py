"""What a worker notes of the plans that it decodes and executes, for a supervisor that outlives it."""

import asyncio
import hashlib
import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from worker.errors import PlanQuarantined
from worker.supervision.board import DIGEST_BYTES, ENTRIES, Board
from worker.ticket import QUERY_ID_BYTES, StageKey

# Of so many plans, the partitions that were read to their end are known, until all of the plan's have been.
PARTLY_READ = 1024

# A supervisor reads of a panic some milliseconds after it, unless the machine is busy.
PANIC_SECONDS = 0.5


def _go_on() -> None:
    """Nobody would replace the process."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A plan as it is noted."""

    digest: bytes
    text: str


class Journal:
    """Notes what runs; a plan takes some microseconds, beside its digest. May be used in any thread."""

    def __init__(self, board: Board | None = None, give_up: Callable[[], None] | None = None) -> None:
        """
        Args:
            board: where it is noted, for another process to read.
            give_up: has that replace this process, which nothing else puts right.
        """
        self.give_up = give_up or _go_on
        self._board = board or Board()
        self._is_read = board is not None
        self._free = deque(range(ENTRIES))
        self._started: dict[int, float] = {}
        self._numbers = itertools.count()
        self._partly_read: OrderedDict[bytes, set[int]] = OrderedDict()

    def admit(self, plan: bytes, key: StageKey | None) -> Noted:
        """What a plan is noted as. Takes 1 ms a megabyte.

        Args:
            plan: as it was received; the id of its query, which a retry changes, does not count.
            key: which query, stage and task it is of.

        Raises:
            PlanQuarantined: it is refused for now.
        """
        if key is not None:
            # By as many bytes: else some could be put into another's plan so that both are noted as one.
            plan = plan.replace(key.query_id.bytes, bytes(QUERY_ID_BYTES))
        digest = hashlib.sha256(plan).digest()[:DIGEST_BYTES]
        until = self._board.refused_until(digest)
        if until is not None:
            raise PlanQuarantined(
                "this plan ended the worker more than once, and is refused for another "
                f"{until - time.monotonic():.0f} s: do not send it as it is"
            )
        return Noted(digest, "plan without a stage key" if key is None else f"plan of {key}")

    async def last_panic(self, since: float) -> str | None:
        """Where and why DataFusion panicked last, as the supervisor has read it.

        Args:
            since: of the monotonic clock; what was noted before does not count.

        Returns:
            None if there is no supervisor, or it has read nothing.
        """
        end = time.monotonic() + PANIC_SECONDS
        while self._is_read and time.monotonic() < end:
            noted, text = self._board.last_panic()
            if noted >= since:
                return text
            await asyncio.sleep(PANIC_SECONDS / 50)
        return None

    @contextmanager
    def decoding(self, plan: Noted) -> Iterator[None]:
        """Notes that a plan is decoded, for as long as the block lasts."""
        with self._noting(plan, plan.text, is_decoding=True):
            yield

    @contextmanager
    def executing(self, plan: Noted, partition: int) -> Iterator[None]:
        """Notes that a partition of a plan is executed, for as long as the block lasts.

        If it is cancelled, the plan stays noted for a moment.
        """
        with self._noting(plan, f"{plan.text}, partition {partition}", is_decoding=False):
            yield

    def read_to_the_end(self, plan: Noted, partition: int, count: int) -> None:
        """Notes that a partition of a plan of so many was read to its end: once all were, it is harmless."""
        read = self._partly_read.setdefault(plan.digest, set())
        self._partly_read.move_to_end(plan.digest)
        read.add(partition)
        if len(read) >= count:
            self._board.note_ended_well(plan.digest)
            del self._partly_read[plan.digest]
        elif len(self._partly_read) > PARTLY_READ:
            self._partly_read.popitem(last=False)

    def oldest(self) -> float:
        """When the oldest of what runs was started, by the monotonic clock; infinity if nothing runs."""
        return min(tuple(self._started.values()), default=math.inf)

    @contextmanager
    def _noting(self, plan: Noted, text: str, *, is_decoding: bool) -> Iterator[None]:
        number, started = next(self._numbers), time.monotonic()
        try:
            entry: int | None = self._free.popleft()
        except IndexError:
            # More runs than can be noted.
            entry = None
        self._started[number] = started
        try:
            if entry is not None:
                self._board.note(entry, plan.digest, text, started, is_decoding=is_decoding)
            yield
        except (asyncio.CancelledError, GeneratorExit):
            if entry is not None:
                self._board.note_ended(entry)
                # Behind those that nothing is noted in.
                self._free.append(entry)
                entry = None
            raise
        finally:
            del self._started[number]
            if entry is not None:
                self._board.clear(entry)
                self._free.appendleft(entry)
