"""Calls of Python functions that DataFusion still waits for when the request they were for is over."""

import ctypes
import sys
import threading
from collections.abc import Set
from dataclasses import dataclass
from types import FrameType
from weakref import WeakSet

from worker.execution.interrupt import Interrupted, raise_in

# What DataFusion's runtime calls its threads. Others that run Python code, and are not Python's, are somebody else's.
ENGINE_THREAD = b"tokio-rt-worker"

_NAME_BYTES = 64


@dataclass(slots=True)
class _Call:
    outermost: FrameType
    users: WeakSet[object]
    """Who was there when it was first seen, and still is: it may be for one of them."""


class LeftoverCalls:
    """Breaks off functions that DataFusion calls in its own threads for nobody.

    A cancelled read is dropped when the operator that it is in comes back. One that waits for a function of the user's
    which loops, or hangs in Python code, does not. For which request a call is cannot be seen; but it is for none that
    came after it, so that it is for nobody once all have left that were there when it was first seen.
    """

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}

    def look(self, users: Set[object]) -> bool:
        """Interrupts what is for none of the users, who are all there are; returns whether to look again.

        Takes some 10 µs a thread. The function gets an ``Interrupted``, and if it catches that, another the next time.
        """
        own = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        calls = {}
        for thread, frame in _other_frames().items():
            if thread in own or _name(thread) != ENGINE_THREAD:
                continue
            outermost = _outermost(frame)
            known = self._calls.get(thread)
            if known is None or known.outermost is not outermost:
                known = _Call(outermost, WeakSet(users))
            known.users.intersection_update(users)
            calls[thread] = known
            if not known.users and (now := _other_frames().get(thread)) and _outermost(now) is outermost:
                raise_in(thread, Interrupted)
        self._calls = calls
        return bool(calls)


def _other_frames() -> dict[int, FrameType]:
    """What each thread is at, without this one, whose frame would be in a circle with itself."""
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    return frames


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _name(thread: int) -> bytes:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    # Called with the GIL, without which no thread that has a frame ends.
    ctypes.pythonapi.pthread_getname_np(ctypes.c_ulong(thread), name, ctypes.c_size_t(_NAME_BYTES))
    return name.value
