"""What a supervisor and its workers hold, as the kernel and their metrics tell it."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

# What is zero when nobody asks for anything.
GAUGES = (
    "worker_requests_active",
    "worker_streams",
    "worker_tasks",
    "worker_tasks_waiting",
    "worker_memory_claimed_bytes",
)

RESTARTS = "worker_restarts_total"

SCRAPE_SECONDS = 10

_SHOWN = 5

# What is behind the last hyphen of a temporary file's name, or all that there is of an identifier.
_NAME = re.compile(r"(?<=-)[^-]{8}$|^[0-9a-f]{32}$")


@dataclass(frozen=True, slots=True)
class Held:
    """What there is of each kind, over all processes of a supervisor."""

    statistics: Counter[str]
    """By the names of ``GAUGES``, and ``RESTARTS``."""
    processes: Counter[str]
    descriptors: Counter[str]
    """By whose they are and what they are of: ``worker socket``, ``supervisor anon_inode:[eventpoll]``."""
    threads: Counter[str]
    """By whose they are and their names."""
    files: Counter[str]
    """In the temporary folder, folders too, by their names without what is random."""
    memory: int
    """Resident bytes."""

    def rows(self, before: "Held") -> list[tuple[str, int, int]]:
        """What is counted, how much of it there was before, and how much there is now; memory in MiB."""
        counted = [
            (name, before.statistics[gauge], self.statistics[gauge])
            for gauge, name in ((gauge, gauge.removeprefix("worker_").replace("_", " ")) for gauge in GAUGES)
        ]
        kinds = ("processes", "descriptors", "threads", "files")
        counted += [(name, getattr(before, name).total(), getattr(self, name).total()) for name in kinds]
        return [*counted, ("resident MiB", before.memory >> 20, self.memory >> 20)]

    def problems(self, before: "Held", *, threads: int, memory: int) -> list[str]:
        """What there is more of than there should be.

        Args:
            before: what was there when nothing had leaked yet.
            threads: so many there may be more.
            memory: so many resident bytes there may be more.
        """
        found = [f"{gauge} is {self.statistics[gauge]}" for gauge in GAUGES if self.statistics[gauge]]
        for name in ("processes", "descriptors", "threads", "files"):
            now, then = getattr(self, name), getattr(before, name)
            if now.total() > then.total() + (threads if name == "threads" else 0):
                more = ", ".join(f"{count} of {kind}" for kind, count in (now - then).most_common(_SHOWN))
                found.append(f"{name}: {now.total()} instead of {then.total()}, among them more than before: {more}")
        if self.memory > before.memory + memory:
            found.append(f"resident memory: {self.memory >> 20} MiB instead of {before.memory >> 20} MiB")
        return found


def held(supervisor: psutil.Process, folder: Path, metrics: str) -> Held:
    """Looks at what is held; blocks.

    Args:
        supervisor: its children are looked at too.
        folder: the temporary folder of all of them.
        metrics: the URL of their metrics.

    Raises:
        OSError: the metrics cannot be read.
        psutil.NoSuchProcess: a process ended while it was looked at.
    """
    processes = [supervisor, *supervisor.children(recursive=True)]
    owned = [("worker" if each else "supervisor", process) for each, process in enumerate(processes)]
    return Held(
        # They come last: to read them takes a connection and a thread.
        processes=Counter(process.name() for process in processes),
        descriptors=Counter(f"{whose} {kind}" for whose, process in owned for kind in _descriptors(process.pid)),
        threads=Counter(f"{whose} {name}" for whose, process in owned for name in _threads(process.pid)),
        files=Counter(_NAME.sub("*", path.name) for path in folder.rglob("*")),
        memory=sum(process.memory_info().rss for process in processes),
        statistics=statistics(metrics),
    )


def statistics(metrics: str) -> Counter[str]:
    """What the metrics say; blocks.

    Raises:
        OSError: the metrics cannot be read.
    """
    with urlopen(metrics, timeout=SCRAPE_SECONDS) as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (*GAUGES, RESTARTS):
                found[sample.name] += int(sample.value)
    return found


def _descriptors(process: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        # The one that lists them is gone by now, if the process is this one.
        with contextlib.suppress(FileNotFoundError):
            of = os.readlink(descriptor)
            yield Path(of).name if of.startswith("/") else re.sub(r":\[\d+\]$", "", of)


def _threads(process: int) -> Iterator[str]:
    for thread in Path(f"/proc/{process}/task").iterdir():
        # Threads come and go.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield (thread / "comm").read_text().strip()
