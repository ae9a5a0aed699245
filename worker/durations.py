"""How long things took, counted by how long: what a histogram shows. Pure, and safe in threads."""

import threading
from bisect import bisect_left
from dataclasses import dataclass

# Upper bounds, in seconds: from a small plan, which decodes in 0.1 ms, to what a client waits a minute for.
BOUNDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations so far."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    """How many took at most as long as each of ``BOUNDS``, and longer than the one before; then, longer than all."""
    seconds: float = 0.0
    """Of all together."""

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


class Durations:
    """Counts durations, at some 0.3 µs each."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Counts one."""
        place = bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts[place] += 1
            self._seconds += seconds

    def histogram(self) -> Histogram:
        """Those so far."""
        with self._lock:
            return Histogram(tuple(self._counts), self._seconds)
