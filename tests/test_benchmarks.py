"""The benchmark runs, and prints the ratios that it is for, each with whether it holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RESULTS = (
    "8 x float64, 1 k rows a batch",
    "8 x float64, 8 k rows a batch",
    "8 x float64, 64 k rows a batch",
    "lineitem, 1 partition",
    "lineitem, 4 partitions at once",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plot") / "plot.svg"


@pytest.fixture(scope="module")
def printed(plot: Path) -> dict[str, list[list[str]]]:
    """The cells of every table, by the first words of its title."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--quick", "--rounds", "1", "--plot", str(plot)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    _circumstances, *parts = output.split("\n\n")
    titles, tables = parts[::2], parts[1::2]
    return {
        re.split(r"[:;,]| in MB", title)[0]: [re.split(r" {2,}", line) for line in table.splitlines()[2:]]
        for title, table in zip(titles, tables, strict=True)
    }


def agree(ratio: str, target: str, holds: str) -> bool:
    """Whether the verdict is that of the numbers. A ratio may be rounded to its target from either side."""
    return float(ratio) == float(target) or holds == ("yes" if float(ratio) > float(target) else "NO")


def test_every_rate_is_printed_with_its_ratio_and_target(printed: dict[str, list[list[str]]]) -> None:
    assert tuple(row[0] for row in printed["Rates"]) == RESULTS
    for _, *rates, _rounds, ratio, target, holds in printed["Rates"]:
        assert all(int(rate.replace(",", "")) > 0 for rate in rates)
        assert agree(ratio, target, holds)


def test_the_seconds_a_gigabyte_are_printed_in_their_parts(printed: dict[str, list[list[str]]]) -> None:
    assert tuple(row[0] for row in printed["Seconds a GB"]) == RESULTS
    assert all(float(seconds) > 0 for row in printed["Seconds a GB"] for seconds in row[1:5])


def test_the_bytes_on_the_wire_are_counted(printed: dict[str, list[list[str]]]) -> None:
    assert tuple(row[0] for row in printed["Bytes on the wire"]) == RESULTS
    for _, worker, flight, ratio, fits, _, _, largest, _, small in printed["Bytes on the wire"]:
        assert float(ratio) == pytest.approx(float(worker) / float(flight), abs=0.01)
        assert (fits, small) == ("yes", "yes")
        assert 0 < int(largest.replace(",", "")) <= 4 << 20
    _, _, floats, one, four = (float(row[1]) for row in printed["Bytes on the wire"])
    assert floats == pytest.approx(64, rel=0.01)
    assert four == pytest.approx(one, rel=0.01)


def test_the_queries_a_second_are_printed_for_each_number_of_clients(printed: dict[str, list[list[str]]]) -> None:
    rows = printed["Queries of one row a second"]
    assert [row[0] for row in rows] == ["1", "8", "64"]
    assert all(float(row[3]) > 0 and agree(row[3], row[4], row[5]) for row in rows)


def test_the_pieces_of_a_streams_life_are_printed(printed: dict[str, list[list[str]]]) -> None:
    for title in ("A stream's life in process", "The same seen by a client"):
        assert [row[0] for row in printed[title]] == ["one row", "TPC-H q5"]
        assert all(float(milliseconds) > 0 for row in printed[title] for milliseconds in row[1:])


def test_the_peak_memory_of_both_servers_is_printed(printed: dict[str, list[list[str]]]) -> None:
    rows = printed["Peak resident memory"]
    assert [row[0] for row in rows] == ["worker", "pyarrow.flight"]
    for _, _, fresh, one, many, _ in rows:
        assert 0 < float(fresh) < float(one) < float(many)


@pytest.mark.usefixtures("printed")
def test_the_plot_is_drawn(plot: Path) -> None:
    drawn = plot.read_text()
    assert all(result in drawn for result in RESULTS)
    assert len(drawn) < 50_000
