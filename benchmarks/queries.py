"""How many queries of one row either server answers in a second, asked by several clients at once."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median, quantiles

from pyarrow import flight

from benchmarks.report import holds, print_table
from benchmarks.servers import Server
from worker import plan_ticket

CLIENTS = (1, 8, 64)
TARGET = 1.0
# For the processes to connect in.
HEAD_START = 0.5


@dataclass(frozen=True)
class Turn:
    per_second: float
    milliseconds: list[float]
    client_cpu: float
    """Of the busiest client process, as a share of one core: 1 would mean that it, not the server, is the limit."""


def print_queries(
    plan: bytes, worker: Server, other: Server, helpers: Sequence[Executor], rounds: int, seconds: float
) -> None:
    rows = []
    for clients in CLIENTS:
        done = [
            tuple(turn(plan, server, helpers, clients, seconds) for server in (worker, other)) for _ in range(rounds)
        ]
        sides = tuple(zip(*done, strict=True))
        ratio = median(ours.per_second / theirs.per_second for ours, theirs in done)
        rows.append(
            (
                str(clients),
                *(f"{median(turn.per_second for turn in side):,.0f}" for side in sides),
                f"{ratio:.2f}",
                f"{TARGET:.1f}",
                holds(ratio >= TARGET),
                *(_latency(side) for side in sides),
                " / ".join(f"{median(turn.client_cpu for turn in side):.2f}" for side in sides),
            )
        )
    print_table(
        f"Queries of one row a second, asked from {len(helpers)} processes (one for one client)",
        ("clients", "worker", "flight", "ratio", "target", "holds", "worker ms", "flight ms", "client's core"),
        rows,
    )


def _latency(turns: Iterable[Turn]) -> str:
    """The median and the 99th percentile."""
    percentiles = quantiles([time for turn in turns for time in turn.milliseconds], n=100)
    return f"{percentiles[49]:.2f} p99 {percentiles[98]:.2f}"


def turn(plan: bytes, server: Server, helpers: Sequence[Executor], clients: int, seconds: float) -> Turn:
    used = helpers[:clients]
    start = time.monotonic() + HEAD_START
    asking = [
        helper.submit(_ask, server.url, plan_ticket(plan), clients // len(used), start, start + seconds)
        for helper in used
    ]
    milliseconds, cpu = zip(*(asked.result() for asked in asking), strict=True)
    answered = [number for each in milliseconds for number in each]
    return Turn(len(answered) / seconds, answered, max(cpu) / seconds)


def _ask(url: str, ticket: bytes, clients: int, start: float, stop: float) -> tuple[list[float], float]:
    """The milliseconds that each query took, and the seconds that this process worked for them."""

    def ask(_number: int) -> list[float]:
        times = []
        with flight.connect(url) as client:
            client.do_get(flight.Ticket(ticket)).read_all()
            time.sleep(max(0, start - time.monotonic()))
            while (began := time.monotonic()) < stop:
                client.do_get(flight.Ticket(ticket)).read_all()
                times.append((time.monotonic() - began) * 1000)
        return times

    with ThreadPoolExecutor(clients) as threads:
        began = time.process_time()
        times = [number for each in threads.map(ask, range(clients)) for number in each]
        return times, time.process_time() - began
