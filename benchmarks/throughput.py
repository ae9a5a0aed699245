"""``python -m benchmarks.throughput``: the worker next to ``pyarrow.flight``'s C++ server, in one run of turns."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from benchmarks import plans
from benchmarks.life import print_life
from benchmarks.memory import print_memory
from benchmarks.queries import print_queries
from benchmarks.rates import costs, measure, print_costs, print_rates
from benchmarks.report import print_circumstances
from benchmarks.servers import helper, running_servers
from benchmarks.wire import print_wire

ROUNDS = 5
SECONDS_A_RESULT = 20
SECONDS_OF_QUERIES = 1.5
LIVES = 200
# Enough that no client process is busy all the time, which would measure the client's GIL.
CLIENT_PROCESSES = 4
QUICK_SHARE = 8


def main() -> None:
    options = _arguments()
    share = QUICK_SHARE if options.quick else 1
    if options.plot is not None:
        from benchmarks.plot import draw  # only those who want a plot need what draws it
    with ExitStack() as stack:
        worker, other = stack.enter_context(running_servers())
        fresh = stack.enter_context(running_servers())
        helpers = [stack.enter_context(helper()) for _ in range(CLIENT_PROCESSES)]
        print_circumstances(options)

        cases = _cases(share, options.scale or ("0.1" if options.quick else "1"))
        seconds = 0 if options.quick else SECONDS_A_RESULT
        measured = {case: measure(case, worker, other, helpers[0], options.rounds, seconds) for case in cases}
        print_rates(measured)
        found = costs(measured)
        print_costs(found)
        if options.plot is not None:
            draw(found, options.plot)
        print_wire(cases, worker, other)
        print_queries(plans.one_row(), worker, other, helpers, options.rounds, SECONDS_OF_QUERIES / share)
        lives = {"one row": plans.one_row(), "TPC-H q5": plans.tpch_query()}
        print_life(lives, worker, other, helpers[0], LIVES // share)
        print_memory(cases[2], (worker, other), tuple(fresh))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.throughput")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help="the least number of turns of each server")
    parser.add_argument("--quick", action="store_true", help="less data and fewer requests, for a look")
    parser.add_argument("--scale", help="TPC-H's scale factor (default: 1, with --quick 0.1)")
    parser.add_argument("--plot", type=Path, help="draws where the time goes into this file, an SVG or PNG")
    return parser.parse_args()


def _cases(share: int, scale: str) -> list[plans.Case]:
    # Small batches are where Python could lose most, and joining them win most.
    sizes = ((2_000_000, 1024, 2.0), (4_000_000, 8192, 1.0), (8_000_000, 65536, 1.0))
    return [
        *(plans.floats(rows // share, batch_size, target) for rows, batch_size, target in sizes),
        *plans.lineitem(scale, (1, 4)),
    ]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    main()
