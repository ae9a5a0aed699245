"""What many tests need: TPC-H's tables and queries."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from datafusion import SessionConfig, SessionContext
from hypothesis import HealthCheck, settings

DATA = Path(__file__).parent / "data"

# The same examples each time, so that a failure is of a change. ``--hypothesis-profile thorough`` looks for others.
_any_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", _any_machine, max_examples=100, derandomize=True)
settings.register_profile("thorough", _any_machine, max_examples=2000, print_blob=True)
settings.load_profile("quick")

EXIT_STATUS = pytest.StashKey[int]()


def generate_tpch(folder: Path, scale: str) -> Path:
    """Writes TPC-H's eight tables into a folder, a Parquet file each."""
    generator = Path(sysconfig.get_path("scripts")) / "tpchgen-cli"
    subprocess.run([generator, "parquet", "-s", scale, f"--output-dir={folder}"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tpch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPC-H's eight tables at scale factor 0.1, a Parquet file each."""
    return generate_tpch(tmp_path_factory.mktemp("tpch"), "0.1")


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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process as the worker does: threads of DataFusion's runtime may crash an interpreter that finalizes."""
    if EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])
