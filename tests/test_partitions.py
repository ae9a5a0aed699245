"""Partitions: each gives its own rows, whoever reads it, when, after what, and how often."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

import grpc
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import SessionConfig, SessionContext
from pyarrow import flight
from support import do_get, fetch, fetch_one, in_threads, stage_key, status, status_of, stub

from worker import DefaultSessionBuilder, plan_proto
from worker.proto import Flight_pb2, plan_pb2
from worker.session import SessionBuilderLike
from worker.testing import RunningWorker, running_worker

FILES = 9
ROWS_PER_FILE = 50_000
PARTITIONS = 4

# What each shows of itself in its plan, so that a test is about what its name says, and its query. Every row differs.
QUERIES = {
    "scan": ("DataSourceExec", "SELECT id, k FROM big"),
    "broadcast join": ("CollectLeft, join_type=Inner", "SELECT id, v FROM big JOIN small USING (k)"),
    "repartition": ("RepartitionExec: partitioning=Hash", "SELECT id, sum(k) AS total FROM big GROUP BY id"),
    "union": ("UnionExec", "SELECT id, k FROM big UNION ALL SELECT -1 - id, k FROM big"),
    # A broadcast join gives the rows of its left side that it cares for in the partition that ends last.
    "left join": ("CollectLeft, join_type=Left,", "SELECT small.k, id FROM small LEFT JOIN big USING (k)"),
    "semi join": ("CollectLeft, join_type=LeftSemi", "SELECT * FROM small WHERE k IN (SELECT k FROM big)"),
    "anti join": ("CollectLeft, join_type=LeftAnti", "SELECT * FROM small WHERE k NOT IN (SELECT k FROM big)"),
    "scalar subquery": (
        "CollectLeft, join_type=Left,",
        "SELECT small.k, id FROM small "
        "LEFT JOIN (SELECT * FROM big WHERE id >= (SELECT min(k) FROM small)) b USING (k)",
    ),
    "nested loop join": (
        "NestedLoopJoinExec: join_type=Left",
        "SELECT small.k, id FROM small LEFT JOIN big ON big.id < small.k * 2 AND small.k < 95",
    ),
}

ORDERS: dict[str, Callable[[int], Sequence[int]]] = {
    "forwards": lambda count: range(count),
    "backwards": lambda count: range(count)[::-1],
    "inside out": lambda count: [*range(count // 2, count), *range(count // 2)],
}

KEYS: dict[str, Callable[[int], list[plan_pb2.StageKey | None]]] = {
    "one key": lambda count: [stage_key()] * count,
    "a key each": lambda count: [stage_key() for _ in range(count)],
    "no key": lambda count: [None] * count,
}

BUILDERS: dict[str, SessionBuilderLike] = {"default": DefaultSessionBuilder(), "bare": lambda ctx: SessionContext()}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> SessionContext:
    """A client's session with ``big``, in many files, and ``small``, half of whose keys ``big`` has."""
    folder = tmp_path_factory.mktemp("big")
    for file in range(FILES):
        ids = range(file * ROWS_PER_FILE, (file + 1) * ROWS_PER_FILE)
        pq.write_table(pa.table({"id": ids, "k": [number % 100 for number in ids]}), folder / f"{file}.parquet")
    session = SessionContext(SessionConfig().with_target_partitions(PARTITIONS))
    session.register_parquet("big", folder)
    session.from_arrow(pa.table({"k": range(90, 110), "v": range(20)}), "small")
    return session


@pytest.fixture(params=BUILDERS)
async def worker(request: pytest.FixtureRequest) -> AsyncIterator[RunningWorker]:
    async with running_worker(BUILDERS[request.param]) as worker:
        yield worker


class Query:
    """A plan of several partitions, and what it should give."""

    def __init__(self, session: SessionContext, name: str) -> None:
        mark, sql = QUERIES[name]
        frame = session.sql(sql)
        plan = frame.execution_plan()
        shown = plan.display_indent()
        assert mark in shown
        assert ("RepartitionExec" in shown) is (name == "repartition")
        assert plan.partition_count >= PARTITIONS
        self.count = plan.partition_count
        self.plan = plan.to_bytes()
        self.answer = in_order(frame.to_arrow_table())

    def ticket(self, number: int, key: plan_pb2.StageKey | None = None) -> bytes:
        return do_get(self.plan, number, key)

    async def partitions(self, worker: RunningWorker) -> list[pa.Table]:
        """The rows of every partition, which are together the answer."""
        key = stage_key()
        tables = await fetch(worker, [self.ticket(number, key) for number in range(self.count)])
        assert in_order(pa.concat_tables(tables)).equals(self.answer)
        return [in_order(table) for table in tables]


@pytest.fixture(params=QUERIES)
def query(request: pytest.FixtureRequest, tables: SessionContext) -> Query:
    return Query(tables, request.param)


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in table.column_names]).combine_chunks()


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("order", ORDERS)
async def test_partitions_read_one_after_the_other_have_their_own_rows_in_whatever_order(
    worker: RunningWorker, query: Query, order: str, keys: str
) -> None:
    expected = await query.partitions(worker)
    for number, key in zip(ORDERS[order](query.count), KEYS[keys](query.count), strict=True):
        table = await fetch_one(worker, query.ticket(number, key))
        assert in_order(table).equals(expected[number])


@pytest.mark.parametrize("keys", KEYS)
async def test_partitions_read_at_once_have_their_own_rows(worker: RunningWorker, query: Query, keys: str) -> None:
    expected = await query.partitions(worker)
    tickets = [query.ticket(number, key) for number, key in enumerate(KEYS[keys](query.count))]
    tables = await fetch(worker, tickets)
    assert [in_order(table) for table in tables] == expected


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("wanted", [[-1], [-2, 0]], ids=["last", "two of them"])
async def test_some_partitions_can_be_read_without_the_others(
    worker: RunningWorker, query: Query, wanted: list[int], keys: str
) -> None:
    expected = await query.partitions(worker)
    for number, key in zip([number % query.count for number in wanted], KEYS[keys](len(wanted)), strict=True):
        table = await fetch_one(worker, query.ticket(number, key))
        assert in_order(table).equals(expected[number])


async def test_a_partition_asked_for_again_gives_the_same_rows(worker: RunningWorker, query: Query) -> None:
    """
    1. The first partition is read twice while the others have not been asked for.
    2. The others are read, each twice, so that the last is asked for again when the task has ended.
    """
    expected = await query.partitions(worker)
    key = stage_key()
    for number in range(query.count):
        for _ in range(2):
            table = await fetch_one(worker, query.ticket(number, key))
            assert in_order(table).equals(expected[number])


async def test_a_partition_asked_for_twice_at_once_gives_both_its_rows(worker: RunningWorker, query: Query) -> None:
    expected = await query.partitions(worker)
    ticket = query.ticket(0, stage_key())
    tables = await fetch(worker, [ticket, ticket])
    assert [in_order(table) for table in tables] == [expected[0]] * 2


@pytest.mark.parametrize("name", ["scan", "broadcast join", "repartition", "union", "left join"])
async def test_a_partition_that_was_broken_off_gives_all_its_rows_when_it_is_asked_for_again(
    worker: RunningWorker, tables: SessionContext, name: str
) -> None:
    query = Query(tables, name)
    expected = await query.partitions(worker)
    number = max(range(query.count), key=lambda number: expected[number].num_rows)
    key = stage_key()

    def break_off() -> int:
        with flight.connect(worker.url) as client:
            reader = client.do_get(flight.Ticket(query.ticket(number, key)))
            rows: int = reader.read_chunk().data.num_rows
            reader.cancel()
            return rows

    (rows,) = await in_threads([break_off])
    assert 0 < rows < expected[number].num_rows
    again = await fetch_one(worker, query.ticket(number, key))
    assert in_order(again).equals(expected[number])
    others = [other for other in range(query.count) if other != number]
    tables_of_others = await fetch(worker, [query.ticket(other, key) for other in others])
    assert [in_order(table) for table in tables_of_others] == [expected[other] for other in others]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("beyond", [0, 2**32, 2**64 - 1 - PARTITIONS])
async def test_a_partition_that_the_plan_lacks_is_an_invalid_argument(
    tables: SessionContext, beyond: int, keys: str
) -> None:
    query = Query(tables, "scan")
    async with running_worker() as worker:
        (key,) = KEYS[keys](1)
        code, details = await status_of(worker, query.ticket(query.count + beyond, key))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert str(query.count + beyond) in details
        assert await status_of(worker, query.ticket(query.count - 1, key)) == (grpc.StatusCode.OK, "")


async def test_a_stage_key_that_stands_for_another_plan_is_a_failed_precondition(tables: SessionContext) -> None:
    """
    1. One plan is begun under a key.
    2. Another is refused under that key.
    3. The first goes on as if nothing had been.
    """
    first, other, key = Query(tables, "scan"), Query(tables, "union"), stage_key()
    async with running_worker() as worker:
        got = await fetch(worker, [first.ticket(0, key)])
        code, details = await status_of(worker, other.ticket(0, key))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "stage key" in details
        got += await fetch(worker, [first.ticket(number, key) for number in range(1, first.count)])
        assert worker.worker.statistics().plans_decoded == 1
    assert in_order(pa.concat_tables(got)).equals(first.answer)


async def test_the_same_stage_key_of_another_principal_is_another_task(tables: SessionContext) -> None:
    """
    1. Alice reads two partitions, which is one decoding of the plan.
    2. Bob reads another under the same key, which is one more.
    3. Carol's plan is another one, and her key stands for that.
    """
    query, other, key = Query(tables, "scan"), Query(tables, "union"), stage_key()
    async with running_worker() as worker:
        await fetch(worker, [query.ticket(number, key) for number in (0, 1)], [(b"authorization", b"alice")])
        assert worker.worker.statistics().plans_decoded == 1
        table = await fetch_one(worker, query.ticket(2, key), [(b"authorization", b"bob")])
        assert worker.worker.statistics().plans_decoded == 2
        assert table.num_rows > 0
        await fetch_one(worker, other.ticket(0, key), [(b"authorization", b"carol")])
        assert worker.worker.statistics().tasks == 3


@contextlib.contextmanager
def worker_process() -> Iterator[tuple[psutil.Process, str]]:
    """A worker that has its memory for itself, and its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "--no-supervisor", "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def test_a_ticket_without_key_does_not_make_the_worker_buffer_the_other_partitions() -> None:
    """At least half of the rows are for partitions that nobody reads; these would take twice the limit and more."""
    limit = 150 << 20
    rows = 80_000_000
    session = SessionContext(SessionConfig().with_target_partitions(PARTITIONS))
    sql = f"SELECT a.value FROM range(0, 64) b JOIN range(0, {rows}) a ON a.value % 64 = b.value"
    plan = session.sql(sql).execution_plan()
    assert "Hash([a.value % Int64(64)@1], 4)" in plan.display_indent()
    assert rows * 8 // 2 > 2 * limit
    with worker_process() as (process, url), flight.connect(url) as client:
        client.do_get(flight.Ticket(do_get(session.sql("SELECT 1").execution_plan().to_bytes()))).read_all()
        before = most = process.memory_info().rss
        read = 0
        for chunk in client.do_get(flight.Ticket(do_get(plan.to_bytes(), 1))):
            read += chunk.data.num_rows
            most = max(most, process.memory_info().rss)
    assert 0 < read < rows // 2
    assert most - before < limit


def test_a_ticket_without_key_does_not_make_the_worker_buffer_what_a_join_would_probe_with() -> None:
    """The other partitions wait for the side that the join builds from when they are dropped."""
    options = {
        "datafusion.optimizer.hash_join_single_partition_threshold": "0",
        "datafusion.optimizer.hash_join_single_partition_threshold_rows": "0",
    }
    session = SessionContext(SessionConfig(options).with_target_partitions(PARTITIONS))
    build = "SELECT value FROM range(0, 6000000) WHERE value % 3 <> 5"
    query = f"SELECT a.value FROM ({build}) b JOIN range(0, 150000000) a ON a.value = b.value * 7"
    plan = session.sql(query).execution_plan()
    assert "mode=Partitioned" in plan.display_indent()
    assert plan.partition_count == PARTITIONS
    with worker_process() as (process, url), flight.connect(url) as client:
        client.do_get(flight.Ticket(do_get(session.sql("SELECT 1").execution_plan().to_bytes()))).read_all()
        before = process.memory_info().rss
        most = 0
        for _ in client.do_get(flight.Ticket(do_get(plan.to_bytes()))):
            most = max(most, process.memory_info().rss)
        assert most - before < 300 << 20


def _mutated(sql: str, kind: str, change: Callable[[plan_proto.Message], object]) -> bytes:
    """The plan of a query in which the nodes of a kind are changed."""
    session = SessionContext(SessionConfig().with_target_partitions(PARTITIONS))
    session.from_pydict({"a": [1, 2, 3], "b": ["x", "y", "z"]}, name="t")
    message = plan_proto.parse(session.sql(sql).execution_plan().to_bytes())
    nodes = [node for node in plan_proto.nodes(message) if plan_proto.kind(node) == kind]
    for node in nodes:
        change(getattr(node, kind))
    assert nodes
    plan: bytes = message.SerializeToString()
    return plan


def _compare_a_column_that_is_not_there(node: plan_proto.Message) -> None:
    node.expr.like_expr.expr.column.index = 7


def _call_without_arguments(node: plan_proto.Message) -> None:
    for expression in node.expr:
        if expression.HasField("scalar_udf"):
            expression.scalar_udf.ClearField("args")


PANICS_IN_DECODING = {
    "groups of no columns": partial(
        _mutated, "SELECT a, count(*) FROM t GROUP BY a", "aggregate", lambda node: node.ClearField("group_expr")
    ),
    "column out of range": partial(
        _mutated, "SELECT a FROM t WHERE b LIKE 'x%'", "filter", _compare_a_column_that_is_not_there
    ),
}

PANICS_IN_EXECUTION = {
    "first zero rows": partial(
        _mutated, "SELECT a FROM t ORDER BY a LIMIT 2", "sort", lambda node: setattr(node, "fetch", 0)
    ),
    "no arguments": partial(_mutated, "SELECT substr(b, 1, 2) FROM t", "projection", _call_without_arguments),
    "below a repartition": partial(
        _mutated,
        "SELECT c, count(*) FROM (SELECT substr(b, 1, 2) AS c FROM t LIMIT 3) GROUP BY c",
        "projection",
        _call_without_arguments,
    ),
}


@pytest.mark.parametrize("keyed", [True, False], ids=["stage key", "no key"])
@pytest.mark.parametrize(
    "build",
    [*PANICS_IN_DECODING.values(), *PANICS_IN_EXECUTION.values()],
    ids=[*PANICS_IN_DECODING, *PANICS_IN_EXECUTION],
)
async def test_a_panic_is_an_internal_error_and_the_worker_goes_on(
    tables: SessionContext, build: Callable[[], bytes], keyed: bool
) -> None:
    query, key, plan = Query(tables, "repartition"), stage_key() if keyed else None, build()
    async with running_worker() as worker:
        for _ in range(2):
            code, details = await status_of(worker, do_get(plan, 0, key))
            assert code is grpc.StatusCode.INTERNAL
            assert "panic" in details.lower()
        await query.partitions(worker)


@pytest.mark.parametrize("build", PANICS_IN_DECODING.values(), ids=PANICS_IN_DECODING)
async def test_a_panic_in_a_description_is_an_internal_error(
    tables: SessionContext, build: Callable[[], bytes]
) -> None:
    query = Query(tables, "scan")
    descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(build()))
    async with running_worker() as worker, stub(worker.address) as flight_service:
        for rpc in (flight_service.GetFlightInfo, flight_service.GetSchema):
            code, details = await status(rpc(descriptor))
            assert code is grpc.StatusCode.INTERNAL
            assert "panicked" in details
        await query.partitions(worker)
