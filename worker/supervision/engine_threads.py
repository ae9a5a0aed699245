"""DataFusion's threads, seen from outside: one that works on, when what it worked for has been cancelled, is stuck."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

THREADS = Path("/proc/self/task")

# What DataFusion's runtime calls its threads.
NAME = "tokio-rt-worker"

# Of a processor, at least: less is what a thread gets where many more are busy.
WORKING_SHARE = 0.1


@dataclass(slots=True)
class _Thread:
    waits: int
    """How often it has waited for anything."""
    since: float
    """Since when it has not."""
    forlorn_since: float | None = None
    """Since when all that had been started before is over."""
    forlorn_cpu: float = 0.0


class EngineThreads:
    """Watches for threads that work for nobody.

    A thread that has not waited since a certain time works on one and the same thing since; if all that had been
    started by then is over, it works for nobody. Operators stop when what they work for is dropped, a second later at
    most; one that does not look (a nested loop join) goes on to its end, and nothing but the end of the process stops
    it. (Aggregations that keep every thread busy wait several times in a second.)
    """

    def __init__(self, threads: Path = THREADS) -> None:
        self._folder = threads
        self._threads: dict[str, _Thread] = {}

    def look(self, now: float, oldest: float) -> float:
        """For how many seconds a thread has worked for nobody; takes up to 0.1 ms a thread, to be called now and then.

        Args:
            now: the time, of any clock.
            oldest: when the oldest of what still runs was started, by the same clock.
        """
        found = 0.0
        threads = {}
        for number in self._numbers():
            with contextlib.suppress(OSError, ValueError):
                name, cpu, waits = self._read(number)
                if name != NAME:
                    continue
                known = self._threads.get(number)
                if known is None or known.waits != waits:
                    known = _Thread(waits, now)
                threads[number] = known
                if oldest <= known.since:
                    known.forlorn_since = None
                elif known.forlorn_since is None:
                    known.forlorn_since, known.forlorn_cpu = now, cpu
                elif cpu - known.forlorn_cpu >= WORKING_SHARE * (now - known.forlorn_since):
                    found = max(found, now - known.forlorn_since)
        self._threads = threads
        return found

    def _numbers(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except OSError:
            return []

    def _read(self, number: str) -> tuple[str, float, int]:
        """A thread's name, the processor's seconds that it has used, and how often it has waited."""
        folder = self._folder / number
        name, _, fields = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        status = (folder / "status").read_text()
        waits = int(status.partition("\nvoluntary_ctxt_switches:")[2].split(None, 1)[0])
        user, system = fields.split()[11:13]
        return name, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), waits
