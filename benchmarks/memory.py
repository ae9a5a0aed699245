"""What either server holds for clients that read slowly."""

import time
from contextlib import ExitStack

from pyarrow import flight

from benchmarks.plans import Case
from benchmarks.report import MEGABYTE, print_table
from benchmarks.servers import Server
from worker import plan_ticket

READERS = 64
CHUNKS = 4
# Time enough for a server to fill whatever it fills before it waits.
PAUSE = 0.5


def print_memory(case: Case, used: tuple[Server, ...], fresh: tuple[Server, ...]) -> None:
    """
    Args:
        case: what slow readers read.
        used: servers that all else ran on.
        fresh: the same servers, on which nothing has run.
    """
    rows = []
    for old, server in zip(used, fresh, strict=True):
        start = server.peak_memory()
        with flight.connect(server.url) as client:
            for _chunk in client.do_get(flight.Ticket(plan_ticket(case.plan))):
                pass
        one = server.peak_memory()
        _read_slowly(case, server)
        many = server.peak_memory()
        peaks = (old.peak_memory(), start, one, many, (many - one) / READERS)
        rows.append((server.name, *(f"{peak / MEGABYTE:.1f}" for peak in peaks)))
    print_table(
        f"Peak resident memory in MB, and with {READERS} slow readers of {case.size / MEGABYTE:.0f} MB each",
        ("server", "all of the above", "fresh", "one reader", f"{READERS} slow readers", "more for each"),
        rows,
    )


def _read_slowly(case: Case, server: Server) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(flight.connect(server.url)) for _ in range(READERS)]
        streams = [client.do_get(flight.Ticket(plan_ticket(case.plan))) for client in clients]
        for _ in range(CHUNKS):
            for stream in streams:
                stream.read_chunk()
            time.sleep(PAUSE)
        for stream in streams:
            stream.cancel()
