"""What is interrupted in a thread, and what never is."""

import threading
from concurrent.futures import ThreadPoolExecutor

from worker.interrupt import Interrupted, Interruptible


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


def test_an_interrupt_never_gets_beyond_what_it_was_meant_for() -> None:
    """However the end of what runs and the interrupts meet, the pool's only thread goes on."""
    with ThreadPoolExecutor(1) as threads:
        idents = set()
        for rounds in range(2000):
            blocking, started = Interruptible(), threading.Event()

            def run(blocking: Interruptible, started: threading.Event, steps: int) -> int:
                with blocking.running():
                    started.set()
                    for _ in range(steps):
                        pass
                return threading.get_ident()

            running = threads.submit(run, blocking, started, rounds % 200)
            started.wait(10)
            blocking.interrupt()
            blocking.interrupt()
            try:
                idents.add(running.result(10))
            except Interrupted:
                continue
        assert len(idents) == 1
