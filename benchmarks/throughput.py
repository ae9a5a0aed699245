"""``python -m benchmarks.throughput``: how many bytes and messages a second come through either server."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from pyarrow import flight

from benchmarks import plans
from benchmarks.report import MEGABYTE, arguments, print_circumstances, print_memory, print_table
from benchmarks.servers import running_servers
from worker import plan_ticket

ROUNDS = 7
QUICK_SHARE = 8


@dataclass(frozen=True)
class Run:
    seconds: float
    messages: int


def main() -> None:
    parser = arguments("python -m benchmarks.throughput", ROUNDS)
    parser.add_argument("--scale", help="TPC-H's scale factor (default: 1, with --quick 0.1)")
    options = parser.parse_args()
    with running_servers() as (worker, other):
        print_circumstances(options)
        with flight.connect(worker.url) as to_worker, flight.connect(other.url) as to_other:
            rows = [
                _compare(case, to_worker, to_other, options.rounds) for case in _cases(options.quick, options.scale)
            ]
        print_table(
            (
                "case",
                "worker MB/s",
                "pyarrow.flight MB/s",
                "worker messages/s",
                "pyarrow.flight messages/s",
                "worker / pyarrow.flight",
            ),
            rows,
        )
        print_memory((worker, other))


def _cases(quick: bool, scale: str | None) -> list[plans.Case]:
    share = QUICK_SHARE if quick else 1
    sizes = ((2_000_000, 1024), (4_000_000, 8192), (8_000_000, 65536))
    return [
        *(plans.floats(rows // share, batch_size) for rows, batch_size in sizes),
        *plans.lineitem(scale or ("0.1" if quick else "1"), (4, 1)),
    ]


def _compare(
    case: plans.Case, to_worker: flight.FlightClient, to_other: flight.FlightClient, rounds: int
) -> tuple[str, ...]:
    # The first turn of each is not counted: it opens connections and warms caches.
    runs = [(_run(case, to_worker), _run(case, to_other)) for _ in range(rounds + 1)][1:]
    sides = tuple(zip(*runs, strict=True))
    rates = [median(case.size / run.seconds / MEGABYTE for run in side) for side in sides]
    messages = [median(run.messages / run.seconds for run in side) for side in sides]
    ratio = median(other.seconds / worker.seconds for worker, other in runs)
    return (case.name, *(f"{rate:.0f}" for rate in rates), *(f"{rate:.0f}" for rate in messages), f"{ratio:.2f}")


def _run(case: plans.Case, client: flight.FlightClient) -> Run:
    """All partitions at once, each in a thread."""
    tickets = [flight.Ticket(plan_ticket(case.plan, partition)) for partition in range(case.partitions)]
    with ThreadPoolExecutor(case.partitions) as threads:
        start = time.perf_counter()
        read = list(threads.map(lambda ticket: _read(client, ticket), tickets))
        seconds = time.perf_counter() - start
    rows, messages = (sum(numbers) for numbers in zip(*read, strict=True))
    if rows != case.rows:
        raise RuntimeError(f"{case.name}: {rows} rows came, {case.rows} are right")
    return Run(seconds, messages)


def _read(client: flight.FlightClient, ticket: flight.Ticket) -> tuple[int, int]:
    rows = messages = 0
    for chunk in client.do_get(ticket):
        rows += chunk.data.num_rows
        messages += 1
    return rows, messages


if __name__ == "__main__":
    main()
