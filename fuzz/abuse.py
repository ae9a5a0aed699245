"""Abuse with fixed counts, and what is left of it: ``python -m fuzz.abuse --minutes 10``.

Clients connect to a supervised worker and drop the connection, cancel, read slowly, send hostile plans and tickets
beyond its limit, and ask for many streams at once; it is killed, too; and a client beside all that goes on with its
query. After a round of it that does not count, and again after all the others, it is looked at what the worker holds.
"""

import argparse
import asyncio
import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from fuzz.abusers import Abusers, repeated
from fuzz.cases import Case
from fuzz.corpus import entries, options, prepare
from fuzz.customer import Customer
from fuzz.held import RESTARTS, Held, held, statistics
from fuzz.target import Target, target

ROUNDS = 10

# How much there is of each in all rounds together, and how much of it at the same time.
DROPS, DROPS_AT_ONCE = 2000, 50
CANCELS, CANCELS_AT_ONCE = 2000, 20
SLOW_READERS, SLOW_READERS_AT_ONCE = 100, 10
OVERSIZED, OVERSIZED_AT_ONCE = 50, 2
CORPUS_TIMES, CORPUS_AT_ONCE = 2, 4
STREAMS = 500
KILLS = 5

# The worker that is there in the end has to have seen as much as the one that was looked at first.
ROUNDS_OF_KILLS = 5
ROUND_OF_STREAMS = 6

# For the worker to be in the midst of all the rest.
KILL_AFTER_SECONDS = 1.0

# A slow reader is one for so long, if the round is long enough.
SLOW_SECONDS = 5.0

# After which nothing may be left, but for threads of DataFusion's and what these keep: they end when they have had
# nothing to do for ten.
SETTLE_SECONDS = 5.0
THREADS_SECONDS = 15.0

# Pools of threads, which are bounded, start them as they are needed at the same time: some maybe not in the warm-up.
THREADS_SLACK = 10
MEMORY_SLACK = 50 << 20

# Of the worker; with it goes the limit at which the largest task is ended.
MEMORY = "3GiB"

# How much DataFusion's allocator keeps of what was freed is a matter of chance, up to a gigabyte after many streams at
# the same time. For what is lost to be told from that, it keeps nothing here, which costs half of the throughput.
GIVE_BACK = {"MIMALLOC_PURGE_DELAY": "0"}

# That of hundreds of threads with their stacks, which take no memory.
ADDRESS_SPACE = 1 << 40

# After a kill the service may be away for so long, on a machine that has a lot else to do.
AWAY_SECONDS = 10.0

# Before the memory is looked at, the client asks so often alone. What a thread of DataFusion's has taken and another
# has freed, up to half a gigabyte at a time, is given back when the first has something to do again.
LAST_QUERIES = 200

# The worker gives back what the C library keeps when it has had nothing to do for two.
IDLE_SECONDS = 3.0

SHOWN_PROBLEMS = 20


class Abuse:
    """All rounds, and what came of them."""

    def __init__(self, target: Target, folder: Path, files: Path, scale: float, seconds: float) -> None:
        """
        Args:
            target: what is abused.
            folder: for its temporary files, which nobody else has.
            files: a folder that it may read.
            scale: how much of each count there is; 1 for all.
            seconds: that all rounds are to take, or longer if they do.
        """
        assert target.process is not None
        assert target.metrics is not None
        self._url = target.url
        self._metrics = target.metrics
        self._supervisor = psutil.Process(target.process.pid)
        self._folder = folder
        self._files = files
        self._corpus = [entry.case(files) for entry in entries()][:: round(1 / scale)]
        self._scale = scale
        self._seconds = seconds / ROUNDS
        self.abusers = self._new_abusers()
        self.customer = Customer(target.url)
        self.away: list[float] = []
        """Seconds from each kill until the service answered again."""
        self.most_requests = 0
        """Under way when all streams at once were."""

    async def warm_up(self) -> None:
        """A kill, and a round of all the rest that does not count, enough for every thread to be needed."""
        abusers, self.abusers = self.abusers, self._new_abusers()
        await self._kill()
        # First what may end the worker: the one that is looked at is to know all the rest.
        await self.abusers.harm(self._corpus, CORPUS_AT_ONCE)
        await self._round(0, (), times_at_once=2)
        await self._streams()
        self.abusers, problems = abusers, self.abusers.problems
        self.abusers.problems += [f"in the warm-up: {problem}" for problem in problems]

    async def run(self) -> None:
        """All rounds."""
        corpus = self._corpus * CORPUS_TIMES
        kills = self._count(KILLS)
        for number in range(ROUNDS):
            start = time.monotonic()
            part = _part(len(corpus), number)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._round(number, corpus[part.start : part.stop]))
                for _ in _part(kills, number, ROUNDS_OF_KILLS) if number < ROUNDS_OF_KILLS else ():
                    await asyncio.sleep(KILL_AFTER_SECONDS)
                    await self._kill()
            if number == ROUND_OF_STREAMS:
                await self._streams()
            await asyncio.sleep(self._seconds - (time.monotonic() - start))

    async def held_soon(self, seconds: float = SETTLE_SECONDS) -> Held:
        """What the worker holds after a while in which nobody asks for anything."""
        # Calls that are in circles with their errors keep connections open.
        gc.collect()
        await asyncio.sleep(seconds)
        return await asyncio.to_thread(held, self._supervisor, self._folder, self._metrics)

    async def held(self) -> Held:
        """What the worker holds after five seconds, but its threads and memory when DataFusion's threads have ended."""
        soon = await self.held_soon()
        later = await self.held_soon(THREADS_SECONDS - SETTLE_SECONDS)
        for _ in range(LAST_QUERIES):
            await self.customer.wait()
        return replace(soon, threads=later.threads, memory=(await self.held_soon(IDLE_SECONDS)).memory)

    def problems(self) -> list[str]:
        """What should not have been."""
        found = [*self.customer.problems, *self.abusers.problems]
        found += [f"away for {seconds:.1f} s after a kill" for seconds in self.away if seconds > AWAY_SECONDS]
        if self.most_requests < self._count(STREAMS):
            found.append(f"{self.most_requests} requests at once instead of {self._count(STREAMS)}")
        return found

    async def _round(self, number: int, corpus: Sequence[Case], times_at_once: int = 0) -> None:
        """A tenth of everything but streams at once and kills, but so often what is done at once at least."""
        slow_seconds = min(SLOW_SECONDS, self._seconds / 2)
        async with asyncio.TaskGroup() as group:
            for count, at_once, act in (
                (DROPS, DROPS_AT_ONCE, self.abusers.drop),
                (CANCELS, CANCELS_AT_ONCE, self.abusers.cancel),
                (OVERSIZED, OVERSIZED_AT_ONCE, self.abusers.exceed),
                (SLOW_READERS, SLOW_READERS_AT_ONCE, partial(self.abusers.read_slowly, slow_seconds)),
            ):
                part = _part(self._count(count), number)
                numbers = range(part.start, max(part.stop, part.start + times_at_once * at_once))
                group.create_task(repeated(numbers, at_once, act))
            group.create_task(self.abusers.harm(corpus, CORPUS_AT_ONCE))

    async def _streams(self) -> None:
        async def count_requests() -> None:
            self.most_requests = (await asyncio.to_thread(statistics, self._metrics))["worker_requests_active"]

        await self.abusers.stream_at_once(self._count(STREAMS), count_requests)

    async def _kill(self) -> None:
        """Ends the process that serves, without warning, and waits until the next does."""
        # A hostile plan may just have ended the last one.
        await Customer(self._url).wait()
        self._supervisor.children()[-1].kill()
        start = time.monotonic()
        await Customer(self._url).wait()
        self.away.append(time.monotonic() - start)
        self.abusers.done["kills"] += 1

    def _new_abusers(self) -> Abusers:
        return Abusers(self._url.removeprefix("grpc://"), self._files)

    def _count(self, count: int) -> int:
        return math.ceil(count * self._scale)


def _part(count: int, number: int, parts: int = ROUNDS) -> range:
    """Which of so many are in a part, of parts that are as equal as can be; the first is the largest."""
    return range(-(-count * number // parts), -(-count * (number + 1) // parts))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    abuse: Abuse
    minutes: float
    before: Held
    """After the warm-up."""
    after: Held

    def problems(self, *, threads: int = THREADS_SLACK, memory: int = MEMORY_SLACK) -> list[str]:
        """What should not have been.

        Args:
            threads: so many there may be more in the end than after the warm-up.
            memory: so many bytes there may be more.
        """
        return [*self.abuse.problems(), *self.after.problems(self.before, threads=threads, memory=memory)]

    def report(self) -> Iterator[str]:
        """Lines that say what was done, and what was held."""
        abusers, customer = self.abuse.abusers, self.abuse.customer
        restarts = self.after.statistics[RESTARTS]
        yield f"{self.minutes:.1f} minutes; the worker was replaced {restarts} times, the warm-up included"
        for name, count in sorted(abusers.done.items()):
            statuses = sorted((status, times) for (of, status), times in abusers.statuses.items() if of == name)
            yield f"  {count:6,} {name}{''.join(f', {times:,} {status}' for status, times in statuses)}"
        yield (
            f"the client beside: {customer.answers:,} answers, {customer.retries:,} retries, "
            f"{customer.slowest:.1f} s for the slowest answer"
        )
        if self.abuse.away:
            yield f"away after kills: {', '.join(f'{seconds:.1f}' for seconds in self.abuse.away)} s"
        yield f"{'':>16} {'before':>8} {'after':>8}"
        for name, then, now in self.after.rows(self.before):
            yield f"{name:>16} {then:8,} {now:8,}"


async def abused(errors: Path, scale: float, minutes: float, *, is_patient: bool = True) -> Outcome:
    """Starts a worker and abuses it.

    Args:
        errors: a file that its log is added to.
        scale: how much of each count there is; 1 for all.
        minutes: for all rounds, after the warm-up.
        is_patient: whether threads and memory are looked at when those of DataFusion that idle have ended.
    """
    with ExitStack() as stack:
        folder, files = (Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="abuse-"))) for _ in range(2))
        prepare(files)
        arguments = (*options(files), "--memory", MEMORY)
        environment = {"TMPDIR": str(folder), **GIVE_BACK}
        async with target(*arguments, errors=errors, environment=environment, address_space=ADDRESS_SPACE) as running:
            abuse = Abuse(running, folder, files, scale, minutes * 60)
            async with abuse.customer.going_on():
                await abuse.warm_up()
            before = await (abuse.held() if is_patient else abuse.held_soon())
            start = time.monotonic()
            async with abuse.customer.going_on():
                await abuse.run()
            minutes = (time.monotonic() - start) / 60
            return Outcome(abuse, minutes, before, await (abuse.held() if is_patient else abuse.held_soon()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if there was a problem, each of which is printed."""
    parser = argparse.ArgumentParser("python -m fuzz.abuse", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all rounds together (default: 10)")
    parser.add_argument("--scale", type=float, default=1, help="of all counts (default: 1)")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="a file for what the worker logs")
    given = parser.parse_args(arguments)
    outcome = asyncio.run(abused(given.log, given.scale, given.minutes))
    problems = outcome.problems()
    shown = [f"problem: {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    print("\n".join((*outcome.report(), *shown)))
    if len(problems) > len(shown):
        print(f"and {len(problems) - len(shown)} more problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
