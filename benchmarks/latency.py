"""``python -m benchmarks.latency``: how long a one-row query takes, and how many a second there may be."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeAlias

from datafusion import ExecutionPlan
from pyarrow import flight

from benchmarks import plans
from benchmarks.report import arguments, print_circumstances, print_memory, print_table
from benchmarks.servers import Server, running_servers
from worker import SessionStateBuilder, plan_ticket

ROUNDS = 9
REQUESTS = 400
QUICK_REQUESTS = 50
CLIENTS = 8

Query: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Turn:
    milliseconds: list[float]
    """Of requests one after the other."""
    per_second: float
    """Requests of all clients at once."""


def main() -> None:
    options = arguments("python -m benchmarks.latency", ROUNDS).parse_args()
    requests = QUICK_REQUESTS if options.quick else REQUESTS
    with running_servers() as servers, ExitStack() as stack:
        print_circumstances(options)
        plan = plans.one_row()
        clients = {"in-process": [_in_process(plan)] * CLIENTS}
        for server in servers:
            clients[server.name] = [_client(server, plan, stack) for _ in range(CLIENTS)]
        # The first turn of each is not counted: it opens connections and warms caches.
        rounds = [
            {name: _turn(queries, requests) for name, queries in clients.items()} for _ in range(options.rounds + 1)
        ][1:]
        _print(rounds)
        print_memory(servers)


def _in_process(plan: bytes) -> Query:
    def query() -> None:
        session = SessionStateBuilder().build()
        for batch in session.execute(ExecutionPlan.from_bytes(session, plan), 0):
            batch.to_pyarrow()

    return query


def _client(server: Server, plan: bytes, stack: ExitStack) -> Query:
    client = stack.enter_context(flight.connect(server.url))
    ticket = flight.Ticket(plan_ticket(plan))

    def query() -> None:
        for _chunk in client.do_get(ticket):
            pass

    return query


def _turn(queries: list[Query], requests: int) -> Turn:
    milliseconds = [_milliseconds(queries[0]) for _ in range(requests)]

    def repeat(query: Query) -> None:
        for _ in range(requests // CLIENTS):
            query()

    with ThreadPoolExecutor(CLIENTS) as threads:
        start = time.perf_counter()
        list(threads.map(repeat, queries))
        seconds = time.perf_counter() - start
    return Turn(milliseconds, requests // CLIENTS * CLIENTS / seconds)


def _milliseconds(query: Query) -> float:
    start = time.perf_counter()
    query()
    return (time.perf_counter() - start) * 1000


def _print(rounds: list[dict[str, Turn]]) -> None:
    headers = ("one-row query", "p50 ms", "p99 ms", f"queries/s, {CLIENTS} clients")
    print_table(
        headers,
        [
            (
                name,
                f"{_over(rounds, name, _p50):.2f}",
                f"{_over(rounds, name, _p99):.2f}",
                f"{_over(rounds, name, _per_second):.0f}",
            )
            for name in rounds[0]
        ],
    )
    print_table(
        ("ratio, median of rounds", *headers[1:]),
        [
            (f"worker / {name}", *(_ratio(rounds, name, measure) for measure in (_p50, _p99, _per_second)))
            for name in rounds[0]
            if name != "worker"
        ],
    )


def _over(rounds: list[dict[str, Turn]], name: str, measure: Callable[[Turn], float]) -> float:
    return median(measure(turns[name]) for turns in rounds)


def _ratio(rounds: list[dict[str, Turn]], name: str, measure: Callable[[Turn], float]) -> str:
    return f"{median(measure(turns['worker']) / measure(turns[name]) for turns in rounds):.2f}"


def _p50(turn: Turn) -> float:
    return median(turn.milliseconds)


def _p99(turn: Turn) -> float:
    return quantiles(turn.milliseconds, n=100)[98]


def _per_second(turn: Turn) -> float:
    return turn.per_second


if __name__ == "__main__":
    main()
