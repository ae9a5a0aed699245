"""Servers and helpers in processes of their own, which end with the benchmark, whatever ends it."""

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

WORKER = ("-m", "worker", "--port", "0", "--grace", "0", "--log-level", "error")
COMMANDS = {
    # Its memory and its time are those of the one process.
    "worker": (*WORKER, "--no-supervisor"),
    "pyarrow.flight": ("-m", "benchmarks.flight_server"),
}
STOP_SECONDS = 5
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    pid: int

    def peak_memory(self) -> int:
        """The most bytes that were resident so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the {self.name} server has ended")
        return int(found[1]) * 1024

    def cpu_seconds(self) -> float:
        """What all its threads have used so far, in ticks of 0.01 s."""
        _, _, fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")
        user, system = fields.split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_servers() -> Iterator[list[Server]]:
    """The worker and the server it is compared with. Call it from the main thread, before other threads start."""
    # Python turns Ctrl-C alone into an exception, which is what ends the servers.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    with ExitStack() as stack:
        yield [stack.enter_context(_running(name, command)) for name, command in COMMANDS.items()]


def helper() -> ProcessPoolExecutor:
    """One process more, which does what it is given with no other's GIL in its way."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_die_with_parent)


@contextmanager
def running_worker() -> Iterator[Server]:
    """The worker alone. Call it from the main thread, as ``running_servers``."""
    with _running("worker", COMMANDS["worker"]) as server:
        yield server


@contextmanager
def supervised_worker() -> Iterator[Server]:
    """The worker as it is by default, whose process is its supervisor's."""
    with _running("supervised worker", WORKER) as server:
        yield server


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _running(name: str, command: tuple[str, ...]) -> Iterator[Server]:
    with running([sys.executable, *command]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        listening = re.fullmatch(r"listening on (grpc://\S+)\n", line)
        if listening is None:
            raise RuntimeError(f"the {name} server did not start: it said {line!r}")
        yield Server(name, listening[1], process.pid)


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    # For what leaves this process no time to end its children, such as SIGKILL.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
