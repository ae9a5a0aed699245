"""Requests, as metrics and log lines tell of them: each from its beginning to its status, and all of them counted."""

import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import grpc

from worker.durations import Durations, Histogram
from worker.errors import SessionBuilderFailed, WorkerError
from worker.failures import without_url_secrets
from worker.headers import Headers
from worker.logs import Event
from worker.message import Message, row_count
from worker.output import CONFIG_PREFIX
from worker.session import WorkerQueryContext

logger = logging.getLogger("worker")

# An error's text may be that of a whole plan's mistake. The client gets more of it.
MAX_REASON = 1000

# What stands in a log for a secret.
HIDDEN = "***"

# Fewer characters are no secret, and may be anything else in a text.
MIN_SECRET = 6

# Errors that are none of ours, by the name under which all of them are counted.
UNEXPECTED = "unexpected"


@dataclass(slots=True, eq=False)
class Request:
    """A request under way: what is known of it so far."""

    method: str
    """The RPC's name, such as ``DoGet``."""
    query: WorkerQueryContext | None = None
    partitions: range | None = None
    rows: int = 0
    bytes: int = 0
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class RequestStatistics:
    """Requests under way, and all that have ended."""

    active: int
    ended: Mapping[tuple[str, str], int]
    errors: Mapping[str, int]
    first_byte: Mapping[str, Histogram]
    rows_sent: int
    bytes_sent: int


class Requests:
    """Counts requests and what they send, and logs a line for each that ends."""

    def __init__(self) -> None:
        self._active = 0
        self._ended: dict[tuple[str, str], int] = defaultdict(int)
        self._errors: dict[str, int] = defaultdict(int)
        self._first_byte: dict[str, Durations] = defaultdict(Durations)
        self._rows_sent = 0
        self._bytes_sent = 0

    def statistics(self) -> RequestStatistics:
        """What there is now and was so far; from any thread."""
        return RequestStatistics(
            active=self._active,
            ended=dict(self._ended),
            errors=dict(self._errors),
            first_byte={method: durations.histogram() for method, durations in list(self._first_byte.items())},
            rows_sent=self._rows_sent,
            bytes_sent=self._bytes_sent,
        )

    def begin(self, method: str) -> Request:
        """A request that has come."""
        self._active += 1
        return Request(method)

    def refused(self, method: str, error: WorkerError) -> None:
        """A request that has come no further than to an interceptor."""
        self.end(self.begin(method), error.status, error)

    def sent(self, request: Request, message: Message) -> Message:
        """Counts a message that is about to be sent."""
        rows, size = row_count(message.header), message.size
        if not request.bytes:
            self._first_byte[request.method].add(time.perf_counter() - request.started)
        request.rows += rows
        request.bytes += size
        self._rows_sent += rows
        self._bytes_sent += size
        return message

    def end(self, request: Request, status: grpc.StatusCode, error: BaseException | None = None) -> None:
        """A request has ended, because of an error if there is one."""
        self._active -= 1
        self._ended[request.method, status.name] += 1
        if error is not None:
            self._errors[_name(error)] += 1
        # What the worker or the session builder did wrong is for whoever runs them; the rest is the clients' business.
        level = logging.ERROR if error is not None and status is grpc.StatusCode.INTERNAL else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, _event(request, status, error))


def _event(request: Request, status: grpc.StatusCode, error: BaseException | None) -> Event:
    query, partitions = request.query, request.partitions
    key = query.stage_key if query is not None else None
    reason, trace = (None, "") if error is None else _told(error, query)
    return Event(
        "request",
        trace,
        method=request.method,
        status=status.name,
        seconds=round(time.perf_counter() - request.started, 6),
        rows=request.rows,
        bytes=request.bytes,
        query=str(key.query_id) if key is not None else None,
        stage=key.stage_id if key is not None else None,
        task=key.task_number if key is not None else None,
        partition=partitions.start if partitions is not None else None,
        partitions=len(partitions) if partitions is not None and len(partitions) != 1 else None,
        principal=query.principal if query is not None else None,
        error=_name(error) if error is not None else None,
        reason=reason,
    )


def _told(error: BaseException, query: WorkerQueryContext | None) -> tuple[str, str]:
    """Why a request failed, and the traceback where it is not known; both without what might be the caller's secrets.

    Session builders put those into errors easily: a ``KeyError`` shows the key that a dictionary lacks.
    """
    # What a client is not told is the cause of it.
    is_internal = not isinstance(error, WorkerError) or error.status is grpc.StatusCode.INTERNAL
    reason, trace = str(error.__cause__ or error) if is_internal else str(error), ""
    if isinstance(error, SessionBuilderFailed) or not isinstance(error, WorkerError):
        trace = "".join(traceback.format_exception(error))
    for secret in _secrets(query.headers) if query is not None else ():
        reason, trace = reason.replace(secret, HIDDEN), trace.replace(secret, HIDDEN)
    return without_url_secrets(reason)[:MAX_REASON], without_url_secrets(trace)


def _secrets(headers: Headers) -> Iterator[str]:
    """What may be secret of a request: any header's value but a short one, whole and without what stands before it."""
    for name in headers:
        if name == "user-agent" or name.startswith(CONFIG_PREFIX):
            continue
        for value in headers.get_all(name):
            text = repr(value)[2:-1] if isinstance(value, bytes) else value
            for secret in (text, text.rpartition(" ")[2]):
                if len(secret) >= MIN_SECRET:
                    yield secret


def _name(error: BaseException) -> str:
    return type(error).__name__ if isinstance(error, WorkerError) else UNEXPECTED
