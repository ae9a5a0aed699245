"""The memory of the process, watched while tasks run: the kernel would end all of them, this ends the largest."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

from worker.allocator import give_back_freed_memory
from worker.config import MEBIBYTE, usable_memory
from worker.errors import MemoryExceeded
from worker.execution.admission import Claim

logger = logging.getLogger("worker")

# How often memory is looked at, which takes 0.02 ms. Plans have been seen to take 2 GB in a second.
SECONDS = 0.1

# After a task was ended, until another may be: DataFusion notices at its next batch, and its allocator gives freed
# memory back some time after that. While memory goes on growing there is less time; but it may still be what was ended
# that makes it grow, in the midst of a function, and nobody else is to be ended for that.
SETTLE_SECONDS = 3.0
GROWING_SECONDS = 1.0

# Of all memory that the process may use; the rest is for what grows between two looks.
USABLE_PART = 0.95

# Beside its tasks' pools, a worker has batches on their way and what allocators keep.
POOLS_PART = 0.75

# An allocator may keep what was freed long ago. Where that alone is too much already, tasks may take this part of the
# limit before one is ended for it.
LEAST_GROWTH_PART = 16

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

    def __init__(self, memory: int) -> None:
        """
        Args:
            memory: bytes for the pools of all tasks.
        """
        self.limit = min(int(USABLE_PART * usable_memory()), resident_bytes() + int(memory / POOLS_PART))
        """Bytes of resident memory beyond which a task is ended."""
        self._growth: dict[Claim, float] = {}
        self._ended_at = -math.inf
        self._resident = 0

    async def watch(self, claims: Iterable[Claim]) -> None:
        """Watches for as long as there are claims, given in the order of their admission."""
        before = idle = resident_bytes()
        while current := list(claims):
            await asyncio.sleep(SECONDS)
            now = resident_bytes()
            self._count(current, max(0, now - before))
            before, idle = now, min(idle, now)
            if self._settles(now) or not self._is_beyond(now, idle):
                continue
            # In a thread: it takes as long as there is memory.
            giving = asyncio.ensure_future(asyncio.to_thread(give_back_freed_memory))
            await asyncio.wait([giving], timeout=SECONDS)
            before = resident_bytes()
            if self._is_beyond(before, idle) and (largest := self._largest(claims)):
                self._ended_at, self._resident = time.monotonic(), before
                self._end(largest, before)
        self._growth.clear()

    def _settles(self, resident: int) -> bool:
        """Whether the last one that was ended may still be on its way out."""
        is_growing = resident > self._resident + self.limit // LEAST_GROWTH_PART
        return time.monotonic() < self._ended_at + (GROWING_SECONDS if is_growing else SETTLE_SECONDS)

    def _is_beyond(self, resident: int, idle: int) -> bool:
        return resident > self.limit and resident - idle > self.limit // LEAST_GROWTH_PART

    def _count(self, current: list[Claim], growth: int) -> None:
        self._growth = {claim: DECAY * self._growth.get(claim, 0) + growth / len(current) for claim in current}

    def _largest(self, claims: Iterable[Claim]) -> Claim | None:
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
