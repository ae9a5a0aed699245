"""What tests of clusters need: the coordinator, workers of either kind, and results that can be compared.

The coordinator is ``ddf``, a Rust program that the environment variable ``DDF`` names: ``ddf worker PORT`` is a worker
of Distributed DataFusion, ``ddf query`` plans SQL and has workers execute it, or does so itself where there are none.
"""

import asyncio
import math
import os
import re
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support import listening, until

DDF = os.environ.get("DDF", "")
needs_ddf = pytest.mark.skipif(not DDF, reason="needs DDF, the cluster program")

ROOT = Path(__file__).parent.parent
QUERIES = Path(__file__).parent / "data" / "cluster"

LINE = re.compile(r"^(\w+) run=0 (?:rows=(\d+) ms=\d+$|ERROR )", re.MULTILINE)

RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class RunningMember:
    """A worker of a cluster, in a process of its own."""

    process: Process
    url: str
    """``http://host:port``, as coordinators take it."""


@asynccontextmanager
async def rust_worker() -> AsyncIterator[RunningMember]:
    """A worker of Distributed DataFusion itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(DDF, "worker", str(port), stdout=DEVNULL, stderr=DEVNULL)

    def accepts() -> bool:
        assert process.returncode is None, "ddf worker has ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        await until(accepts, seconds=20)
        yield RunningMember(process, f"http://127.0.0.1:{port}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def python_worker(*options: str) -> AsyncIterator[RunningMember]:
    """A worker of ours, started from the command line."""
    command = ("-m", "worker", "--no-supervisor", "--port", "0", "--grace", "0", "--log-level", "error", *options)
    async with listening(*command, folder=ROOT) as (process, url):
        yield RunningMember(process, url.replace("grpc://", "http://"))


@asynccontextmanager
async def cluster(*members: AbstractAsyncContextManager[RunningMember]) -> AsyncIterator[list[RunningMember]]:
    """Workers that are started at the same time."""
    started = await asyncio.gather(*(member.__aenter__() for member in members))
    try:
        yield list(started)
    finally:
        await asyncio.gather(*(member.__aexit__(None, None, None) for member in members))


@dataclass(frozen=True)
class Answer:
    """What became of a query."""

    rows: int
    error: str | None
    printed: str
    """The plan, where it was asked for."""
    table: pa.Table | None
    """None where there was no batch, or the query failed."""


@asynccontextmanager
async def asking(data: Path, sql: Path, urls: Sequence[str] = (), *options: str) -> AsyncIterator[Process]:
    """``ddf query`` while it runs; it is killed if it still does when the block ends."""
    workers = ("--workers", ",".join(urls)) if urls else ()
    command = (DDF, "query", "--data", str(data), "--sql", str(sql), *workers, *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ask(data: Path, sql: Path, out: Path, urls: Sequence[str] = (), *options: str) -> dict[str, Answer]:
    """What became of the query of a file, or of all in a folder, by their names.

    ``out`` is a folder for the results, which does not exist yet.
    """
    async with asking(data, sql, urls, "--out", str(out), *options) as process:
        output, errors = (part.decode() for part in await process.communicate())
    lines = list(LINE.finditer(output))
    assert {line[1] for line in lines} == _names(sql), output + errors
    ends = [line.start() for line in lines[1:]] + [len(output)]
    return {
        line[1]: Answer(
            rows=int(line[2] or 0),
            error=None if line[2] else output[line.end() : end].strip(),
            printed=output[line.end() : end] if line[2] else "",
            table=_table(out / f"{line[1]}.arrow"),
        )
        for line, end in zip(lines, ends, strict=True)
    }


def _names(sql: Path) -> set[str]:
    return {file.stem for file in (sql.glob("*.sql") if sql.is_dir() else [sql])}


def _table(file: Path) -> pa.Table | None:
    if not file.exists():
        return None
    with pa.ipc.open_file(file) as reader:
        return reader.read_all()


def is_ordered(sql: str) -> bool:
    """Whether a query ends in ORDER BY. Those of ``QUERIES`` that do leave nothing of the order open."""
    return "order by" in sql.rpartition(")")[2].lower()


def difference(answer: Answer, expected: Answer, *, ordered: bool) -> str | None:
    """What is wrong with an answer, in a line; None where it is the expected one.

    Numbers that depend on the order of additions may differ by ``RELATIVE_TOLERANCE``; views and dictionaries are as
    good as what they encode.
    """
    if answer.error is not None or expected.error is not None:
        return f"{answer.error}, expected {expected.error or f'{expected.rows} rows'}"
    if answer.rows != expected.rows:
        return f"{answer.rows} rows, expected {expected.rows}"
    if answer.table is None or expected.table is None:
        return None  # there are no rows, and no batch that tells of columns
    found, wanted = (
        [(field.name, _plain(field.type)) for field in table.schema] for table in (answer.table, expected.table)
    )
    if found != wanted:
        return f"columns {found}, expected {wanted}"
    order = list if ordered else _sorted
    for row, other in zip(order(_rows(answer.table)), order(_rows(expected.table)), strict=True):
        if len(row) != len(other) or not all(map(_same, row, other)):
            return f"{row}, expected {other}"
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without what is only another encoding of the same values."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _rows(table: pa.Table) -> list[list[Any]]:
    """Each row as one flat list."""
    columns = (column.to_pylist() for column in table.columns)
    return [list(_flat(row)) for row in zip(*columns, strict=True)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _sorted(rows: list[list[Any]]) -> list[list[Any]]:
    """By what is exact first: numbers that differ by next to nothing may be what sets rows apart, but only last."""

    def key(row: list[Any]) -> tuple[str, list[float]]:
        inexact = [float(value) for value in row if isinstance(value, float | Decimal)]
        return repr([value for value in row if not isinstance(value, float | Decimal)]), inexact

    return sorted(rows, key=key)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, float | Decimal) and isinstance(expected, float | Decimal):
        if math.isnan(value) and math.isnan(expected):
            return True
        return math.isclose(value, expected, rel_tol=RELATIVE_TOLERANCE)
    return bool(value == expected)
