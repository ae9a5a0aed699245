"""The memory of the process, watched while tasks run: the kernel would end all of them, this ends the largest."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from worker.allocator import give_back_freed_memory
from worker.config import MEBIBYTE, usable_memory
from worker.errors import MemoryExceeded
from worker.execution.admission import Claim

logger = logging.getLogger("worker")

# How often memory is looked at, which takes 0.02 ms. Plans have been seen to take 2 GB in a second.
SECONDS = 0.1

# When there has been no task for so many looks, what allocators keep is given back: after streams that many read at the
# same time that was up to a gigabyte, which took 0.1 s. Sooner, it would have to be zeroed for the next one.
IDLE_LOOKS = 20

# After a task was ended, until another may be: DataFusion notices at its next batch, and its allocator gives freed
# memory back some time after that. While memory goes on growing there is less time; but it may still be what was ended
# that makes it grow, in the midst of a function, and nobody else is to be ended for that.
SETTLE_SECONDS = 3.0
GROWING_SECONDS = 1.0

# If it still grows after so long, or beyond so many times the limit or so many bytes more, the function does not end.
GIVE_UP_SECONDS = 10.0
GIVE_UP_FACTOR = 2
GIVE_UP_BYTES = 2048 * MEBIBYTE

# Of all memory that the process may use; the rest is for what grows between two looks.
USABLE_PART = 0.95

# Beside its tasks' pools, a worker has batches on their way and what allocators keep.
POOLS_PART = 0.75

# An allocator may keep what was freed long ago. Where that alone is too much already, tasks may take this part of the
# limit before one is ended for it.
LEAST_GROWTH_PART = 16

# Memory is growing if it had never been so large, by this part of the limit or so many bytes, for a second.
GROWING_PART = 64
GROWING_BYTES = 16 * MEBIBYTE

# What is left of a task's share in the growth of memory, each time it is looked at.
DECAY = 0.9


def resident_bytes() -> int:
    """The memory of this process that is resident; 0 where there is no ``/proc``."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Watchdog:
    """Ends the largest task when the process comes close to its limit.

    How much memory a task has is not to be found out: pools do not tell Python, and functions take memory that no pool
    counts. So the largest is the one in whose presence memory grew of late; of several, the one with the largest pool,
    and of those the one that came last.
    """

    def __init__(self, memory: int, give_up: Callable[[], None]) -> None:
        """
        Args:
            memory: bytes for the pools of all tasks.
            give_up: called when memory grows on though every task is ended that was there when it began to be short.
        """
        self._give_up = give_up
        usable = int(USABLE_PART * usable_memory())
        self.limit = min(usable, resident_bytes() + int(memory / POOLS_PART))
        """Bytes of resident memory beyond which a task is ended."""
        self.most = min(usable, max(GIVE_UP_FACTOR * self.limit, self.limit + GIVE_UP_BYTES))
        """Bytes beyond which memory may not grow after a task was ended."""
        self._growth: dict[Claim, float] = {}
        self._seen: dict[Claim, float] = {}
        """Since when they are there."""
        self._has_ended = False
        """Whether one was ended, and memory is still short."""
        self._short_since = -math.inf
        """When the first was ended."""
        self._ended_at = -math.inf
        self._resident = 0
        """Bytes, when one was ended."""
        self._highest = 0
        """The most bytes since then."""
        self._grew_at = -math.inf

    async def watch(self, claims: Collection[Claim]) -> None:
        """Watches for as long as there are claims, given in the order of their admission.

        When there have been none for a while, it gives back what their messages took.
        """
        while True:
            await self._watch_over(claims)
            for _ in range(IDLE_LOOKS):
                await asyncio.sleep(SECONDS)
                if claims:
                    break
            else:
                # In a thread: it takes as long as there is memory.
                await asyncio.to_thread(give_back_freed_memory)
                if not claims:
                    return

    async def _watch_over(self, claims: Collection[Claim]) -> None:
        before = idle = resident_bytes()
        # What was ended may go on growing, also when nobody asks for anything.
        while (current := list(claims)) or self._has_ended:
            await asyncio.sleep(SECONDS)
            now = resident_bytes()
            self._count(current, max(0, now - before))
            before, idle = now, min(idle, now)
            if now > self._highest + max(self.limit // GROWING_PART, GROWING_BYTES):
                self._highest, self._grew_at = now, time.monotonic()
            if not self._is_beyond(now, idle):
                self._has_ended = False
                continue
            if self._settles(now):
                continue
            giving = asyncio.ensure_future(asyncio.to_thread(give_back_freed_memory))
            await asyncio.wait([giving], timeout=SECONDS)
            before = resident_bytes()
            if self._is_beyond(before, idle) and not self._act(before, claims):
                # Allocators keep it.
                idle = before
        self._growth.clear()
        self._seen.clear()

    def _act(self, resident: int, claims: Collection[Claim]) -> bool:
        """Ends a task, or gives up where memory grows and none is left that can be the reason; False if it is well."""
        is_growing = self._has_ended and time.monotonic() < self._grew_at + GROWING_SECONDS
        # Who came after the first was ended is hardly the reason, until memory has grown for a while with them.
        latest = (
            time.monotonic() - GROWING_SECONDS if is_growing else self._short_since if self._has_ended else math.inf
        )
        suspects = [claim for claim in claims if self._seen.get(claim, math.inf) <= latest]
        if not (is_growing and resident > self.most) and (largest := self._largest(suspects)):
            self._end(largest, resident)
        elif not is_growing:
            self._has_ended = False
            return False
        elif time.monotonic() < self._ended_at + GIVE_UP_SECONDS and resident < self.most:
            return True
        else:
            logger.error(
                "memory grows on though tasks were ended for it: %d MiB of at most %d are resident",
                resident // MEBIBYTE,
                self.limit // MEBIBYTE,
            )
            self._give_up()
        self._short_since = self._short_since if self._has_ended else time.monotonic()
        self._has_ended, self._ended_at = True, time.monotonic()
        self._resident = self._highest = resident
        return True

    def _settles(self, resident: int) -> bool:
        """Whether the last one that was ended may still be on its way out."""
        has_grown = resident > self._resident + self.limit // LEAST_GROWTH_PART
        return time.monotonic() < self._ended_at + (GROWING_SECONDS if has_grown else SETTLE_SECONDS)

    def _is_beyond(self, resident: int, idle: int) -> bool:
        return resident > self.limit and resident - idle > self.limit // LEAST_GROWTH_PART

    def _count(self, current: list[Claim], growth: int) -> None:
        now = time.monotonic()
        self._seen = {claim: self._seen.get(claim, now) for claim in current}
        self._growth = {claim: DECAY * self._growth.get(claim, 0) + growth / len(current) for claim in current}

    def _largest(self, claims: Collection[Claim]) -> Claim | None:
        there = [claim for claim in claims if claim in self._growth]
        most = max((self._growth[claim] for claim in there), default=0)
        suspects = [
            (claim.demand.memory, number, claim)
            for number, claim in enumerate(there)
            if self._growth[claim] >= DECAY * most
        ]
        return max(suspects)[2] if suspects else None

    def _end(self, claim: Claim, resident: int) -> None:
        logger.warning(
            "memory is short: %d MiB of at most %d are resident, the largest task is ended",
            resident // MEBIBYTE,
            self.limit // MEBIBYTE,
        )
        if claim.end is not None:
            claim.end(
                MemoryExceeded(
                    f"the worker ran short of memory ({resident // MEBIBYTE} MiB of at most {self.limit // MEBIBYTE} "
                    "were resident), and this task was ended as its largest"
                )
            )
