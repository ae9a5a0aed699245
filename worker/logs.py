"""Log lines, one an event, as text or JSON. A thread writes them, so that no request waits for who reads them."""

import copy
import json
import logging
import sys
import threading
import traceback
from collections import deque
from datetime import UTC, datetime
from typing import TextIO

from worker.config import Settings

# How long a line may wait for others to be written with it: to wake the thread up for each costs more than the line.
# What is written at once holds the GIL, a millisecond for 100 lines.
BATCH_SECONDS = 0.02

# Lines that wait for a reader who does not read. More are dropped, and how many is said.
MOST_LINES = 10_000

# At the end of the process, for what waits.
FLUSH_SECONDS = 1.0

# What begins a JSON line; fields of events have other names.
TIME, LEVEL, MESSAGE, TRACEBACK = "time", "level", "message", "traceback"


class Event:
    """What happened, with fields: the message of a log record.

    Any formatter shows it as ``name field=value …``: no value, whoever sent it, can begin another line.
    """

    __slots__ = ("fields", "name", "traceback")

    def __init__(self, name: str, traceback: str = "", /, **fields: str | int | float | None) -> None:
        """
        Args:
            name: what happened, in a word or few.
            traceback: of what went wrong: indented lines below.
            fields: what there is to know of it; those that are None are left out.
        """
        self.name = name
        self.traceback = traceback
        self.fields = {field: value for field, value in fields.items() if value is not None}

    def __str__(self) -> str:
        line = " ".join((self.name, *(f"{field}={_quoted(value)}" for field, value in self.fields.items())))
        return "\n".join((line, *_indented(self.traceback)))


class TextFormatter(logging.Formatter):
    """``2026-11-26T10:00:00.123Z INFO request method=DoGet …``; lines of a traceback are indented, all others not."""

    def format(self, record: logging.LogRecord) -> str:
        """A line, and those of the traceback if there is one."""
        return f"{_time(record)} {record.levelname} {_event(record)}"


class JsonFormatter(logging.Formatter):
    """An object a line: ``time``, ``level``, ``message``, the event's fields, and ``traceback`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        event = _event(record)
        line = {TIME: _time(record), LEVEL: record.levelname.lower(), MESSAGE: event.name, **event.fields}
        if event.traceback:
            line[TRACEBACK] = event.traceback
        return json.dumps(line)


class Lines(logging.Handler):
    """Has a thread write lines. Whoever logs never waits, not even for a pipe that nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        """
        Args:
            stream: what is written to; it is not closed.
        """
        super().__init__()
        self._stream = stream
        self._waiting: deque[logging.LogRecord | threading.Event] = deque()
        self._dropped = 0
        self._closed = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        threading.Thread(target=self._run, name="worker-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a record over, as it is now."""
        if len(self._waiting) >= MOST_LINES:
            self._dropped += 1
            return
        if not isinstance(record.msg, Event) or record.exc_info:
            # What is in it may change, and an exception keeps its frames, with all that is in them.
            event, record = _event(record), copy.copy(record)
            record.msg, record.args, record.exc_info, record.exc_text = event, None, None, None
        self._waiting.append(record)
        # Each is asked first: that is much cheaper.
        if record.levelno >= logging.WARNING and not self._hurry.is_set():
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Waits until what was handed over is written, for a second at most."""
        written = threading.Event()
        self._waiting.append(written)
        self._hurry.set()
        self._wake.set()
        written.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Lets the thread end; what waits then is not written."""
        self._closed = True
        self._hurry.set()
        self._wake.set()
        super().close()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._hurry.wait(BATCH_SECONDS)
            # In this order: what is handed over from now on wakes this thread again.
            self._wake.clear()
            self._hurry.clear()
            self._write()

    def _write(self) -> None:
        lines: list[str] = []
        written: list[threading.Event] = []
        while self._waiting:
            record = self._waiting.popleft()
            if isinstance(record, threading.Event):
                written.append(record)
                continue
            try:
                lines.append(self.format(record))
            except Exception:
                self.handleError(record)
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            event = Event("log lines dropped", lines=dropped)
            lines.append(self.format(logging.LogRecord("worker", logging.WARNING, "", 0, event, None, None)))
        try:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads any more, and there is nobody else to tell
        for event_of_flush in written:
            event_of_flush.set()


def configure(settings: Settings) -> None:
    """Has everything that is logged in this process written to its standard error, as the settings say."""
    handler = Lines(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    # DataFusion and gRPC log through Python too, and what they say at a lower level holds plans.
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    logging.getLogger("worker").setLevel(settings.log_level.upper())


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event(record: logging.LogRecord) -> Event:
    """The event of a record, or that of one that has a text, which then is its name."""
    event = record.msg if isinstance(record.msg, Event) else Event(_printable(record.getMessage()))
    if record.exc_info and record.exc_info[1] is not None:
        event.traceback = "".join(traceback.format_exception(record.exc_info[1]))
    return event


def _indented(text: str) -> list[str]:
    return [f"    {_printable(line)}" for line in text.splitlines()]


def _quoted(value: str | int | float) -> str:
    text = str(value)
    if text and text.isprintable() and not set(text) & {" ", '"', "=", "\\"}:
        return text
    return _printable(json.dumps(text, ensure_ascii=False))


def _printable(text: str) -> str:
    """The text with escapes for what might begin a line, move a cursor, or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
