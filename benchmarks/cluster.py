"""``python -m benchmarks.cluster``: two of our workers next to two Rust workers, with the same coordinator, in turns.

The queries are TPC-H's. Both clusters are up all the time, and each query is run on one and then on the other, so that
whatever else the machine does slows down both. It needs:

- the environment variable ``DDF``: the path of ``ddf``, the program of Distributed DataFusion that is both the
  coordinator (``ddf query``) and the Rust worker (``ddf worker PORT``);
- ``--data``: a folder with TPC-H's tables, a Parquet file each (``tpchgen-cli parquet -s 1 --output-dir=DIR``).

A Markdown table is printed: of each query the medians, and the median of its turns' ratios. A run's time is the
coordinator's, without the start of its process.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeAlias

from benchmarks.report import print_circumstances
from benchmarks.servers import running, running_worker

# Milliseconds of a query on Python's workers, and right after on Rust's.
Turn: TypeAlias = tuple[float, float]

ROUNDS = 5
QUERIES = Path(__file__).parent.parent / "tests" / "data" / "tpch"
MEMBERS = 2
START_SECONDS = 20
TARGET = 1.1
MOST_OF_A_QUERY = 1.5


def main() -> None:
    options = _arguments()
    ddf = os.environ.get("DDF")
    if ddf is None:
        sys.exit("DDF, the environment variable, does not say where the program of Distributed DataFusion is")
    names = options.queries.split(",") if options.queries else [f"q{number}" for number in range(1, 23)]
    with ExitStack() as stack:
        ours = [stack.enter_context(running_worker()).url.replace("grpc://", "http://") for _ in range(MEMBERS)]
        theirs = [stack.enter_context(_rust_worker(ddf)) for _ in range(MEMBERS)]
        print_circumstances(options)
        print("\n| query | Python workers, ms | Rust workers, ms | ratio |\n| --- | ---: | ---: | ---: |")
        queries = [_query(ddf, options, name, ours, theirs) for name in names]
    totals = [
        (sum(python), sum(rust)) for python, rust in (zip(*turn, strict=True) for turn in zip(*queries, strict=True))
    ]
    _print_row("**total**", totals)
    slowest = max(_ratio(turns) for turns in queries)
    print(f"\nAim: {TARGET} in total (is {_ratio(totals):.2f}), {MOST_OF_A_QUERY} at most (is {slowest:.2f}).")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cluster")
    parser.add_argument("--data", type=Path, required=True, help="the folder of TPC-H's tables")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each query on each cluster, after a first")
    parser.add_argument("--queries", help="only these: q1,q6")
    return parser.parse_args()


def _query(ddf: str, options: argparse.Namespace, name: str, ours: list[str], theirs: list[str]) -> list[Turn]:
    """The turns of a query, whose medians are printed."""
    turns = [
        (_run(ddf, options.data, name, ours), _run(ddf, options.data, name, theirs)) for _ in range(options.rounds + 1)
    ]
    # The first is for connections, and for files to be in the system's cache.
    _print_row(name, turns[1:])
    return turns[1:]


def _run(ddf: str, data: Path, name: str, urls: list[str]) -> float:
    """The milliseconds of one run."""
    command = [ddf, "query", "--data", str(data), "--sql", str(QUERIES), "--only", name, "--workers", ",".join(urls)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = re.search(r"^\w+ run=0 rows=\d+ ms=(\d+)$", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"{name} failed: {done.stdout}")
    return float(found[1])


def _print_row(name: str, turns: Sequence[Turn]) -> None:
    python, rust = (median(side) for side in zip(*turns, strict=True))
    print(f"| {name} | {python:,.0f} | {rust:,.0f} | {_ratio(turns):.2f} |", flush=True)


def _ratio(turns: Sequence[Turn]) -> float:
    """The median of the ratios of turns."""
    return median(python / rust for python, rust in turns)


@contextmanager
def _rust_worker(ddf: str) -> Iterator[str]:
    """The URL of a Rust worker."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running([ddf, "worker", str(port)]):
        deadline = time.monotonic() + START_SECONDS
        while not _accepts(port):
            if time.monotonic() > deadline:
                raise RuntimeError("the Rust worker did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
