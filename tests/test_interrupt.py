"""What is interrupted in a thread, and what never is."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from worker.execution.interrupt import Interruptible


def _wait_for_ever(started: threading.Event) -> None:
    started.set()
    while True:
        pass


def test_what_runs_python_code_ends_when_it_is_interrupted() -> None:
    blocking, started = Interruptible(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(blocking.run, partial(_wait_for_ever, started))
        assert started.wait(10)
        blocking.interrupt()
        running.result(10)


def test_nothing_is_interrupted_that_does_not_run() -> None:
    blocking = Interruptible()
    blocking.interrupt()
    ran = []
    blocking.run(lambda: ran.append(True))
    blocking.interrupt()
    assert ran == [True]
