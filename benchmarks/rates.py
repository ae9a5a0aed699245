"""How fast results come through either server, and where the time goes."""

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from pyarrow import flight

from benchmarks import inprocess
from benchmarks.plans import Case
from benchmarks.report import GIGABYTE, MEGABYTE, holds, print_table
from benchmarks.servers import Server
from worker import plan_ticket


@dataclass(frozen=True)
class Turn:
    seconds: float
    server_cpu: float
    client_cpu: float


@dataclass(frozen=True)
class Round:
    worker: Turn
    other: Turn
    read: float
    """Seconds of DataFusion alone, in a process that sends nothing."""
    encode: float
    """Seconds of DataFusion and the worker's encoder, in the same process."""


@dataclass(frozen=True)
class Costs:
    """Seconds a gigabyte of the result, medians of all rounds: of the wall, or of all cores."""

    case: str
    read: float
    encode: float
    worker: float
    other: float
    worker_cpu: float
    other_cpu: float
    worker_client_cpu: float
    other_client_cpu: float


def measure(case: Case, worker: Server, other: Server, helper: Executor, rounds: int, seconds: float) -> list[Round]:
    """At least so many rounds, and more if that takes less than so many seconds."""
    done: list[Round] = []
    with flight.connect(worker.url) as to_worker, flight.connect(other.url) as to_other:
        start = time.monotonic()
        # The first round is not counted: it opens connections and warms caches.
        while len(done) <= rounds or time.monotonic() < start + seconds:
            done.append(
                Round(
                    turn(case, worker, to_worker),
                    turn(case, other, to_other),
                    helper.submit(inprocess.read_seconds, case).result(),
                    helper.submit(inprocess.encode_seconds, case).result(),
                )
            )
    return done[1:]


def print_rates(measured: dict[Case, list[Round]]) -> None:
    rows = []
    for case, rounds in measured.items():
        worker, other = (
            median(times) for times in zip(*((r.worker.seconds, r.other.seconds) for r in rounds), strict=True)
        )
        ratio = median(r.other.seconds / r.worker.seconds for r in rounds)
        rates = [
            amount / unit / seconds
            for amount, unit in ((case.size, MEGABYTE), (case.rows, 1))
            for seconds in (worker, other)
        ]
        rows.append(
            (
                case.name,
                *(f"{rate:,.0f}" for rate in rates),
                str(len(rounds)),
                f"{ratio:.2f}",
                f"{case.target:.1f}",
                holds(ratio >= case.target),
            )
        )
    print_table(
        "Rates: the worker's, pyarrow.flight's, and the median of the rounds' ratios",
        (
            "result",
            "worker MB/s",
            "flight MB/s",
            "worker rows/s",
            "flight rows/s",
            "rounds",
            "ratio",
            "target",
            "holds",
        ),
        rows,
    )


def costs(measured: dict[Case, list[Round]]) -> list[Costs]:
    found = []
    for case, rounds in measured.items():
        columns = zip(
            *(
                (
                    r.read,
                    r.encode,
                    r.worker.seconds,
                    r.other.seconds,
                    r.worker.server_cpu,
                    r.other.server_cpu,
                    r.worker.client_cpu,
                    r.other.client_cpu,
                )
                for r in rounds
            ),
            strict=True,
        )
        found.append(Costs(case.name, *(median(column) / case.size * GIGABYTE for column in columns)))
    return found


def print_costs(found: list[Costs]) -> None:
    print_table(
        "Seconds a GB: on the wall (in process, or through a server), and of all cores (a server's + its client's)",
        ("result", "in process", "+ encode", "worker", "flight", "worker's cores", "flight's cores"),
        [
            (
                c.case,
                *(f"{seconds:.2f}" for seconds in (c.read, c.encode, c.worker, c.other)),
                f"{c.worker_cpu:.2f} + {c.worker_client_cpu:.2f}",
                f"{c.other_cpu:.2f} + {c.other_client_cpu:.2f}",
            )
            for c in found
        ],
    )


def turn(case: Case, server: Server, client: flight.FlightClient) -> Turn:
    """All partitions at once, each in a thread."""
    tickets = [flight.Ticket(plan_ticket(case.plan, partition)) for partition in range(case.partitions)]
    with ThreadPoolExecutor(case.partitions) as threads:
        server_cpu, client_cpu, start = server.cpu_seconds(), time.process_time(), time.perf_counter()
        rows = sum(threads.map(lambda ticket: sum(chunk.data.num_rows for chunk in client.do_get(ticket)), tickets))
        seconds = time.perf_counter() - start
    if rows != case.rows:
        raise RuntimeError(f"{case.name}: {rows} rows came from {server.name}, {case.rows} are right")
    return Turn(seconds, server.cpu_seconds() - server_cpu, time.process_time() - client_cpu)
