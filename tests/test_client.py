"""The asyncio client, and the one for the command line, against a real worker."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from datafusion import SessionConfig, SessionContext
from support import until

from worker import WorkerQueryContext
from worker.client import WorkerClient
from worker.testing import running_worker


@pytest.fixture
def sales(tmp_path: Path) -> Path:
    path = tmp_path / "sales.parquet"
    cities = pa.array(["Oslo", "Rome", "Oslo", None], pa.string_view())
    pa.parquet.write_table(pa.table({"city": cities, "amount": [1, 20, 3, 400]}), path)
    return path


def endless() -> bytes:
    session = SessionContext(SessionConfig().with_target_partitions(1))
    return session.sql("select value from range(0, 1000000000000)").execution_plan().to_bytes()


async def command(url: str, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker.client", "--url", url, *arguments, stdout=PIPE, stderr=PIPE
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize("as_bytes", [False, True])
async def test_all_partitions_of_a_plan_arrive_once_decoded_once(as_bytes: bool) -> None:
    session = SessionContext(SessionConfig().with_target_partitions(5))
    plan = session.sql("select value from range(0, 100000) where value % 2 = 0").execution_plan()
    assert plan.partition_count == 5

    async with running_worker() as running, WorkerClient(running.url) as client:
        batches = [batch async for batch in client.execute(plan.to_bytes() if as_bytes else plan)]

        assert sorted(pa.Table.from_batches(batches)["value"].to_pylist()) == list(range(0, 100000, 2))
        assert running.worker.statistics().plans_decoded == 1


async def test_dictionaries_that_change_from_batch_to_batch_arrive_as_they_are() -> None:
    batches = [
        pa.record_batch({"word": pa.array(words).dictionary_encode(), "count": pa.array([1, 2])})
        for words in (["a", "b"], ["c", "d"], ["c", "d"], ["d", "a"])
    ]
    plan = SessionContext().create_dataframe([batches]).execution_plan()

    async with running_worker() as running, WorkerClient(running.url) as client:
        received = [batch async for batch in client.execute(plan, 0)]

    assert pa.Table.from_batches(received).to_pylist() == pa.Table.from_batches(batches).to_pylist()
    assert {batch.schema for batch in received} == {batches[0].schema}


async def test_the_schema_of_a_plan_is_known_without_its_rows() -> None:
    plan = SessionContext().sql("select 1 as one, cast(null as varchar) as nothing limit 0").execution_plan()
    async with running_worker() as running, WorkerClient(running.url) as client:
        schema = await client.schema(plan)
        assert [batch async for batch in client.execute(plan)] == []
    assert schema.names == ["one", "nothing"]
    assert schema.types == [pa.int64(), pa.string_view()]


async def test_headers_of_the_client_and_of_the_call_both_arrive() -> None:
    seen: list[tuple[object, ...]] = []

    async def build_state(ctx: WorkerQueryContext) -> SessionContext:
        seen.append((ctx.headers.get("authorization"), ctx.headers.get("x-tenant"), ctx.headers.get("x-key-bin")))
        return ctx.builder.build()

    plan = SessionContext().sql("select 1").execution_plan()
    async with (
        running_worker(build_state) as running,
        WorkerClient(running.url, headers={"Authorization": "secret"}) as client,
    ):
        assert [batch async for batch in client.execute(plan, headers=[("x-tenant", "a"), ("x-key-bin", b"\0\xff")])]
    assert seen == [("secret", "a", b"\0\xff")]


async def test_a_timeout_ends_the_requests_and_the_workers_work() -> None:
    async with running_worker() as running, WorkerClient(running.url) as client:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            async for _ in client.execute(endless(), 0, timeout=0.3):
                pass
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: running.worker.statistics().requests == 0)


async def test_leaving_the_loop_early_cancels_the_requests() -> None:
    session = SessionContext(SessionConfig().with_target_partitions(4))
    plan = session.sql("select value from range(0, 1000000000000) where value % 2 = 0").execution_plan()
    async with running_worker() as running, WorkerClient(running.url) as client:
        async with aclosing(client.execute(plan)) as batches:
            await anext(batches)
            await until(lambda: running.worker.statistics().requests == 4)
        await until(lambda: running.worker.statistics().requests == 0)


async def test_an_error_in_one_partition_ends_the_others_and_reaches_the_caller() -> None:
    session = SessionContext(SessionConfig().with_target_partitions(2))
    plan = session.sql(
        "select value from range(0, 1000000000000) where value >= 0 "
        "union all select 1 / (value - 20000) from range(0, 100000)"
    ).execution_plan()
    async with running_worker() as running, WorkerClient(running.url) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="Divide by zero"):
            async for _ in client.execute(plan):
                pass
        await until(lambda: running.worker.statistics().requests == 0)


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="grpc://host:port"):
        WorkerClient("http://127.0.0.1:8000")


async def test_the_command_prints_the_rows(sales: Path) -> None:
    query = "SELECT city, sum(amount) AS total FROM sales GROUP BY city ORDER BY total DESC"
    async with running_worker() as running:
        code, output, errors = await command(running.url, "--table", f"sales={sales}", query)
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "+------+-------+",
        "| city | total |",
        "+------+-------+",
        "| NULL |   400 |",
        "| Rome |    20 |",
        "| Oslo |     4 |",
        "+------+-------+",
        "3 rows",
    ]


@pytest.fixture
def linked_sales(sales: Path) -> Path:
    link = sales.with_name("current.parquet")
    link.symlink_to(sales.rename(sales.with_name("version-1")))
    return link


async def test_a_table_may_be_a_link_and_is_read_under_its_own_name(linked_sales: Path) -> None:
    query = "SELECT count(city) AS n FROM sales"
    async with running_worker() as running:
        code, output, errors = await command(running.url, "--table", f"sales={linked_sales}", query)
    assert (code, errors) == (0, "")
    assert "| 3 |" in output


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("rows.parquet", pa.parquet.read_table),
        ("rows.csv", pa.csv.read_csv),
        ("rows.arrow", lambda path: pa.ipc.open_file(path).read_all()),
    ],
)
async def test_the_command_writes_the_rows_to_a_file(
    name: str, read: Callable[[Path], pa.Table], sales: Path, tmp_path: Path
) -> None:
    async with running_worker() as running:
        query = "SELECT amount, city FROM sales WHERE city IS NOT NULL ORDER BY amount"
        code, output, errors = await command(
            running.url, "--table", f"sales={sales}", "--output", str(tmp_path / name), query
        )
    assert (code, output, errors) == (0, "", "")
    assert read(tmp_path / name).to_pydict() == {"amount": [1, 3, 20], "city": ["Oslo", "Oslo", "Rome"]}


async def test_a_query_that_fails_leaves_no_file_and_says_why(tmp_path: Path) -> None:
    async with running_worker() as running:
        code, output, errors = await command(
            running.url, "--output", str(tmp_path / "rows.csv"), "SELECT 1 / (value - 20000) FROM range(0, 50000)"
        )
    assert (code, output) == (1, "")
    assert errors.startswith("python -m worker.client: INVALID_ARGUMENT: ")
    assert "Divide by zero" in errors
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["SELECT nothing FROM nowhere"], 1, "table 'datafusion.public.nowhere' not found"),
        (["--table", "a=/no/such/file.parquet", "SELECT 1"], 1, "No files found"),
        (["--table", "sales.parquet", "SELECT 1"], 2, "'sales.parquet' is not of the form name=path"),
        (["--table", "a=s3://sales/a.parquet", "SELECT 1"], 2, "'s3://sales/a.parquet' is not a file of this machine"),
        (["--target-partitions", "0", "SELECT 1"], 2, "'0' is not a number from 1"),
        (["CREATE TABLE t AS SELECT 1"], 1, "DDL not supported"),
        (["--table", "a=sales.xlsx", "SELECT 1"], 2, "'sales.xlsx' does not end in one of .parquet"),
        (["--output", "rows.xlsx", "SELECT 1"], 2, "'rows.xlsx' does not end in one of .parquet"),
        (["--header", "token", "SELECT 1"], 2, "'token' is not of the form name=value"),
        (["--header", "a token=x", "SELECT 1"], 2, "'a token' is not a header's name"),
        (["--url", "here", "SELECT 1"], 1, "'grpc://host:port' is right"),
        (["--url", "grpc://127.0.0.1:1", "SELECT 1"], 1, "UNAVAILABLE"),
    ],
)
async def test_what_is_wrong_with_a_command_is_said_in_one_line(arguments: list[str], code: int, message: str) -> None:
    returned, output, errors = await command("grpc://127.0.0.1:1", *arguments)
    assert (returned, output) == (code, "")
    assert message in errors
    assert "Traceback" not in errors
