"""What is interrupted in a thread, and what never is."""

import threading
from concurrent.futures import ThreadPoolExecutor

from worker.interrupt import Interruptible


def _wait_for_ever(blocking: Interruptible, started: threading.Event) -> str:
    with blocking.running():
        started.set()
        while True:
            pass
    return "ended"


def test_what_runs_python_code_ends_when_it_is_interrupted() -> None:
    blocking, started = Interruptible(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(_wait_for_ever, blocking, started)
        assert started.wait(10)
        blocking.interrupt()
        assert running.result(10) == "ended"


def test_nothing_is_interrupted_that_does_not_run() -> None:
    blocking = Interruptible()
    blocking.interrupt()
    with blocking.running():
        ran = True
    blocking.interrupt()
    assert ran
