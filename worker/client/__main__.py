"""``python -m worker.client``: SQL planned here, executed on a worker, its rows printed or written to a file."""

import argparse
import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datafusion import ExecutionPlan, SessionConfig, SessionContext, SQLOptions

from worker.client import WorkerClient

PROGRAM = "python -m worker.client"

_READERS: Mapping[str, Callable[[SessionContext], Callable[..., None]]] = {
    ".parquet": lambda session: session.register_parquet,
    ".csv": lambda session: session.register_csv,
    ".json": lambda session: session.register_json,
    ".arrow": lambda session: session.register_arrow,
}
_WRITERS: Mapping[str, Callable[[Path, pa.Schema], Any]] = {
    ".parquet": pa.parquet.ParquetWriter,
    ".csv": pa.csv.CSVWriter,
    ".arrow": pa.ipc.new_file,
}
# The CSV writer knows no views.
_PLAIN_TYPES = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


def main() -> None:
    """Runs one query, and exits with 1 when it fails."""
    options = _parser().parse_args()
    try:
        asyncio.run(_run(options))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"{PROGRAM}: {error.code().name}: {error.details()}")
    except (ValueError, OSError, pa.ArrowException) as error:
        sys.exit(f"{PROGRAM}: {error}")


async def _run(options: argparse.Namespace) -> None:
    plan = _plan(options.table, options.sql, options.target_partitions)
    files = {"tls_root_certs": options.tls_ca, "cert_chain": options.tls_cert, "private_key": options.tls_key}
    tls = {name: file.read_bytes() for name, file in files.items() if file}
    async with WorkerClient(options.url, headers=options.header, **tls) as client:
        schema = await client.schema(plan, timeout=options.timeout)
        async with aclosing(client.execute(plan, timeout=options.timeout)) as batches:
            if options.output is None:
                table = pa.Table.from_batches([batch async for batch in batches], schema)
                print("\n".join(_lines(table)))
                return
            await _write(options.output, schema, batches)


async def _write(path: Path, schema: pa.Schema, batches: AsyncIterator[pa.RecordBatch]) -> None:
    """Writes a file, which is there only when all rows are in it."""
    if path.suffix == ".csv":
        schema = pa.schema([field.with_type(_PLAIN_TYPES.get(field.type, field.type)) for field in schema])
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with _WRITERS[path.suffix](unfinished, schema) as writer:
            async for batch in batches:
                writer.write_batch(batch.cast(schema))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _plan(tables: list[tuple[str, str]], sql: str, target_partitions: int | None) -> ExecutionPlan:
    """The physical plan of a query.

    Raises:
        ValueError: DataFusion cannot plan it; the text says why.
    """
    config = SessionConfig()
    session = SessionContext(config.with_target_partitions(target_partitions) if target_partitions else config)
    try:
        for name, path in tables:
            _READERS[Path(path).suffix](session)(name, path)
        # Nothing is to be done here but planning.
        only_queries = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
        return session.sql_with_options(sql, only_queries).execution_plan()
    except Exception as error:
        raise ValueError(str(error).partition("\nThis issue was likely")[0]) from error


def _lines(table: pa.Table) -> Iterator[str]:
    """The rows as text, in columns as wide as their widest value, numbers to the right."""
    right = [
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        for kind in table.schema.types
    ]
    columns = [
        [name, *("NULL" if value is None else str(value) for value in column.to_pylist())]
        for name, column in zip(table.schema.names, table.columns, strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    rule = "+".join(["", *("-" * (width + 2) for width in widths), ""])
    yield rule
    for number, row in enumerate(zip(*columns, strict=True)):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield rule
    yield rule
    yield f"{table.num_rows} row{'s' if table.num_rows != 1 else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument("--url", default="grpc://127.0.0.1:8000", help="the worker (default: %(default)s)")
    parser.add_argument(
        "--table",
        action="append",
        default=[],
        type=_table,
        metavar="NAME=PATH",
        help="a table and its file, which is read here for planning, and by the worker under the same path: "
        f"{', '.join(_READERS)}; repeatable",
    )
    parser.add_argument(
        "--header", action="append", default=[], type=_header, metavar="NAME=VALUE", help="sent along; repeatable"
    )
    for name, what in {
        "ca": "who vouches for the worker (default: the system's certificates)",
        "cert": "what is shown to a worker that asks for a certificate",
        "key": "the key of --tls-cert",
    }.items():
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=f"for grpc+tls://, in PEM: {what}")
    parser.add_argument(
        "--output", type=_output, metavar="FILE", help=f"where the rows go instead of the screen: {', '.join(_WRITERS)}"
    )
    parser.add_argument(
        "--target-partitions", type=_positive, metavar="N", help="partitions to plan for (default: cores)"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for every request")
    parser.add_argument("sql", help="the query")
    return parser


def _pair(text: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {what}")
    return name, value


def _header(text: str) -> tuple[str, str]:
    name, value = _pair(text, "name=value")
    if not re.fullmatch(r"[0-9A-Za-z_.-]+", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a header's name: letters, digits, '-', '_' and '.' are right"
        )
    return name, value


def _table(text: str) -> tuple[str, str]:
    name, path = _pair(text, "name=path")
    if Path(path).suffix not in _READERS:
        raise argparse.ArgumentTypeError(f"{path!r} does not end in one of {', '.join(_READERS)}")
    if "://" in path:
        raise argparse.ArgumentTypeError(f"{path!r} is not a file of this machine, which planning reads too")
    # Not where a link leads to: the worker opens what is named, and the name says what it is.
    return name, str(Path(path).absolute())


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _WRITERS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(_WRITERS)}")
    return path


if __name__ == "__main__":
    main()
