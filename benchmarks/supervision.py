"""``python -m benchmarks.supervision``: the worker with and without its supervisor, in one run of turns."""

import argparse
from contextlib import ExitStack
from statistics import median

from pyarrow import flight

from benchmarks import plans, queries, rates
from benchmarks.report import MEGABYTE, print_table
from benchmarks.servers import helper, running_worker, supervised_worker

ROUNDS = 9
CLIENTS = 8
CLIENT_PROCESSES = 2
SECONDS = 1.5


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.supervision")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each (default: %(default)s)")
    turns = parser.parse_args().rounds
    with ExitStack() as stack:
        servers = (stack.enter_context(supervised_worker()), stack.enter_context(running_worker()))
        helpers = [stack.enter_context(helper()) for _ in range(CLIENT_PROCESSES)]
        clients = [stack.enter_context(flight.connect(server.url)) for server in servers]
        result, one_row = plans.floats(4_000_000, 8192, 1.0), plans.one_row()
        streams, answers = [], []
        # The first round is not counted: it opens connections and warms caches.
        for _ in range(turns + 1):
            streams.append(
                [
                    result.size / MEGABYTE / rates.turn(result, server, client).seconds
                    for server, client in zip(servers, clients, strict=True)
                ]
            )
            answers.append([queries.turn(one_row, server, helpers, CLIENTS, SECONDS).per_second for server in servers])
    print_table(
        f"Medians of {turns} rounds, with a supervisor and without",
        ("", "with", "without", "ratio"),
        [
            (
                name,
                *(f"{median(side):,.0f}" for side in zip(*rounds, strict=True)),
                f"{median(supervised / alone for supervised, alone in rounds):.2f}",
            )
            for name, rounds in (("MB/s", streams[1:]), (f"queries/s of {CLIENTS} clients", answers[1:]))
        ],
    )


if __name__ == "__main__":
    main()
