"""Requests that the worker ends while they are under way, each with an error for its client."""

import asyncio
from typing import Any
from weakref import WeakKeyDictionary

from worker.errors import WorkerError

_ENDED: WeakKeyDictionary[asyncio.Task[Any], WorkerError] = WeakKeyDictionary()


def this_request() -> asyncio.Task[Any]:
    """The asyncio task of the running request."""
    request = asyncio.current_task()
    if request is None:
        raise RuntimeError("there is no request without an asyncio task")
    return request


def end(request: asyncio.Task[Any], error: WorkerError) -> None:
    """Cancels the asyncio task of a request, wherever it is, which is to answer with ``error``. The first one counts.

    A cancel leaves nothing of a request, also where it waits for a client that does not read.
    """
    if not request.done() and request not in _ENDED:
        _ENDED[request] = error
        request.cancel()


def ended_with(request: asyncio.Task[Any]) -> WorkerError | None:
    """What a request was ended with, None if it was not, or was cancelled by somebody else."""
    return _ENDED.get(request)
