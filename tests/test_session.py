"""Session builders of every kind, and the sessions that the worker's own builder makes."""

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import typing_examples
from datafusion import SessionContext, udaf, udf, udwf
from datafusion.object_store import LocalFileSystem
from support import RowNumber, Sum

from worker import (
    DefaultSessionBuilder,
    Headers,
    NotFound,
    ResourcesExhausted,
    SessionBuilder,
    SessionBuilderFailed,
    SessionStateBuilder,
    Unauthenticated,
    WorkerError,
    WorkerQueryContext,
)
from worker.plan import execution_errors
from worker.session import PARTITION_WISE_OPTIONS, SessionBuilderLike, apply_partition_wise_options

BATCH_SIZE = "datafusion.execution.batch_size"
INFORMATION_SCHEMA = "datafusion.catalog.information_schema"
INT = pa.int64()


def _context(builder: SessionStateBuilder | None = None) -> WorkerQueryContext:
    return WorkerQueryContext(builder or SessionStateBuilder(), Headers([("x-tenant", "acme")]))


def _option(session: SessionContext, name: str) -> str:
    session.sql(f"SET {INFORMATION_SCHEMA} = true")
    value: str = session.sql(f"SHOW {name}").to_pydict()["value"][0]
    return value


class Recorder:
    """Session builders that say in which thread, and in which event loop's task, they were called."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.header: str | None = None

    def record(self, ctx: WorkerQueryContext) -> SessionContext:
        self.thread = threading.get_ident()
        self.header = ctx.headers["x-tenant"]
        return ctx.builder.with_config_option(BATCH_SIZE, 77).build()

    async def record_asynchronously(self, ctx: WorkerQueryContext) -> SessionContext:
        await asyncio.sleep(0)
        return self.record(ctx)


def _object_with(method: Callable[[WorkerQueryContext], Any]) -> Any:
    class WithMethod:
        build_session_state = staticmethod(method)

    return WithMethod()


def _asynchronously_callable(recorder: Recorder) -> Any:
    class WithCall:
        async def __call__(self, ctx: WorkerQueryContext) -> SessionContext:
            return await recorder.record_asynchronously(ctx)

    return WithCall()


def _callable(recorder: Recorder) -> Any:
    class WithCall:
        def __call__(self, ctx: WorkerQueryContext) -> SessionContext:
            return recorder.record(ctx)

    return WithCall()


IN_LOOP: dict[str, Callable[[Recorder], SessionBuilderLike]] = {
    "async function": lambda recorder: recorder.record_asynchronously,
    "partial of an async function": lambda recorder: functools.partial(Recorder.record_asynchronously, recorder),
    "object with an async method": lambda recorder: _object_with(recorder.record_asynchronously),
    "object with an async call": _asynchronously_callable,
    "session builder": lambda recorder: SessionBuilder(recorder.record_asynchronously),
}
IN_THREAD: dict[str, Callable[[Recorder], SessionBuilderLike]] = {
    "function": lambda recorder: recorder.record,
    "lambda": lambda recorder: lambda ctx: recorder.record(ctx),
    "partial": lambda recorder: functools.partial(Recorder.record, recorder),
    "object with a method": lambda recorder: _object_with(recorder.record),
    "object with a call": _callable,
    "session builder of a function": lambda recorder: SessionBuilder(recorder.record),
}


@pytest.mark.parametrize("kind", [*IN_LOOP, *IN_THREAD])
async def test_a_builder_makes_the_session_asynchronously_or_in_a_thread(kind: str) -> None:
    recorder = Recorder()
    make = IN_LOOP.get(kind) or IN_THREAD[kind]
    session = await SessionBuilder(make(recorder)).build_session_state(_context())
    assert _option(session, BATCH_SIZE) == "77"
    assert recorder.header == "acme"
    assert (recorder.thread == threading.get_ident()) == (kind in IN_LOOP)


async def test_a_function_that_returns_an_awaitable_is_awaited() -> None:
    recorder = Recorder()
    builder = SessionBuilder(lambda ctx: recorder.record_asynchronously(ctx))
    assert _option(await builder.build_session_state(_context()), BATCH_SIZE) == "77"
    assert recorder.thread == threading.get_ident()


async def test_a_builder_that_blocks_does_not_block_the_loop() -> None:
    """The builder goes on only once the loop has run."""
    loop_runs = threading.Event()

    def build(ctx: WorkerQueryContext) -> SessionContext:
        assert loop_runs.wait(timeout=60)
        return ctx.builder.build()

    building = asyncio.ensure_future(SessionBuilder(build).build_session_state(_context()))
    await asyncio.sleep(0)
    loop_runs.set()
    assert isinstance(await building, SessionContext)


async def test_a_builder_in_a_thread_sees_the_context_of_its_request() -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    tenant.set("acme")
    seen: list[str] = []

    def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append(tenant.get())
        return ctx.builder.build()

    await SessionBuilder(build).build_session_state(_context())
    assert seen == ["acme"]


@pytest.mark.parametrize("builder", typing_examples.BUILDERS)
async def test_what_type_checkers_accept_builds_sessions(builder: SessionBuilderLike) -> None:
    assert isinstance(await SessionBuilder(builder).build_session_state(_context()), SessionContext)


async def test_what_type_checkers_accept_makes_workers() -> None:
    for worker in typing_examples.workers():
        async with worker:
            assert worker.statistics().requests == 0


@pytest.mark.parametrize("builder", [None, 1, "module:attr", object(), typing_examples.WithMethod, SessionContext])
def test_what_is_no_builder_is_refused(builder: Any) -> None:
    with pytest.raises(TypeError, match="is no session builder"):
        SessionBuilder(builder)


@pytest.mark.parametrize("wrap", [lambda raising: raising, lambda raising: _asynchronous(raising)])
@pytest.mark.parametrize("error", [Unauthenticated("who are you?"), NotFound("no such tenant"), WorkerError("own")])
async def test_an_error_of_the_worker_passes(error: WorkerError, wrap: Any) -> None:
    with pytest.raises(type(error)) as caught:
        await SessionBuilder(wrap(_raising(error))).build_session_state(_context())
    assert caught.value is error


@pytest.mark.parametrize("wrap", [lambda raising: raising, lambda raising: _asynchronous(raising)])
@pytest.mark.parametrize("error", [ValueError("password: 1234"), KeyError("password"), OSError()])
async def test_any_other_error_is_the_builders_failure_and_tells_nothing(error: Exception, wrap: Any) -> None:
    with pytest.raises(SessionBuilderFailed, match="the session builder failed") as caught:
        await SessionBuilder(wrap(_raising(error))).build_session_state(_context())
    assert caught.value.__cause__ is error
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("answer", [None, "session", SessionContext, 0])
async def test_what_returns_no_session_has_failed(answer: Any) -> None:
    with pytest.raises(SessionBuilderFailed) as caught:
        await SessionBuilder(lambda ctx: answer).build_session_state(_context())
    assert isinstance(caught.value.__cause__, TypeError)
    assert f"returned {type(answer).__name__}" in str(caught.value.__cause__)


async def test_a_function_that_stops_an_iteration_has_failed() -> None:
    """An error that asyncio's futures refuse to hold."""

    def build(ctx: WorkerQueryContext) -> SessionContext:
        nothing: list[SessionContext] = []
        return next(iter(nothing))

    async with asyncio.timeout(10):
        with pytest.raises(SessionBuilderFailed):
            await SessionBuilder(build).build_session_state(_context())


async def test_a_builder_that_is_cancelled_is_cancelled() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    building = asyncio.ensure_future(SessionBuilder(build).build_session_state(_context()))
    await started.wait()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert cancelled.is_set()


def _raising(error: Exception) -> Callable[[WorkerQueryContext], SessionContext]:
    def build(ctx: WorkerQueryContext) -> SessionContext:
        raise error

    return build


def _asynchronous(build: Callable[[WorkerQueryContext], SessionContext]) -> SessionBuilderLike:
    async def build_asynchronously(ctx: WorkerQueryContext) -> SessionContext:
        return build(ctx)

    return build_asynchronously


def _set_batch_size(session: SessionContext) -> SessionContext:
    session.sql(f"SET {BATCH_SIZE} = 99")
    return session


async def _set_batch_size_asynchronously(session: SessionContext) -> SessionContext:
    await asyncio.sleep(0)
    return _set_batch_size(session)


@pytest.mark.parametrize("change", [_set_batch_size, _set_batch_size_asynchronously])
async def test_map_changes_the_session_of_another_builder(change: Any) -> None:
    first = DefaultSessionBuilder()
    second = first.map(change)
    assert _option(await second.build_session_state(_context()), BATCH_SIZE) == "99"
    assert _option(await first.build_session_state(_context()), BATCH_SIZE) == "8192"


async def test_a_map_that_returns_nothing_has_failed_and_its_errors_pass_as_a_builders() -> None:
    forgets: Any = lambda session: None  # noqa: E731
    with pytest.raises(SessionBuilderFailed):
        await DefaultSessionBuilder().map(forgets).build_session_state(_context())

    def refuse(session: SessionContext) -> SessionContext:
        raise NotFound("no such table")

    with pytest.raises(NotFound, match="no such table"):
        await DefaultSessionBuilder().map(refuse).build_session_state(_context())


async def test_the_default_builder_builds_what_the_context_holds() -> None:
    context = _context(SessionStateBuilder().with_config_option(BATCH_SIZE, 5))
    assert _option(await DefaultSessionBuilder().build_session_state(context), BATCH_SIZE) == "5"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        (BATCH_SIZE, 17, "17"),
        (BATCH_SIZE, "17", "17"),
        ("datafusion.execution.parquet.pushdown_filters", True, "true"),
        ("datafusion.execution.parquet.enable_page_index", False, "false"),
        ("datafusion.optimizer.default_filter_selectivity", 33, "33"),
        ("datafusion.execution.time_zone", "+02:00", "+02:00"),
    ],
)
def test_an_option_is_set(name: str, value: str | int | bool, shown: str) -> None:
    assert _option(SessionStateBuilder().with_config_option(name, value).build(), name) == shown
    assert _option(SessionStateBuilder().with_config_options({name: value}).build(), name) == shown


@pytest.mark.parametrize(
    ("name", "value"),
    [("datafusion.execution.no_such", "1"), ("no_such.option", "1"), ("no_such", 1), (BATCH_SIZE, "no_such")],
)
def test_an_option_that_datafusion_does_not_take_is_refused(name: str, value: str | int) -> None:
    builder = SessionStateBuilder().with_config_option(name, value)
    with pytest.raises(ValueError, match="no_such"):
        builder.build()


def test_every_with_changes_the_builder_and_returns_it() -> None:
    builder = SessionStateBuilder()
    assert builder.with_config_option(BATCH_SIZE, 1) is builder
    assert builder.with_config_options({}) is builder
    assert builder.with_memory_limit(None) is builder
    assert builder.with_spill_folder(None) is builder
    assert builder.with_scalar_functions([]) is builder
    assert builder.with_aggregate_functions([]) is builder
    assert builder.with_window_functions([]) is builder
    assert builder.with_object_store("s3://bucket", LocalFileSystem()) is builder
    assert builder.with_python_udf_inlining() is builder
    assert builder.python_udf_inlining
    assert not builder.with_python_udf_inlining(False).python_udf_inlining


def test_functions_of_each_kind_are_found_by_name() -> None:
    session = (
        SessionStateBuilder()
        .with_scalar_functions([udf(lambda values: pc.add(values, 1), [INT], INT, "immutable", "my_scalar")])
        .with_aggregate_functions([udaf(Sum, [INT], INT, [INT], "immutable", "my_aggregate")])
        .with_window_functions([udwf(RowNumber, [INT], INT, "immutable", "my_window")])
        .build()
    )
    rows = "(VALUES (10), (20)) AS v (n)"
    assert session.sql(f"SELECT my_scalar(n) AS r FROM {rows} ORDER BY r").to_pydict() == {"r": [11, 21]}
    assert session.sql(f"SELECT my_aggregate(n) AS r FROM {rows}").to_pydict() == {"r": [30]}
    windows = session.sql(f"SELECT my_window(n) OVER (ORDER BY n) AS r FROM {rows} ORDER BY r")
    assert windows.to_pydict() == {"r": [1, 2]}


@pytest.mark.parametrize("url", ["store://bucket", "store://bucket/folder", "store://"])
def test_an_object_store_is_found_by_scheme_and_host_in_its_own_session_alone(url: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    host = "" if url == "store://" else "bucket"
    with_store = SessionStateBuilder().with_object_store(url, LocalFileSystem(str(tmp_path)))
    assert with_store.build().read_parquet(f"store://{host}/a.parquet").to_pydict() == {"x": [1]}
    with pytest.raises(Exception, match="No suitable object store"):
        SessionStateBuilder().build().read_parquet(f"store://{host}/a.parquet")


def test_two_sessions_have_different_stores_under_one_url(tmp_path: Path) -> None:
    for tenant in (1, 2):
        (tmp_path / str(tenant)).mkdir()
        pq.write_table(pa.table({"tenant": [tenant]}), tmp_path / str(tenant) / "a.parquet")
    sessions = [
        SessionStateBuilder().with_object_store("store://bucket", LocalFileSystem(str(tmp_path / tenant))).build()
        for tenant in ("1", "2")
    ]
    read = [session.read_parquet("store://bucket/a.parquet").to_pydict() for session in sessions]
    assert read == [{"tenant": [1]}, {"tenant": [2]}]


@pytest.mark.parametrize("url", ["bucket", "/folder", "", "s3", "://bucket"])
def test_the_url_of_an_object_store_without_scheme_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="has no scheme"):
        SessionStateBuilder().with_object_store(url, LocalFileSystem())


MEBIBYTE = 1 << 20
BIG_SORT = "SELECT sha256(CAST(value AS VARCHAR)) AS h FROM generate_series(1, 400000) ORDER BY h"


def _spilled_while_sorting(builder: SessionStateBuilder, folder: Path) -> int:
    """Bytes in the folder while a big sort merges what it has sorted."""
    session = builder.with_config_option("datafusion.execution.target_partitions", 1).build()
    with execution_errors():
        stream = session.execute(session.sql(BIG_SORT).execution_plan(), 0)
        first = next(stream).to_pyarrow().num_rows
        spilled = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert first + sum(batch.to_pyarrow().num_rows for batch in stream) == 400_000
    return spilled


def test_a_sort_beyond_the_memory_limit_spills_to_the_folder(tmp_path: Path) -> None:
    assert _spilled_while_sorting(SessionStateBuilder(12 * MEBIBYTE, tmp_path), tmp_path) > MEBIBYTE
    with_methods = SessionStateBuilder().with_memory_limit(12 * MEBIBYTE).with_spill_folder(str(tmp_path))
    assert _spilled_while_sorting(with_methods, tmp_path) > MEBIBYTE


def test_without_a_memory_limit_nothing_spills(tmp_path: Path) -> None:
    assert _spilled_while_sorting(SessionStateBuilder(None, tmp_path), tmp_path) == 0
    assert _spilled_while_sorting(SessionStateBuilder(12 * MEBIBYTE, tmp_path).with_memory_limit(None), tmp_path) == 0


def test_a_spill_folder_is_left_empty(tmp_path: Path) -> None:
    assert _spilled_while_sorting(SessionStateBuilder(12 * MEBIBYTE, tmp_path), tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


JOIN = (
    "SELECT count(*) FROM (SELECT sha256(CAST(value AS VARCHAR)) AS h FROM generate_series(1, 100000)) AS a "
    "JOIN (SELECT sha256(CAST(value AS VARCHAR)) AS h FROM generate_series(1, 100000)) AS b USING (h)"
)


@pytest.mark.parametrize("query", [BIG_SORT, JOIN], ids=["sort", "join"])
def test_work_that_cannot_spill_within_the_limit_fails_as_exhausted(query: str, tmp_path: Path) -> None:
    builder = SessionStateBuilder(MEBIBYTE, tmp_path).with_config_option("datafusion.execution.target_partitions", 1)
    session = builder.build()
    plan = session.sql(query).execution_plan()
    with pytest.raises(ResourcesExhausted), execution_errors():
        list(session.execute(plan, 0))


@pytest.mark.parametrize("name", PARTITION_WISE_OPTIONS)
def test_what_partition_wise_execution_needs_is_set(name: str) -> None:
    """By the builder, and on a session that anybody made, in which it was otherwise."""
    bare = SessionContext()
    assert _option(bare, name) != PARTITION_WISE_OPTIONS[name]
    apply_partition_wise_options(bare)
    assert _option(bare, name) == PARTITION_WISE_OPTIONS[name]
    assert _option(SessionStateBuilder().build(), name) == PARTITION_WISE_OPTIONS[name]


def _overridden(builder: SessionStateBuilder) -> SessionContext:
    """In which what partition-wise execution needs is otherwise, because the builder was told so."""
    session = builder.with_config_options(dict.fromkeys(PARTITION_WISE_OPTIONS, True)).build()
    # What it is told after that changes nothing of the session.
    builder.with_config_options(PARTITION_WISE_OPTIONS)
    return session


@pytest.mark.parametrize("name", PARTITION_WISE_OPTIONS)
@pytest.mark.parametrize("make", [_overridden, lambda builder: SessionContext()], ids=["overridden", "bare"])
async def test_what_partition_wise_execution_needs_is_set_on_every_session_that_lacks_it(
    make: Callable[[SessionStateBuilder], SessionContext], name: str
) -> None:
    async def build(ctx: WorkerQueryContext) -> SessionContext:
        return make(ctx.builder)

    assert _option(make(SessionStateBuilder()), name) != PARTITION_WISE_OPTIONS[name]
    assert _option(await SessionBuilder(build).build_session_state(_context()), name) == PARTITION_WISE_OPTIONS[name]


def test_a_session_is_taken_as_the_builder_made_it_until_that_is_told_to_refuse_pickles() -> None:
    builder = SessionStateBuilder().with_python_udf_inlining()
    session = builder.build()
    assert builder.finish(session) is session
    assert builder.with_python_udf_inlining(False).finish(session) is not session
    assert SessionStateBuilder().finish(session) is not session


def test_a_context_shows_neither_principal_nor_header_values() -> None:
    context = WorkerQueryContext(SessionStateBuilder(), Headers([("authorization", "secret")]), principal="alice")
    assert "secret" not in repr(context)
    assert "alice" not in repr(context)
