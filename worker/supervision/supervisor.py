"""The parent of workers: starts them, replaces those that die or hang, and remembers which plans ended them.

It uses neither gRPC nor DataFusion, so that what ends a worker does not end it.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from worker.allocator import engine_environment
from worker.config import Settings, usable_memory
from worker.logs import Event
from worker.supervision.board import SHOW_STACKS, Board, Running
from worker.supervision.child import Child, Trouble
from worker.supervision.ports import reserve
from worker.supervision.quarantine import Quarantine

logger = logging.getLogger("worker")

# A worker that dies again right after its start would use up a processor.
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0

# What a worker gets beyond its own times for the end.
MARGIN = 10.0

# A session builder's module that takes its time to load takes longer on a busy machine.
START_FACTOR = 10.0

# Of the plans that ran when a worker died, so many are logged.
LOGGED_PLANS = 20


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds after which something is done."""

    silent: float = 10.0
    """An event loop that has not come round for so long hangs."""
    stuck: float = 30.0
    """A thread of DataFusion that has worked for nobody for so long does not end."""
    kill: float = 1.0
    """A worker that hangs is killed so long after it was told to end."""
    start: float = 60.0
    """A worker that takes longer until it listens, and ten times as long as the first did, hangs."""
    healthy: float = 10.0
    """A worker that has lived so long is well: if it dies, that has nothing to do with its start."""


@dataclass(eq=False)
class Place:
    """A port, and the worker that has it now."""

    port: int
    reserved: list[socket.socket]
    """Bound to the port, so that nobody else gets it while there is no worker."""
    child: Child | None = None
    restarts: int = 0
    start_seconds: float = math.inf
    """How long the first worker took until it listened."""

    @property
    def is_up(self) -> bool:
        """Whether a worker listens."""
        return self.child is not None and self.child.listening.done() and not self.child.ended.done()


def delay(deaths: int) -> float:
    """Seconds to wait before the next start, after so many deaths in succession."""
    return 0.0 if deaths < 2 else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(deaths - 2, 10))


class Supervisor:
    """Runs workers until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        command: Sequence[str],
        announce: Callable[[str], None],
        *,
        times: Times | None = None,
    ) -> None:
        """
        Args:
            settings: the workers' too; what matters here is where they listen, how many there are, and their end.
            command: starts a worker with these settings, and takes more options behind it.
            announce: is told the URL of each worker, once.
            times: when something is done.
        """
        self._settings = settings
        self._command = command
        self._announce = announce
        self._times = times or Times()
        self._quarantine = Quarantine()
        self._children: set[Child] = set()
        self._draining: set[asyncio.Future[None]] = set()
        self._code = 0
        self.places: list[Place] = []

    async def run(self) -> int:
        """Returns the exit code: 0 after an orderly end, 128 and its number after a second signal.

        If a worker does not even start once, it is that worker's.

        Raises:
            OSError: a port cannot be had, or a process not be started.
        """
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self.stop, signal_number)
        with contextlib.ExitStack() as opened:
            for number in range(self._settings.workers):
                port = self._settings.port and self._settings.port + number
                reserved = [opened.enter_context(each) for each in reserve(self._settings.host, port)]
                self.places.append(Place(reserved[0].getsockname()[1], reserved))
            keeping = [asyncio.ensure_future(self._keep(place)) for place in self.places]
            try:
                await asyncio.gather(*keeping)
                await asyncio.gather(*self._draining)
            finally:
                for running in keeping:
                    running.cancel()
                # There is none, unless another could not be started.
                for child in self._children:
                    child.signal(signal.SIGKILL)
                await asyncio.gather(*keeping, *self._draining, return_exceptions=True)
                for signal_number in (signal.SIGTERM, signal.SIGINT):
                    asyncio.get_running_loop().remove_signal_handler(signal_number)
        return self._code

    def stop(self, number: int) -> None:
        """Lets all workers end in order; told so again, kills them."""
        if not self._stop.done():
            self._stop.set_result(None)
            return
        self._code = 128 + number
        for child in self._children:
            child.signal(signal.SIGKILL)

    def quarantined(self) -> int:
        """How many plans are refused now."""
        return len(self._quarantine.refused(time.monotonic()))

    async def _keep(self, place: Place) -> None:
        """Has a worker on a port, until all are to end."""
        deaths = 0
        while not self._stop.done():
            try:
                child = await self._start(place)
            except OSError as error:
                if place.child is None:
                    raise
                deaths += 1
                logger.error(Event("worker cannot be started", port=place.port, reason=str(error)))
                await asyncio.wait((self._stop,), timeout=delay(deaths + 1))
                continue
            start_seconds = max(self._times.start, START_FACTOR * place.start_seconds)
            trouble = await child.trouble(self._stop, self._times.silent, start_seconds)
            if trouble is None:
                await self._drain(child)
                return
            if trouble is Trouble.STUCK:
                _log(child, "worker is replaced", reason="a thread of DataFusion has worked for nobody")
                place.restarts += 1
                self._in_background(self._drain(child))
                continue
            if trouble is Trouble.SILENT:
                _log(child, "worker is replaced", reason=f"its event loop was silent for {self._times.silent:g} s")
                child.signal(SHOW_STACKS)
                await child.end(self._times.kill)
            if trouble is Trouble.LATE:
                _log(child, "worker is replaced", reason=f"it does not listen after {start_seconds:g} s")
                child.signal(signal.SIGKILL)
                await child.ended
            if trouble is Trouble.OUTGROWN:
                _log(child, "worker is replaced", reason="its memory grows, whatever it ends")
                child.signal(signal.SIGKILL)
                await child.ended
            running = child.board.running()
            await child.clean_up()
            if not place.restarts and not child.listening.done():
                self._give_up(child)
                return
            place.restarts += 1
            self._note_death(child, running)
            # A plan that kills is refused after its second time: the others need not wait for that.
            deaths = 0 if running or child.seconds >= self._times.healthy else deaths + 1
            if seconds := delay(deaths):
                logger.warning(Event("worker is started later", port=place.port, seconds=seconds))
                await asyncio.wait((self._stop,), timeout=seconds)

    async def _start(self, place: Place) -> Child:
        board = Board.shared()
        board.refuse(self._quarantine.refused(time.monotonic()))
        before = place.child
        if before is not None:
            board.follow(before.board)
        try:
            child = await Child.start(
                self._command,
                self._environment(),
                place.port,
                board,
                self._settings.spill_folder,
                self._times.stuck,
            )
        except OSError:
            board.close()
            raise
        if before is not None:
            before.board.close()
        place.child = child
        self._children.add(child)
        child.ended.add_done_callback(lambda _: self._children.discard(child))
        child.listening.add_done_callback(lambda _: self._listens(child, place))
        return child

    def _listens(self, child: Child, place: Place) -> None:
        if place.start_seconds == math.inf:
            place.start_seconds = child.seconds
            self._announce(child.listening.result())
        else:
            logger.info(
                Event("worker listens again", port=child.port, process=child.pid, seconds=round(child.seconds, 3))
            )

    def _environment(self) -> dict[str, str]:
        variables = {**engine_environment(usable_memory()), **os.environ}
        # They share the machine, unless it is said what each may have.
        if "memory" not in self._settings.model_fields_set:
            variables["WORKER_MEMORY"] = str(self._settings.memory // self._settings.workers)
        return variables

    async def _drain(self, child: Child) -> None:
        await child.end(self._settings.shutdown_delay + self._settings.grace + MARGIN)
        await child.clean_up()

    def _in_background(self, work: Awaitable[None]) -> None:
        running = asyncio.ensure_future(work)
        self._draining.add(running)
        running.add_done_callback(self._draining.discard)

    def _give_up(self, child: Child) -> None:
        """Ends because a worker cannot be started, of which it has said why."""
        code = child.ended.result()
        self._code = code if code > 0 else 1
        if code <= 0:
            _log(child, "worker died before it listened", how=how_it_ended(code))
        if not self._stop.done():
            self._stop.set_result(None)

    def _note_death(self, child: Child, running: Sequence[Running]) -> None:
        plans = "; ".join(
            f"{plan.text} {'decoded' if plan.is_decoding else 'executed'} for {plan.seconds:.3f} s"
            for plan in running[:LOGGED_PLANS]
        )
        _log(
            child,
            "worker died",
            how=how_it_ended(child.ended.result()),
            seconds=round(child.seconds, 3),
            running=plans or "nothing",
            last_lines=" | ".join(child.last_lines),
        )
        now = time.monotonic()
        guilty = self._quarantine.died(running, now)
        if guilty is not None:
            _log(child, "plan is refused", reason="it ended workers more than once", plan=guilty.hex())
            for place in self.places:
                if place.child is not None:
                    place.child.board.refuse(self._quarantine.refused(now))


def _log(child: Child, event: str, **fields: str | float) -> None:
    logger.error(Event(event, port=child.port, process=child.pid, **fields))


def how_it_ended(code: int) -> str:
    """What the code says that ``subprocess`` has for a process that ended."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
