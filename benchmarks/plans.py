"""The plans that are run. Both servers get the same bytes."""

import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datafusion import DataFrame, SessionConfig, SessionContext

CACHE = Path(__file__).parent.parent / ".tpch"


@dataclass(frozen=True)
class Case:
    name: str
    plan: bytes
    partitions: int
    rows: int
    size: int
    """Bytes of the result as Arrow data, the same however a server cuts or packs it."""


def one_row() -> bytes:
    return SessionContext().sql("SELECT 1 AS one").execution_plan().to_bytes()


def floats(rows: int, batch_size: int) -> Case:
    """Eight columns of float64, so cheap to compute that sending them is most of the work."""
    session = _session(1, {"datafusion.execution.batch_size": str(batch_size)})
    columns = ", ".join(f"value + {number}.5 AS c{number}" for number in range(8))
    plan = session.sql(f"SELECT {columns} FROM range({rows})").execution_plan()
    return Case(f"8 x float64, {batch_size // 1024} k rows a batch", plan.to_bytes(), 1, rows, rows * 8 * 8)


def lineitem(scale: str, partitions: tuple[int, ...]) -> list[Case]:
    """The largest table of TPC-H out of Parquet: strings as views, dates, decimals."""
    file = _lineitem_file(scale)
    rows, size = _measure(_table(file, 1))
    plans = [_table(file, target).execution_plan() for target in partitions]
    return [
        Case(f"lineitem, {_partitions(plan.partition_count)}", plan.to_bytes(), plan.partition_count, rows, size)
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


def _lineitem_file(scale: str) -> Path:
    folder = CACHE / f"scale-{scale}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        generator = Path(sysconfig.get_path("scripts")) / "tpchgen-cli"
        # Renamed when it is whole, so that a run that was broken off leaves no half of a table.
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            made = Path(unfinished) / "tables"
            subprocess.run(
                [generator, "parquet", "-s", scale, "--tables", "lineitem", f"--output-dir={made}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            made.rename(folder)
    return folder / "lineitem.parquet"
