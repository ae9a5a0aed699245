"""What is printed: the circumstances, tables, and what the servers took."""

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.servers import Server

PACKAGES = ("datafusion", "pyarrow", "grpcio", "uvloop", "protobuf")
MEGABYTE = 1_000_000


def print_circumstances(options: argparse.Namespace) -> None:
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.2f} before the start; {options.rounds} rounds, servers take turns")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in (headers, ["-" * width for width in widths], *table[1:]):
        first, *others = zip(line, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))


def print_memory(servers: Iterable[Server]) -> None:
    peaks = (f"{server.name} {server.peak_memory() / MEGABYTE:.0f}" for server in servers)
    print(f"\npeak resident memory in MB: {', '.join(peaks)}")


def arguments(program: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program)
    parser.add_argument("--rounds", type=_positive, default=rounds, help="how often each server has its turn")
    parser.add_argument("--quick", action="store_true", help="less data and fewer requests, for a look")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
