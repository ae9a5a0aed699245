"""The plans that are run. Both servers get the same bytes."""

import math
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datafusion import DataFrame, SessionConfig, SessionContext

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".tpch"

# At scale factor 1: what its strings take in views, and some more.
MOST_OF_LINEITEM = 1_300_000_000


@dataclass(frozen=True)
class Case:
    name: str
    plan: bytes
    partitions: int
    rows: int
    size: int
    """Bytes of the result as Arrow data, the same however a server cuts or packs it."""
    target: float = 1
    """Of the worker's rate over the other server's."""
    most: float = math.inf
    """Of bytes on the wire."""


def one_row() -> bytes:
    return SessionContext().sql("SELECT 1 AS one").execution_plan().to_bytes()


def tpch_query() -> bytes:
    """TPC-H's q5, six tables joined, over next to no rows: what is left is the plan's own weight."""
    return tpch_plans(5)["q5"]


def tpch_plans(*numbers: int) -> dict[str, bytes]:
    """TPC-H's queries of some numbers, or all, with 4 target partitions, over next to no rows."""
    session = _session(4)
    for file in _tables("0.01").iterdir():
        session.register_parquet(file.stem, file)
    plans = {}
    for number in numbers or range(1, 23):
        for statement in (ROOT / "tests" / "data" / "tpch" / f"q{number}.sql").read_text().split(";"):
            frame = session.sql(statement) if statement.strip() else None
            if frame is not None and not statement.strip().startswith(("create", "drop")):
                plans[f"q{number}"] = frame.execution_plan().to_bytes()
    return plans


def floats(rows: int, batch_size: int, target: float = 1) -> Case:
    """Eight columns of float64, so cheap to compute that sending them is most of the work."""
    session = _session(1, {"datafusion.execution.batch_size": str(batch_size)})
    columns = ", ".join(f"value + {number}.5 AS c{number}" for number in range(8))
    plan = session.sql(f"SELECT {columns} FROM range({rows})").execution_plan()
    return Case(f"8 x float64, {batch_size // 1024} k rows a batch", plan.to_bytes(), 1, rows, rows * 8 * 8, target)


def lineitem(scale: str, partitions: tuple[int, ...]) -> list[Case]:
    """The largest table of TPC-H out of Parquet: strings as views, dates, decimals."""
    file = _tables(scale, "lineitem") / "lineitem.parquet"
    rows, size = _measure(_table(file, 1))
    plans = [_table(file, target).execution_plan() for target in partitions]
    return [
        Case(
            f"lineitem, {_partitions(plan.partition_count)}",
            plan.to_bytes(),
            plan.partition_count,
            rows,
            size,
            most=MOST_OF_LINEITEM * float(scale),
        )
        for plan in plans
    ]


def _partitions(count: int) -> str:
    return f"{count} partitions at once" if count > 1 else "1 partition"


def _session(partitions: int, options: dict[str, str] | None = None) -> SessionContext:
    return SessionContext(SessionConfig(options).with_target_partitions(partitions))


def _table(file: Path, partitions: int) -> DataFrame:
    session = _session(partitions)
    session.register_parquet("lineitem", file)
    return session.sql("SELECT * FROM lineitem")


def _measure(frame: DataFrame) -> tuple[int, int]:
    """Rows, and bytes with views as the plain strings that they stand for: a view's buffers hold unused bytes too."""
    rows = size = 0
    for item in frame.execute_stream():
        batch = item.to_pyarrow()
        rows += batch.num_rows
        size += sum(
            (column.cast(pa.string()) if column.type == pa.string_view() else column).nbytes for column in batch.columns
        )
    return rows, size


def _tables(scale: str, *names: str) -> Path:
    """A folder with TPC-H's tables, or those of some names; made once."""
    folder = CACHE / "-".join(("scale", scale, *names))
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        generator = Path(sysconfig.get_path("scripts")) / "tpchgen-cli"
        # Renamed when it is whole, so that a run that was broken off leaves no half of a table.
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            made = Path(unfinished) / "tables"
            chosen = ["--tables", ",".join(names)] if names else []
            subprocess.run(
                [generator, "parquet", "-s", scale, *chosen, f"--output-dir={made}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            made.rename(folder)
    return folder
