"""What this process takes of the machine, from Linux's ``/proc`` and its control group."""

import contextlib
import os
import time
from pathlib import Path

# Several consoles may ask at once: the share of next to no time says nothing.
MIN_SECONDS = 0.1


class CpuUsage:
    """The share of the processors that this process has used since it was last asked for."""

    def __init__(self) -> None:
        self._cpus = _usable_cpus()
        self._at, self._used = time.monotonic(), time.process_time()
        self._percent = 0.0

    def percent(self) -> float:
        """Between 0 and 100; asked again within a tenth of a second, it is the same."""
        now, used = time.monotonic(), time.process_time()
        if (elapsed := now - self._at) >= MIN_SECONDS:
            self._percent = min(100.0, 100 * (used - self._used) / elapsed / self._cpus)
            self._at, self._used = now, used
        return self._percent


def _usable_cpus() -> float:
    """How many processors this process may keep busy: the machine's, or what the control group's quota comes to."""
    cpus = float(os.cpu_count() or 1)
    with contextlib.suppress(OSError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    return cpus
