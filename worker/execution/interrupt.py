"""Blocking calls in threads that can be broken off from outside."""

import ctypes
import threading
from collections.abc import Callable


class Interrupted(BaseException):
    """Raised in the thread of what was interrupted. No ``Exception``, which a user's function there might catch."""


class Interruptible:
    """Calls, one at a time, that may be interrupted if they run Python code now and then.

    DataFusion does so every second in whatever it blocks in, which is how Ctrl-C gets through to a script.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._interrupted = False

    def run(self, call: Callable[[], None]) -> None:
        """Makes the call; returns quietly where it was interrupted.

        No context manager: what is raised on the way into one, or out of it, passes it by.
        """
        self._thread = threading.get_ident()
        try:
            try:
                call()
            finally:
                with self._lock:
                    raise_in(self._thread, None)
                    self._thread = None
        except Interrupted:
            self._thread = None

    def interrupt(self) -> None:
        """Raises ``Interrupted`` in the thread, as soon as that runs Python code; nothing if nothing runs.

        Once only: a second one could come when nobody is there any more to catch it.
        """
        with self._lock:
            if self._thread is not None and not self._interrupted:
                self._interrupted = True
                raise_in(self._thread, Interrupted)


def raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Has a thread raise an error in the Python code that it runs next; None takes back what it has not raised yet."""
    # "Thread State and the Global Interpreter Lock" in Python's C API: null takes back what was not raised yet.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
