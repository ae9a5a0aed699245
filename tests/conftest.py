"""What many tests need: TPC-H's tables and queries."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from datafusion import SessionConfig, SessionContext

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tpch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPC-H's eight tables at scale factor 0.1, a Parquet file each."""
    folder = tmp_path_factory.mktemp("tpch")
    generator = Path(sysconfig.get_path("scripts")) / "tpchgen-cli"
    subprocess.run([generator, "parquet", "-s", "0.1", f"--output-dir={folder}"], check=True, capture_output=True)
    return folder


@pytest.fixture
def tpch(tpch_folder: Path) -> SessionContext:
    """A session that plans queries over TPC-H's tables with 4 target partitions."""
    session = SessionContext(SessionConfig().with_target_partitions(4))
    for file in tpch_folder.glob("*.parquet"):
        session.register_parquet(file.stem, file)
    return session


def tpch_query(number: int) -> list[str]:
    """The statements of a TPC-H query; the last but for ``drop view`` is the one that has rows."""
    text = (DATA / "tpch" / f"q{number}.sql").read_text()
    return [statement for statement in text.split(";") if statement.strip()]
