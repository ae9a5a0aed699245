"""Which tasks run at the same time: as many as there is memory for, and the others in turn.

Memory is given out in slices: a task has a memory pool of its own, and holds all of it while requests are at it. What
is left over is not shared out, since a pool cannot grow.

Tasks of one query read from each other, here and on other workers. None may wait here for a place that another task of
its query holds, so:

- once a task of a query is admitted, the others are at once, and the query holds the largest pool of them all. They
  run after each other for the most part: each waits for its input.
- two workers may each be full of queries that wait for the other. So the oldest query of all that are at a worker is
  admitted, full or not. Every worker agrees on which is the older, and the oldest of all is admitted wherever it goes.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from worker.errors import WorkerBusy, WorkerError

# How many tasks of one query may run here, since they do not wait for places. One of Distributed DataFusion has a
# dozen stages with a task for each file group at most, spread over the workers.
QUERY_TASKS = 256

# How far the oldest query may go beyond the limits, as a factor. Beyond that even it waits.
OLDEST_FACTOR = 2

# Plans that wait take no more than this part of the memory.
WAITING_PART = 8


@dataclass(frozen=True, slots=True)
class Demand:
    """What a task needs to run."""

    principal: str
    """Whose turn it uses up."""
    query: Hashable
    """Tasks with the same one depend on each other."""
    memory: int
    """Bytes of its memory pool; 0 for one that has no use for it."""
    plan_size: int = 0
    """Bytes that are held while it waits."""
    age: tuple[int, int] | None = None
    """The least is the oldest, on every worker; None for a task that none on other workers depends on."""


class Claim:
    """The place of a task that was admitted, until it is released or the block ends."""

    def __init__(self, admission: "Admission", demand: Demand) -> None:
        self.demand = demand
        self.end: Callable[[WorkerError], None] | None = None
        """Ends the task with an error, in the midst of what it does; set by whoever runs it."""
        self._admission = admission

    def release(self) -> None:
        """Makes room for others."""
        self._admission.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """Admits tasks while there is room, and lets a bounded number wait, callers taking turns."""

    def __init__(self, memory: int, *, max_tasks: int, max_waiting: int, max_wait: float) -> None:
        """
        Args:
            memory: bytes for the pools of all tasks.
            max_tasks: how many may run.
            max_waiting: how many may wait.
            max_wait: for how many seconds each.
        """
        self.memory = memory
        self.claims: dict[Claim, None] = {}
        """In the order of their admission."""
        self.claimed = 0
        """Bytes of all claims."""
        self.waiting = 0
        """How many tasks wait."""
        self._max_tasks = max_tasks
        self._max_waiting = max_waiting
        self._max_wait = max_wait
        self._queries: dict[Hashable, _Query] = {}
        # By principal, whose turn it is first.
        self._queues: dict[str, deque[_Waiter]] = {}
        self._waiting_bytes = 0

    def try_admit(self, demand: Demand) -> Claim | None:
        """The place of a task, if it need not wait for one."""
        # What needs no memory overtakes what waits for some, and takes nothing away from it.
        has_turn = not self._queues or demand.memory == 0 or demand.query in self._queries
        if (has_turn and self._fits(demand)) or self._is_oldest(demand):
            return self._admit(demand)
        return None

    async def admit(self, demand: Demand) -> Claim:
        """The place of a task, waited for if need be.

        Raises:
            WorkerBusy: there is none in time, or too many wait already.
        """
        if claim := self.try_admit(demand):
            return claim
        if self.waiting >= self._max_waiting:
            raise WorkerBusy(f"{self._state()}, and {self._max_waiting} wait, which is max_waiting: try again later")
        if self._waiting_bytes + demand.plan_size > self.memory // WAITING_PART:
            raise WorkerBusy(
                f"{self._state()}, and those that wait hold {self._waiting_bytes} bytes of plans, of at most "
                f"{self.memory // WAITING_PART}: try again later"
            )
        waiter = _Waiter(demand)
        self._queues.setdefault(demand.principal, deque()).append(waiter)
        self.waiting += 1
        self._waiting_bytes += demand.plan_size
        try:
            async with asyncio.timeout(self._max_wait):
                await waiter.told
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.claim is not None:
                waiter.claim.release()
            raise
        finally:
            if waiter.claim is None:
                self._remove(waiter)
                # Those behind may need less.
                self._admit_waiting()
        if waiter.claim is None:
            raise WorkerBusy(
                f"{self._state()}, and none had ended after {self._max_wait:g} s, which is max_wait: try again later"
            )
        return waiter.claim

    def release(self, claim: Claim) -> None:
        """Gives a place back; once is enough."""
        if claim not in self.claims:
            return
        del self.claims[claim]
        query = self._queries[claim.demand.query]
        query.tasks -= 1
        if not query.tasks:
            del self._queries[claim.demand.query]
            self.claimed -= query.memory
        self._admit_waiting()

    def _fits(self, demand: Demand) -> bool:
        query = self._queries.get(demand.query)
        if query is not None:
            return query.tasks < QUERY_TASKS
        return len(self.claims) < self._max_tasks and self.claimed + self._slice(demand) <= self.memory

    def _is_oldest(self, demand: Demand) -> bool:
        if demand.age is None or demand.query in self._queries:
            return False
        if len(self.claims) >= OLDEST_FACTOR * self._max_tasks:
            return False
        if self.claimed + self._slice(demand) > OLDEST_FACTOR * self.memory:
            return False
        present = [query.age for query in self._queries.values()] + [waiter.demand.age for waiter in self._waiters()]
        return all(age is None or demand.age <= age for age in present)

    def _slice(self, demand: Demand) -> int:
        """What a task takes; one whose pool is larger than all memory runs alone."""
        return min(demand.memory, self.memory)

    def _admit(self, demand: Demand) -> Claim:
        query = self._queries.setdefault(demand.query, _Query(demand.age))
        query.tasks += 1
        more = max(0, self._slice(demand) - query.memory)
        query.memory += more
        self.claimed += more
        claim = Claim(self, demand)
        self.claims[claim] = None
        return claim

    def _admit_waiting(self) -> None:
        while waiter := self._next():
            self._remove(waiter, takes_turn=True)
            waiter.claim = self._admit(waiter.demand)
            # One that is being cancelled gives its place back when it runs.
            if not waiter.told.done():
                waiter.told.set_result(None)

    def _next(self) -> "_Waiter | None":
        if not self._queues:
            return None
        first = next(iter(self._queues.values()))[0]
        if self._fits(first.demand):
            return first
        for waiter in self._waiters():
            if waiter.demand.query in self._queries and self._fits(waiter.demand):
                return waiter
        aged = [
            (waiter.demand.age, number, waiter) for number, waiter in enumerate(self._waiters()) if waiter.demand.age
        ]
        if aged and self._is_oldest(min(aged)[2].demand):
            return min(aged)[2]
        return None

    def _waiters(self) -> "Iterator[_Waiter]":
        return (waiter for queue in self._queues.values() for waiter in queue)

    def _remove(self, waiter: "_Waiter", *, takes_turn: bool = False) -> None:
        principal = waiter.demand.principal
        queue = self._queues[principal]
        queue.remove(waiter)
        self.waiting -= 1
        self._waiting_bytes -= waiter.demand.plan_size
        if not queue:
            del self._queues[principal]
        elif takes_turn:
            self._queues[principal] = self._queues.pop(principal)

    def _state(self) -> str:
        return (
            f"the worker is busy: it runs {len(self.claims)} tasks, of at most {self._max_tasks} (max_tasks), which "
            f"hold {self.claimed} bytes, of at most {self.memory} (memory)"
        )


@dataclass(slots=True)
class _Query:
    age: tuple[int, int] | None
    tasks: int = 0
    memory: int = 0


@dataclass(eq=False, slots=True)
class _Waiter:
    demand: Demand
    told: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    claim: Claim | None = None
