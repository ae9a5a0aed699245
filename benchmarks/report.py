"""What is printed: the circumstances, and tables."""

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("datafusion", "pyarrow", "grpcio", "uvloop", "protobuf")
MEGABYTE = 1_000_000
GIGABYTE = 1_000_000_000


def print_circumstances(options: argparse.Namespace) -> None:
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.2f} before the start; at least {options.rounds} rounds, in turns")


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}\n")
    for line in (headers, ["-" * width for width in widths], *table[1:]):
        first, *others = zip(line, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))


def holds(held: bool) -> str:
    return "yes" if held else "NO"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
