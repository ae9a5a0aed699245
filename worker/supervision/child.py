"""One worker process, as its supervisor sees it."""

import asyncio
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Self

from worker.supervision.board import VARIABLE, Board

# Of what a worker writes to its standard error, the last is likely to say why it died.
LAST_LINES = 5
LINE_LENGTH = 300

# What a process that has ended wrote is there at once, unless it has left another behind that may still write.
LAST_LINES_SECONDS = 1.0

STANDARD_ERROR = 2

# Whoever reads that may be slow, for so long at a time. Then lines are dropped, until something is read again: a worker
# whose standard error is full hangs, since the engine writes there when it panics.
SLOW_SECONDS = 1.0

DROPPED = b"\n[lines dropped: nobody read them]\n"

# A pipe of which a poll says that it takes something takes so much at once.
PIPE_BYTES = select.PIPE_BUF

# Held for a write, so that what a poll has said is still so.
_WRITING = threading.Lock()

# What Rust writes there when it panics, before a line with the message. Of the place, the package and what follows.
PANIC = re.compile(r"thread .* panicked at (?:.*/registry/src/[^/]*/)?(.+):$")


class Trouble(Enum):
    """Why a child is to be replaced."""

    ENDED = "it ended"
    SILENT = "its event loop does not come round"
    STUCK = "a thread works for nobody"
    LATE = "it does not listen"
    OUTGROWN = "its memory grows, whatever it ends"


class Child:
    """A process, its board, its temporary folder, and what it tells."""

    def __init__(self, process: Process, errors: "_Errors", port: int, board: Board, folder: Path) -> None:
        self._process = process
        self._errors = errors
        self._reading: asyncio.Future[None]
        self.port = port
        self.board = board
        self.started = time.monotonic()
        self.ended: asyncio.Future[int] = asyncio.ensure_future(process.wait())
        self.listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The URL that it listens at, once it does."""
        self.metrics_port: int | None = None
        """Where it serves its metrics on the loopback interface, if it does."""
        self._trouble: asyncio.Future[Trouble] = asyncio.get_running_loop().create_future()
        self._folder = folder

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        port: int,
        board: Board,
        spill_folder: Path | None,
        stuck_seconds: float,
    ) -> Self:
        """Starts a process.

        Args:
            command: of a worker, which takes options behind it.
            environment: its variables.
            port: where it is to listen.
            board: what it notes its plans on.
            spill_folder: where its temporary folder is to be; the system's if None.
            stuck_seconds: for how long its threads may work for nobody.

        Raises:
            OSError: it cannot be started, or a thread for what it writes.
        """
        folder = Path(tempfile.mkdtemp(prefix="worker-", dir=spill_folder))
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        given = {
            "news": theirs.fileno(),
            "board": board.descriptor,
            "folder": str(folder),
            "stuck_seconds": stuck_seconds,
        }
        # A spill folder that is set makes DataFusion create a folder in it for every session, be it needed or not.
        options, temporary = (
            ((), {"TMPDIR": str(folder)}) if spill_folder is None else (("--spill-folder", str(folder)), {})
        )
        errors = _Errors(board)
        try:
            errors.start(read_end)
            process = await asyncio.create_subprocess_exec(
                *command,
                *("--port", str(port), *options),
                env={**environment, **temporary, VARIABLE: json.dumps(given)},
                stderr=write_end,
                pass_fds=(theirs.fileno(), board.descriptor),
                # A terminal's Ctrl-C is for the supervisor, which passes it on once.
                process_group=0,
            )
        except (OSError, RuntimeError) as error:  # the latter of threads that there can be no more of
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(str(error)) from error
        finally:
            theirs.close()
            os.close(write_end)
        child = cls(process, errors, port, board, folder)
        child._reading = asyncio.ensure_future(child._read(ours))
        return child

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """For how long it has been there."""
        return time.monotonic() - self.started

    @property
    def last_lines(self) -> list[str]:
        """The last that it wrote to its standard error."""
        return list(self._errors.lines)

    async def trouble(
        self, stop: "asyncio.Future[None]", silent_seconds: float, start_seconds: float = math.inf
    ) -> Trouble | None:
        """Waits until it is to be replaced; None if the wait was stopped before.

        Args:
            stop: stops the wait.
            silent_seconds: how long its event loop may take to come round, once it listens.
            start_seconds: how long it may take until it listens.
        """
        silent, starting, beats, step = 0.0, 0.0, -1, silent_seconds / 10
        while not stop.done():
            await asyncio.wait((stop, self.ended, self._trouble), timeout=step, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                return Trouble.ENDED
            if self._trouble.done():
                return self._trouble.result()
            # Counted by the looks, not by the clock: this process may have been stopped for a while itself.
            silent = silent + step if self.listening.done() and beats == self.board.beats else 0.0
            beats = self.board.beats
            if silent >= silent_seconds:
                return Trouble.SILENT
            starting = starting + step if not self.listening.done() else 0.0
            if starting >= start_seconds:
                return Trouble.LATE
        return None

    async def end(self, seconds: float) -> None:
        """Lets it end in order, and kills it after some seconds."""
        self.signal(signal.SIGTERM)
        await asyncio.wait((self.ended,), timeout=seconds)
        self.signal(signal.SIGKILL)
        await self.ended

    def signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def clean_up(self) -> None:
        """Ends what it had started, waits for its last lines, and deletes what it has left; call it at its end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._errors.wait(LAST_LINES_SECONDS)
        self._reading.cancel()
        await asyncio.wait((self._reading,))
        try:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        except RuntimeError:  # there can be no more threads
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(self, news: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=news)
        try:
            while line := await reader.readline():
                told = json.loads(line)
                if "listening" in told:
                    self.listening.set_result(told["listening"])
                if "metrics_port" in told:
                    self.metrics_port = told["metrics_port"]
                for trouble in (Trouble.STUCK, Trouble.OUTGROWN):
                    if trouble.name.lower() in told and not self._trouble.done():
                        self._trouble.set_result(trouble)
        except ConnectionError:
            pass
        finally:
            writer.close()


class _Errors:
    """Passes the standard error of a process on, keeps its last lines, and notes where it panics on its board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._panicked_at: str | None = None
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._is_dropping = False
        self._takes = select.poll()
        self._takes.register(STANDARD_ERROR, select.POLLOUT)

    def start(self, descriptor: int) -> None:
        """Passes on what is read from a pipe, which is closed at its end, in a thread: nobody may read our own.

        Raises:
            RuntimeError: there can be no more threads; the pipe is closed.
        """
        try:
            threading.Thread(target=self._pass_on, args=(descriptor,), name="worker-errors", daemon=True).start()
        except RuntimeError:
            os.close(descriptor)
            raise

    async def wait(self, seconds: float) -> None:
        """Waits for the end, if that comes soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def _pass_on(self, descriptor: int) -> None:
        started = b""
        with open(descriptor, "rb", buffering=0) as errors:
            while part := errors.read(64 * 1024):
                *lines, started = (started + part).split(b"\n")
                started = started[-LINE_LENGTH:]
                for line in filter(None, lines):
                    self._keep(line[:LINE_LENGTH].decode("utf-8", "replace"))
                self._write(part)
        if started:
            self._keep(started.decode("utf-8", "replace"))
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)

    def _write(self, part: bytes) -> None:
        end = time.monotonic() + SLOW_SECONDS
        with contextlib.suppress(OSError):
            while part:
                self._takes.poll(0 if self._is_dropping else 100)
                with _WRITING:
                    if self._takes.poll(0):
                        if self._is_dropping:
                            self._is_dropping = False
                            # Of a line that was cut off, the rest is dropped too.
                            part = DROPPED + part.partition(b"\n")[2]
                        part = part[os.write(STANDARD_ERROR, part[:PIPE_BYTES]) :]
                        end = time.monotonic() + SLOW_SECONDS
                    elif self._is_dropping or time.monotonic() > end:
                        self._is_dropping = True
                        return

    def _keep(self, line: str) -> None:
        self.lines.append(line)
        if self._panicked_at is not None:
            # The process may be gone, and its board with it.
            with contextlib.suppress(ValueError):
                self._board.note_panic(f"{self._panicked_at}: {line}")
            self._panicked_at = None
        elif found := PANIC.match(line):
            self._panicked_at = found[1]
