"""Workers in a cluster of Distributed DataFusion, with its own coordinator, next to its own workers.

The queries are TPC-H's and those of ``data/cluster``: unions, windows, grouping sets, subqueries, joins of all kinds,
nested types, functions. A folder of them is one run of the coordinator, and one test.
"""

import asyncio
import re
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import pytest_asyncio
from cluster import QUERIES, Answer, ask, asking, cluster, difference, is_ordered, needs_ddf, python_worker, rust_worker
from conftest import DATA, generate_tpch
from datafusion import SessionContext, udf
from support import until
from test_tpch import WITHOUT_TOTAL_ORDER

from worker import PermissionDenied, WorkerQueryContext
from worker.config import Settings
from worker.testing import RunningWorker, running_worker

pytestmark = [needs_ddf, pytest.mark.asyncio(loop_scope="module")]

# So little data a task that plans are distributed at this scale; what an option set says again counts instead.
DISTRIBUTED = ("--bytes-per-partition", "10000", "--target-partitions", "4")

ONE_PARTITION = ("--target-partitions", "1")
OPTION_SETS = {
    " ".join(options): options
    for options in (
        ONE_PARTITION,
        ("--target-partitions", "3"),
        ("--target-partitions", "16"),
        ("--bytes-per-partition", "100000"),
        ("--no-broadcast",),
        ("--partial-reduce",),
        ("--dynamic",),
        ("--compression", "none"),
        ("--compression", "lz4"),
        ("--compression", "zstd"),
    )
}

FOLDERS = [pytest.param(DATA / "tpch", id="tpch"), pytest.param(QUERIES, id="further")]

# Where Distributed DataFusion 4.0.0 answers anything, or fails: its partial reduction forgets grouping sets.
WRONG = {"--partial-reduce": {"cube", "grouping_sets", "rollup"}}

FUNCTIONS = ("--scalar-udf", "twice:Int64:Int64", "--aggregate-udf", "mysum:Float64:Float64:Float64")

# Of 10^14 rows, so that whatever is to happen in the middle of it does.
ENDLESS = """
select count(*)
from lineitem a
join lineitem b on a.l_linenumber = b.l_linenumber
join lineitem c on b.l_linenumber = c.l_linenumber
where twice(a.l_orderkey) > 0
"""

TOKEN = "Bearer a-token-of-ada"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TPC-H's tables, smaller than those of other tests: what takes time is that there are many queries."""
    return generate_tpch(tmp_path_factory.mktemp("tables"), "0.03")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ours() -> AsyncIterator[list[str]]:
    """The URLs of two of our workers."""
    async with cluster(python_worker(), python_worker()) as members:
        yield [member.url for member in members]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theirs() -> AsyncIterator[list[str]]:
    """The URLs of two Rust workers."""
    async with cluster(rust_worker(), rust_worker()) as members:
        yield [member.url for member in members]


@pytest.fixture(scope="module", params=FOLDERS)
def queries(request: pytest.FixtureRequest) -> Path:
    """A folder of queries."""
    assert isinstance(request.param, Path)
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(queries: Path, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the coordinator answers without workers."""
    return await ask(tables, queries, tmp_path_factory.mktemp("expected"))


def assert_equal(answers: dict[str, Answer], expected: dict[str, Answer], queries: Path) -> None:
    """All answers are the expected ones: else, what is wrong with each."""
    unordered = {f"q{number}" for number in WITHOUT_TOTAL_ORDER}
    differences = {}
    for name, answer in answers.items():
        ordered = name not in unordered and is_ordered((queries / f"{name}.sql").read_text())
        differences[name] = difference(answer, expected[name], ordered=ordered)
    assert answers
    assert not {name: wrong for name, wrong in differences.items() if wrong is not None}


@pytest.mark.parametrize("options", OPTION_SETS)
async def test_answers_are_those_without_workers(
    options: str,
    queries: Path,
    expected: dict[str, Answer],
    ours: list[str],
    theirs: list[str],
    tables: Path,
    tmp_path: Path,
) -> None:
    chosen = (*DISTRIBUTED, *OPTION_SETS[options])
    if chosen[-2:] == ONE_PARTITION:  # where Distributed DataFusion 4.0.0 plans q11 and q15 wrong
        expected = await ask(tables, queries, tmp_path / "theirs", theirs, *chosen)
    answers = await ask(tables, queries, tmp_path / "ours", ours, *chosen)
    comparable = {name: answer for name, answer in answers.items() if name not in WRONG.get(options, ())}
    assert_equal(comparable, expected, queries)


async def test_answers_of_a_rust_and_a_python_worker_together(
    queries: Path,
    expected: dict[str, Answer],
    ours: list[str],
    theirs: list[str],
    tables: Path,
    tmp_path: Path,
) -> None:
    answers = await ask(tables, queries, tmp_path / "out", [ours[0], theirs[0]], *DISTRIBUTED)
    assert_equal(answers, expected, queries)


async def test_python_functions_run_on_every_worker(tables: Path, tmp_path: Path) -> None:
    folder = QUERIES / "udf"
    expected = await ask(tables, folder / "twins", tmp_path / "twins")
    builder = ("--session-builder", "examples.cluster_functions:build_state")
    async with cluster(python_worker(*builder), python_worker(*builder)) as members:
        urls = [member.url for member in members]
        answers = await ask(tables, folder, tmp_path / "out", urls, *DISTRIBUTED, *FUNCTIONS)
    assert_equal(answers, expected, folder)


@pytest.mark.parametrize("partitions", ["1", "4"])
async def test_analyze_shows_the_same_tree_with_the_same_figures(
    partitions: str, queries: Path, ours: list[str], theirs: list[str], tables: Path, tmp_path: Path
) -> None:
    options = (*DISTRIBUTED, "--target-partitions", partitions, "--analyze")
    sides = [await ask(tables, queries, tmp_path / urls[0][-5:], urls, *options) for urls in (ours, theirs)]
    found, wanted = ({name: analyzed(answer.printed) for name, answer in side.items()} for side in sides)
    for name in wanted:
        assert wanted[name]
        assert found[name] == wanted[name]


def analyzed(printed: str) -> list[str]:
    """Each line of a tree: what it says of the plan, the names of its figures, and ``output_rows``."""
    text = "\n".join(line.split("|", 2)[2].rstrip(" |") for line in printed.splitlines() if line.startswith("| "))
    # Below a limit, and beside a join that may stop reading, nodes have as many rows as who was faster lets them. So do
    # partial aggregations have, and what passes these on, where a task has many partitions.
    unsettled = re.search(r"fetch=|LimitExec|HashJoinExec: mode=Partitioned", text)
    settled = "mode=Final" if "mode=Partial" in text else ""
    lines = []
    for line in text.splitlines():
        what, _, figures = line.partition(", metrics=[")
        if "┌" in line:  # figures in no brackets, each for every task: ``plan_added_at={0:1ms, 1:2ms}``
            what = re.sub(r"\{.*?\}", "", line)
        what, _, _ = what.partition("DynamicFilter")  # what it has become depends on the time
        rows = re.findall(r"\boutput_rows=([^,\]]+)", figures) if settled in what and not unsettled else []
        # The one is there where a filter came in time to skip something, the other where nothing is known of an order.
        names = sorted({*re.findall(r"(\w+)=", figures)} - {"page_index_load_skipped", "skipped_aggregation_rows"})
        lines.append(f"{what} rows={rows} figures={names}")
    return lines


class Watched:
    """A session builder whose ``twice`` tells that it was called, which is in the middle of a query."""

    def __init__(self) -> None:
        self.called = False

    async def build_session_state(self, ctx: WorkerQueryContext) -> SessionContext:
        def twice(values: pa.Array) -> pa.Array:
            self.called = True
            return pc.multiply(values, 2)

        function = udf(twice, [pa.int64()], pa.int64(), "immutable", "twice")
        return ctx.builder.with_scalar_functions([function]).build()


async def until_called(query: Process, *watched: Watched) -> None:
    """Waits until a query has called the functions of all these."""

    def called() -> bool:
        assert query.returncode is None, "the query has ended"
        return all(builder.called for builder in watched)

    await until(called, seconds=20)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A query that does not end by itself."""
    file = tmp_path / "endless.sql"
    file.write_text(ENDLESS)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where workers put what they write."""
    folder = tmp_path / "spill"
    folder.mkdir()
    return folder


async def until_nothing_is_left(member: RunningWorker, folder: Path) -> None:
    """Waits until a worker holds nothing for requests: no file, no folder of a session either; at most 2 s."""

    def left() -> tuple[list[int], list[Path]]:
        held = member.worker.statistics()
        # The exchange's folder and its lock are the worker's, for as long as it lives.
        files = [file for file in folder.rglob("*") if not re.fullmatch("worker-exchange-.*|lock", file.name)]
        return [held.requests, held.streams, held.tasks], files

    try:
        await until(lambda: left() == ([0, 0, 0], []), seconds=2)
    except TimeoutError:
        pytest.fail(f"requests, streams, tasks and files are left: {left()}")


def http(member: RunningWorker) -> str:
    """Its URL, as coordinators take it."""
    return f"http://{member.address}"


async def test_a_worker_that_dies_ends_the_query_and_leaves_nothing_on_the_others(
    endless: Path, folder: Path, tables: Path
) -> None:
    watched = Watched()
    builder = ("--session-builder", "examples.cluster_functions:build_state")
    async with (
        running_worker(watched, settings=Settings(spill_folder=folder)) as survivor,
        python_worker(*builder) as victim,
    ):
        urls = [http(survivor), victim.url]
        async with asking(tables, endless, urls, *DISTRIBUTED, *FUNCTIONS) as query:
            await until_called(query, watched)
            assert survivor.worker.statistics().tasks > 0
            victim.process.kill()
            output, _ = await asyncio.wait_for(query.communicate(), 2)
            assert b"endless run=0 ERROR" in output
        await until_nothing_is_left(survivor, folder)


async def test_a_query_whose_coordinator_dies_leaves_nothing(endless: Path, folder: Path, tables: Path) -> None:
    first, second = Watched(), Watched()
    async with (
        running_worker(first, settings=Settings(spill_folder=folder)) as one,
        running_worker(second, settings=Settings(spill_folder=folder)) as other,
    ):
        async with asking(tables, endless, [http(one), http(other)], *DISTRIBUTED, *FUNCTIONS) as query:
            await until_called(query, first, second)
            assert one.worker.statistics().tasks > 0
            assert other.worker.statistics().tasks > 0
            query.kill()
        await until_nothing_is_left(one, folder)
        await until_nothing_is_left(other, folder)


async def test_headers_passed_through_reach_every_worker(tables: Path, tmp_path: Path) -> None:
    seen: dict[str, list[object]] = {"one": [], "other": []}

    def noting(name: str) -> Callable[[WorkerQueryContext], Awaitable[SessionContext]]:
        async def build_state(ctx: WorkerQueryContext) -> SessionContext:
            seen[name].append(ctx.headers.get("authorization"))
            return ctx.builder.build()

        return build_state

    query = DATA / "tpch" / "q3.sql"
    async with running_worker(noting("one")) as one, running_worker(noting("other")) as other:
        options = (*DISTRIBUTED, "--header", f"authorization={TOKEN}")
        answers = await ask(tables, query, tmp_path / "out", [http(one), http(other)], *options)
    assert answers["q3"].error is None
    assert {name: set(tokens) for name, tokens in seen.items()} == {"one": {TOKEN}, "other": {TOKEN}}


async def test_a_refusal_by_one_worker_ends_the_query_with_its_status(
    folder: Path, tables: Path, tmp_path: Path
) -> None:
    async def refuse(ctx: WorkerQueryContext) -> SessionContext:
        raise PermissionDenied(f"{ctx.headers.get('authorization')} may not")

    query = DATA / "tpch" / "q3.sql"
    async with (
        running_worker(settings=Settings(spill_folder=folder)) as one,
        running_worker(refuse, settings=Settings(spill_folder=folder)) as other,
    ):
        options = (*DISTRIBUTED, "--header", f"authorization={TOKEN}")
        answers = await ask(tables, query, tmp_path / "out", [http(one), http(other)], *options)
        assert answers["q3"].error is not None
        assert f"{TOKEN} may not" in answers["q3"].error
        assert "does not have permission" in answers["q3"].error
        await until_nothing_is_left(one, folder)
        await until_nothing_is_left(other, folder)
