"""What consoles are told: what runs, for whom, what it takes, and which workers there are."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import asking, needs_ddf
from datafusion import SessionConfig, SessionContext
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from support import status, until
from worker_service import NUMBERS, Metadata, coordinated, read, reads, task_key

import worker
from worker import plan_proto
from worker.cluster import members
from worker.cluster.process import CpuUsage
from worker.config import Settings
from worker.execution.watchdog import resident_bytes
from worker.proto import observability_pb2, observability_pb2_grpc, worker_pb2
from worker.testing import RunningWorker, running_worker

ADA, BOB = (("x-user", "ada"),), (("x-user", "bob"),)

Console = observability_pb2_grpc.ObservabilityServiceStub


async def by_user(ctx: worker.WorkerQueryContext) -> SessionContext:
    user = ctx.headers.get("x-user")
    if not isinstance(user, str):
        raise worker.Unauthenticated("say who you are")
    ctx.principal = user
    return ctx.builder.build()


@asynccontextmanager
async def console(running: RunningWorker) -> AsyncIterator[Console]:
    async with grpc.aio.insecure_channel(running.address) as channel:
        yield observability_pb2_grpc.ObservabilityServiceStub(channel)


async def progress(asked: Console, metadata: Metadata = ()) -> observability_pb2.GetTaskProgressResponse:
    return await asked.GetTaskProgress(observability_pb2.GetTaskProgressRequest(), metadata=metadata)


async def urls(asked: Console, metadata: Metadata = ()) -> list[str]:
    request = observability_pb2.GetClusterWorkersRequest()
    return list((await asked.GetClusterWorkers(request, metadata=metadata)).worker_urls)


@asynccontextmanager
async def task(running: RunningWorker, plan: bytes, metadata: Metadata = ()) -> AsyncIterator[worker_pb2.TaskKey]:
    """A task that has its plan, for as long as its coordinator lets it."""
    key = task_key(1, stage=3)
    async with coordinated(running, plan, key=key, task_count=2, metadata=metadata):
        yield key


def five_rows() -> bytes:
    """A plan of two partitions, of two rows and of three."""
    session = SessionContext(SessionConfig().with_target_partitions(2))
    batch = pa.record_batch({"number": [1, 2, 3]})
    session.register_record_batches("numbers", [[batch.slice(1)], [batch]])
    return session.sql("SELECT number + 1 FROM numbers").execution_plan().to_bytes()


def reading_from(*workers: str) -> bytes:
    """A plan that reads what tasks of these workers make."""
    leaf = reads("shuffle", NUMBERS, plan_proto.Partitioning(unknown=1), workers, uuid.uuid4().bytes)
    return bytes(leaf.SerializeToString())


async def test_tasks_are_shown_while_they_run_with_their_rows_so_far() -> None:
    async with running_worker() as running, console(running) as asked:
        assert (await asked.Ping(observability_pb2.PingRequest())).value == 1
        assert not (await progress(asked)).tasks
        async with task(running, five_rows()) as key:
            shown = observability_pb2.TaskProgress(
                task_key=observability_pb2.TaskKey(query_id=key.query_id, stage_id=3, task_number=1),
                status=observability_pb2.TASK_STATUS_RUNNING,
            )
            for partition, rows in ((None, 0), (0, 2), (1, 5)):
                if partition is not None:
                    await read(running, key, range(partition, partition + 1))
                shown.output_rows = rows
                assert list((await progress(asked)).tasks) == [shown]
        assert not (await progress(asked)).tasks


async def test_tasks_without_a_plan_or_with_one_that_fails_are_not_shown() -> None:
    async with running_worker() as running, console(running) as asked:
        with pytest.raises(grpc.aio.AioRpcError, match="not a datafusion"):
            async with task(running, b"no plan"):
                pass
        assert running.worker.statistics().tasks == 0
        assert not (await progress(asked)).tasks


async def test_tasks_and_workers_are_shown_to_their_own_principal_alone() -> None:
    async with running_worker(by_user) as running, console(running) as asked:
        own = f"http://{running.address}"
        async with task(running, five_rows(), ADA) as key:
            assert [shown.task_key.query_id for shown in (await progress(asked, ADA)).tasks] == [key.query_id]
            assert not (await progress(asked, BOB)).tasks
            assert (await progress(asked, BOB)).worker_metrics.rss_bytes
            assert (await urls(asked, ADA), await urls(asked, BOB)) == ([own], [])


async def test_a_principal_that_the_session_builder_names_reads_its_tasks_with_another_token() -> None:
    old, new = ((*ADA, ("authorization", token)) for token in ("old", "new"))
    async with running_worker(by_user) as running, task(running, five_rows(), old) as key:
        await read(running, key, range(1), metadata=new)


async def test_who_may_not_ask_learns_only_that_the_worker_is_there() -> None:
    async with running_worker(by_user) as running, console(running) as asked:
        refused = (grpc.StatusCode.UNAUTHENTICATED, "say who you are")
        assert await status(asked.GetTaskProgress(observability_pb2.GetTaskProgressRequest())) == refused
        assert await status(asked.GetClusterWorkers(observability_pb2.GetClusterWorkersRequest())) == refused
        assert (await asked.Ping(observability_pb2.PingRequest())).value == 1


async def test_the_service_is_in_reflection() -> None:
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        async for answer in call:
            names = {service.name for service in answer.list_services_response.service}
        assert "observability.ObservabilityService" in names


async def test_workers_are_those_that_plans_named_also_once_they_have_ended() -> None:
    async with running_worker() as running, console(running) as asked:
        assert await urls(asked) == []
        others = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
        async with task(running, reading_from(*others)):
            pass
        assert set(await urls(asked)) == {f"http://{running.address}", *others}


async def test_workers_that_are_set_are_the_ones() -> None:
    settings = Settings(cluster_workers=("http://b:8000", "https://a"))
    async with running_worker(settings=settings) as running, console(running) as asked, task(running, five_rows()):
        assert await urls(asked) == ["http://b:8000", "https://a"]


@pytest.mark.parametrize("url", ["b:8000", "grpc://b:8000", " http://b:8000", "http://", ""])
def test_what_is_no_url_of_a_worker_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_CLUSTER_WORKERS", f"http://a:8000,{url}")
    with pytest.raises(ValidationError, match="cluster_workers"):
        Settings()


def test_the_worker_that_was_not_named_for_the_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_MEMBERS", 2)
    known = members.Members()
    known.named("ada", ["http://a", "http://b", "http://a", ""])
    assert known.of("ada") == ["http://a", "http://b"]
    known.named("ada", ["http://c"])
    assert known.of("ada") == ["http://a", "http://c"]
    monkeypatch.setattr(members, "KEPT_SECONDS", 0.0)
    assert known.of("ada") == []


def test_memory_is_what_the_system_says() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_cpu_usage_is_the_share_of_all_processors_since_it_was_last_asked() -> None:
    usage = CpuUsage()
    usage.percent()
    for _ in range(2):
        start, used = time.monotonic(), time.process_time()
        while time.process_time() < used + 0.2:
            pass
        percent = usage.percent()
        share = (time.process_time() - used) / (time.monotonic() - start)
        assert percent == pytest.approx(100 * share / (os.cpu_count() or 1), rel=0.1)
        assert usage.percent() == percent


ENDLESS = "SELECT count(*) FROM numbers a JOIN numbers b ON a.key = b.key WHERE a.number + b.number < 0"


@needs_ddf
async def test_a_query_under_way_is_shown_on_all_its_workers_until_it_is_cancelled(tmp_path: Path) -> None:
    sql = tmp_path / "query.sql"
    sql.write_text(ENDLESS)
    (tmp_path / "numbers").mkdir()
    for part in range(8):
        table = pa.table({"key": pa.array([0] * 50_000), "number": range(50_000)})
        pq.write_table(table, tmp_path / "numbers" / f"{part}.parquet")
    async with running_worker() as one, running_worker() as two, console(one) as first, console(two) as second:
        addresses = [f"http://{running.address}/" for running in (one, two)]
        async with asking(tmp_path, sql, addresses, "--bytes-per-partition", "10000", "--no-broadcast"):
            shown: list[observability_pb2.TaskProgress] = []
            async with asyncio.timeout(60):
                while sum(task.output_rows for task in shown) < 800_000:
                    answers = [await progress(asked) for asked in (first, second)]
                    shown = [task for answer in answers for task in answer.tasks]
            assert all(answer.tasks and answer.worker_metrics.cpu_usage_percent > 0 for answer in answers)
            assert len({task.task_key.query_id for task in shown}) == 1
            assert await urls(first) == await urls(second) == sorted(addresses)
        await until(lambda: not one.worker.statistics().tasks + two.worker.statistics().tasks)
        assert not [task for asked in (first, second) for task in (await progress(asked)).tasks]
