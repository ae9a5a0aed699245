"""What plans may touch: ways around the folders, the sinks, the stores and the workers that settings allow."""

import asyncio
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import SessionContext, udf
from datafusion.object_store import LocalFileSystem
from flight_plans import coalesced, stage, ticket
from google.protobuf.descriptor import Descriptor
from support import Touch, do_get, fetch_one, listening, stage_key, status, status_of, stub
from worker_service import coordinated, hashed, plan_of, refusal, refused_read, repartition

import worker
from worker import plan_proto
from worker.client import WorkerClient
from worker.plan_proto import Message
from worker.policy import DefaultPolicy, PlanAccess, Touched, access_of, check_of
from worker.proto import Flight_pb2
from worker.testing import RunningWorker, running_worker

DENIED = grpc.StatusCode.PERMISSION_DENIED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
OK = grpc.StatusCode.OK

NUMBERS = pa.schema({"a": pa.int64()})


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """A folder with a file in it that plans may read, beside one that they may not."""
    for folder, number in (("allowed", 1), ("secret", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "numbers.csv").write_text(f"a\n{number}\n")
    return tmp_path / "allowed"


def scan(path: Path | str, store: str = "file:///") -> Message:
    """A plan that reads a file of one column, which need not be there."""
    node = plan_proto.PhysicalPlanNode()
    conf = node.csv_scan.base_conf
    conf.schema.columns.add(name="a", nullable=True).arrow_type.INT64.SetInParent()
    projected = conf.projection_exprs.projections.add(alias="a")
    projected.expr.column.name = "a"
    conf.statistics.column_stats.add()
    conf.constraints.SetInParent()
    conf.object_store_url = store
    conf.file_groups.add().files.add(path=str(path), size=4)
    node.csv_scan.has_header = True
    node.csv_scan.delimiter, node.csv_scan.quote = ",", '"'
    return node


def running(*folders: Path, host: str = "0.0.0.0", **settings: Any) -> AbstractAsyncContextManager[RunningWorker]:
    """A worker with the policy of one that listens for other machines."""
    policy = DefaultPolicy(worker.Settings(host=host, allow_path=folders, **settings))
    return running_worker(plan_policy=policy)


async def answer(at: RunningWorker, message: Message) -> tuple[grpc.StatusCode, str]:
    return await status_of(at, do_get(message.SerializeToString()))


def denied(node: str, path: Path | str) -> tuple[grpc.StatusCode, str]:
    name = f"file:///{str(path).strip('/')}"
    text = f"the plan's {node} names {name!r}: this worker touches only files in folders that --allow-path names"
    return DENIED, text


async def test_files_in_the_folder_are_read_and_no_others(allowed: Path) -> None:
    async with running(allowed) as at:
        assert (await fetch_one(at, do_get(scan(allowed / "numbers.csv").SerializeToString())))["a"].to_pylist() == [1]
        secret = allowed.parent / "secret" / "numbers.csv"
        assert await answer(at, scan(secret)) == denied("csv_scan", secret)
        # Nor does anybody learn which there are.
        missing = allowed.parent / "secret" / "missing.csv"
        assert await answer(at, scan(missing)) == denied("csv_scan", missing)
        beside = f"{allowed}-not/numbers.csv"
        assert await answer(at, scan(beside)) == denied("csv_scan", beside)
        code, text = await answer(at, scan(allowed / "missing.csv"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "not found" in text


async def test_without_a_folder_any_file_is_read_on_this_machine_and_none_on_others(allowed: Path) -> None:
    secret = scan(allowed.parent / "secret" / "numbers.csv")
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        async with running(host=host) as at:
            assert await answer(at, secret) == (OK, "")
    for host in ("0.0.0.0", "::", "worker-1", "10.0.0.1"):
        async with running(host=host) as at:
            code, text = await answer(at, secret)
            assert code is DENIED
            assert text.endswith(
                "this worker listens for other machines, where it touches only files in folders that --allow-path names"
            )


def _file_link(folder: Path) -> Path:
    (folder / "link.csv").symlink_to(folder.parent / "secret" / "numbers.csv")
    return folder / "link.csv"


def _folder_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder.parent / "secret", target_is_directory=True)
    return folder / "link" / "numbers.csv"


def _chain_of_links(folder: Path) -> Path:
    (folder / "first").symlink_to(folder / "second")
    (folder / "second").symlink_to("../secret")
    return folder / "first" / "numbers.csv"


def _dangling_link(folder: Path) -> Path:
    (folder / "dangling.csv").symlink_to(folder.parent / "secret" / "missing.csv")
    return folder / "dangling.csv"


def _kernel(folder: Path) -> Path:
    return Path(f"/proc/self/root{folder.parent}/secret/numbers.csv")


@pytest.mark.parametrize("make", [_file_link, _folder_link, _chain_of_links, _dangling_link, _kernel])
async def test_links_out_of_the_folder_are_seen_through(allowed: Path, make: Callable[[Path], Path]) -> None:
    path = make(allowed)
    async with running(allowed) as at:
        assert await answer(at, scan(path)) == denied("csv_scan", path)


async def test_links_inside_of_the_folder_are_followed_as_is_a_link_that_is_the_folder(allowed: Path) -> None:
    link = allowed.parent / "link"
    link.symlink_to(allowed, target_is_directory=True)
    (allowed / "link.csv").symlink_to("numbers.csv")
    async with running(link) as at:
        for path in (link / "link.csv", allowed / "link.csv", link / "numbers.csv"):
            assert await answer(at, scan(path)) == (OK, "")


async def test_dots_do_not_lead_out_of_the_folder(allowed: Path) -> None:
    async with running(allowed) as at:
        path = f"{allowed}/../secret/numbers.csv"
        assert await answer(at, scan(path)) == denied("csv_scan", path)
        code, _ = await answer(at, scan(f"{allowed}/./numbers.csv"))
        assert code is INVALID


@pytest.mark.parametrize("dots", ["%2e%2e", "..%2F", "%2E%2E%2Fsecret%2F..", ".%2e"])
async def test_what_is_percent_encoded_in_a_path_is_a_name(allowed: Path, dots: str) -> None:
    """DataFusion does not decode it either: a folder of that very name is what is read."""
    folder = allowed / dots
    folder.mkdir()
    (folder / "numbers.csv").write_text("a\n3\n")
    async with running(allowed) as at:
        table = await fetch_one(at, do_get(scan(folder / "numbers.csv").SerializeToString()))
        assert table["a"].to_pylist() == [3]
        outside = allowed.parent / dots / "numbers.csv"
        assert await answer(at, scan(outside)) == denied("csv_scan", outside)


@pytest.mark.parametrize("store", ["", "file://", "file:///", "FILE:///", "fIlE://", "file://localhost/"])
async def test_every_way_to_write_the_local_file_system_is_known(allowed: Path, store: str) -> None:
    secret = allowed.parent / "secret" / "numbers.csv"
    async with running(allowed) as at:
        assert await answer(at, scan(allowed / "numbers.csv", store)) == (OK, "")
        assert await answer(at, scan(secret, store)) == denied("csv_scan", secret)
        assert await answer(at, scan(f"//{secret}", store)) == denied("csv_scan", secret)


@pytest.mark.parametrize(
    "store",
    [
        " file:///",
        "fi\tle:///",
        "file:\\\\\\",
        "file:",
        "file:/",
        "file:///tmp/",
        "file:////",
        "file:///?x",
        "file:///#",
    ],
)
async def test_what_is_no_url_of_a_store_to_everybody_is_refused(allowed: Path, store: str) -> None:
    async with running(allowed) as at:
        assert await answer(at, scan(allowed / "numbers.csv", store)) == (
            INVALID,
            f"the plan's csv_scan has the object store {store!r}: a URL such as 's3://bucket/' is right",
        )


async def test_a_file_of_another_host_is_one_of_none(allowed: Path) -> None:
    async with running(allowed) as at:
        code, text = await answer(at, scan(allowed / "numbers.csv", "file://host/"))
        assert code is not OK
        assert "object store found for file://host/" in text
        secret = allowed.parent / "secret" / "numbers.csv"
        assert await answer(at, scan(secret, "file://host/")) == denied("csv_scan", secret)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
    return folder / "s"


def _folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


@pytest.mark.parametrize("make", [_fifo, _socket, _folder])
@pytest.mark.parametrize("is_limited", [True, False])
async def test_only_regular_files_are_opened(allowed: Path, make: Callable[[Path], Path], is_limited: bool) -> None:
    path = make(allowed)
    async with running(*[allowed] * is_limited, host="127.0.0.1") as at, asyncio.timeout(10):
        assert await answer(at, scan(path)) == (
            DENIED,
            f"the plan's csv_scan names 'file://{path}', which is no regular file",
        )


@pytest.mark.parametrize("path", ["/proc/self/environ", "/proc/self/fd/0", "/sys/kernel/mm", "/dev/zero", "/proc"])
async def test_files_of_the_kernel_are_not_read_on_this_machine_either(path: str) -> None:
    async with running(host="127.0.0.1") as at, asyncio.timeout(10):
        code, text = await answer(at, scan(path))
        assert (code, text) == (DENIED, f"the plan's csv_scan names 'file://{path}', which is no regular file")


def _nested(inner: Message) -> Iterator[Message]:
    """Plans with another somewhere inside."""
    for kind in ("union", "interleave"):
        node = plan_proto.PhysicalPlanNode()
        getattr(node, kind).inputs.add().CopyFrom(scan("numbers.csv", "s3://bucket/"))
        getattr(node, kind).inputs.add().CopyFrom(inner)
        yield node
    node = plan_proto.PhysicalPlanNode()
    node.hash_join.left.CopyFrom(scan("numbers.csv", "s3://bucket/"))
    node.hash_join.right.filter.input.sort.input.CopyFrom(inner)
    yield node
    node = plan_proto.PhysicalPlanNode()
    node.scalar_subquery.input.placeholder_row.SetInParent()
    node.scalar_subquery.subqueries.add().CopyFrom(inner)
    yield node
    node = plan_proto.PhysicalPlanNode()
    node.extension.node = b"of a codec"
    node.extension.inputs.add().analyze.input.CopyFrom(inner)
    yield node
    node = plan_proto.PhysicalPlanNode()
    node.csv_sink.input.async_func.input.CopyFrom(inner)
    yield node


def test_scans_are_found_wherever_they_are() -> None:
    secret = scan("secret.csv")
    for node in _nested(secret):
        assert (
            Touched("csv_scan", "file://", "secret.csv")
            in access_of(node.SerializeToString(), with_functions=False).reads
        )


def test_all_kinds_of_scans_and_sinks_are_known() -> None:
    """And every text of a plan that could name a file: another in a new version is to be looked at."""
    descriptor: Descriptor = plan_proto.PhysicalPlanNode().DESCRIPTOR
    of_file = {field.name: field.message_type.fields_by_name for field in descriptor.fields if field.message_type}
    assert {name for name, fields in of_file.items() if "base_conf" in fields} == plan_proto.FILE_SCANS
    assert {name for name, fields in of_file.items() if "sink" in fields} == plan_proto.SINKS

    types: dict[str, Descriptor] = {}
    unvisited = [descriptor]
    while unvisited:
        visited = unvisited.pop()
        # Of logical plans, inside of the options of a sort-merge join, DataFusion reads no more than two flags.
        if visited.full_name not in types and visited.name != "LogicalPlanNode":
            types[visited.full_name] = visited
            unvisited += [field.message_type for field in visited.fields if field.message_type]
    suspicious = {
        f"{name.partition('.')[2]}.{field.name}"
        for name, visited in types.items()
        for field in visited.fields
        if field.type == field.TYPE_STRING
        and any(part in field.name for part in ("path", "url", "file", "locat", "dir"))
    }
    assert suspicious == {
        "FileScanExecConf.object_store_url",
        "FileSinkConfig.file_extension",
        "FileSinkConfig.object_store_url",
        "FileSinkConfig.table_paths",
        "PartitionedFile.path",
    }


@pytest.mark.parametrize("kind", sorted(plan_proto.FILE_SCANS))
def test_every_kind_of_scan_says_what_it_reads(kind: str) -> None:
    node = plan_proto.PhysicalPlanNode()
    conf = getattr(node, kind).base_conf
    conf.object_store_url = "S3://Bucket/"
    for paths in (["a/b c%20d", "/e"], ["f"]):
        group = conf.file_groups.add()
        for path in paths:
            group.files.add(path=path)
    access = access_of(node.SerializeToString(), with_functions=False)
    assert access == PlanAccess(
        nodes=frozenset({kind}),
        reads=tuple(Touched(kind, "s3://Bucket", path) for path in ("a/b c%20d", "e", "f")),
        writes=(),
        workers=frozenset(),
        functions=frozenset(),
        inlined_functions=frozenset(),
    )


async def test_descriptions_of_plans_are_refused_too(allowed: Path) -> None:
    secret = allowed.parent / "secret" / "numbers.csv"
    descriptor = Flight_pb2.FlightDescriptor(
        type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(scan(secret).SerializeToString())
    )
    async with running(allowed) as at, stub(at.address) as service:
        assert await status(service.GetFlightInfo(descriptor)) == denied("csv_scan", secret)
        assert await status(service.GetSchema(descriptor)) == denied("csv_scan", secret)
        assert at.worker.statistics().plans_decoded == 0


async def test_tasks_of_a_cluster_are_refused_too(allowed: Path) -> None:
    secret = allowed.parent / "secret" / "numbers.csv"
    async with running(allowed) as at:
        assert await refusal(at, scan(secret)) == denied("csv_scan", secret)
        async with coordinated(at, scan(allowed / "numbers.csv")) as task:
            assert (await task.read(range(1)))[0]["a"].to_pylist() == [1]


async def test_what_a_task_was_sent_is_for_no_other_plan(allowed: Path) -> None:
    async with running(host="127.0.0.1") as at:
        for store in ("exchange://folder/", "EXCHANGE://folder"):
            refused = (
                DENIED,
                f"the plan's csv_scan names {store!r}: what workers send each other is not for plans",
            )
            assert await answer(at, scan("0-0-0.arrow", store)) == refused
            assert await refusal(at, scan("0-0-0.arrow", store)) == refused


def sink(path: Path | str, store: str = "file:///") -> Message:
    """A plan that writes a file."""
    session = SessionContext()
    plan = session.sql("COPY (SELECT 1 AS a) TO '/tmp/somewhere.csv' STORED AS CSV").execution_plan().to_bytes()
    message = plan_proto.parse(plan)
    message.csv_sink.sink.config.table_paths[:] = [str(path)]
    message.csv_sink.sink.config.object_store_url = store
    return message


async def test_nothing_is_written_unless_the_setting_says_so(allowed: Path) -> None:
    target = allowed / "out.csv"
    for host in ("127.0.0.1", "0.0.0.0"):
        async with running(allowed, host=host) as at:
            for place, shown in (
                (f"file://{target}", f"file://{target}"),
                ("file:///etc/passwd", "file:///etc/passwd"),
            ):
                assert await answer(at, sink(place)) == (
                    DENIED,
                    f"the plan's csv_sink writes {shown!r}: this worker writes nothing, --allow-writes lets it",
                )
            code, _ = await answer(at, sink("s3://bucket/out.csv", "s3://bucket/"))
            assert code is DENIED
    assert not target.exists()


async def test_what_may_be_written_is_written_in_the_folder_alone(allowed: Path) -> None:
    (allowed / "link").symlink_to(allowed.parent / "secret", target_is_directory=True)
    (allowed / "link.csv").symlink_to(allowed.parent / "secret" / "new.csv")
    before = sorted((allowed.parent / "secret").iterdir())
    async with running(allowed, allow_writes=True) as at:
        assert await answer(at, sink(f"file://{allowed}/out%20put.csv")) == (OK, "")
        assert (allowed / "out put.csv").read_text() == "a\n1\n"
        for name in ("link/new.csv", "link.csv"):
            assert await answer(at, sink(f"file://{allowed}/{name}")) == denied("csv_sink", allowed / name)
        code, _ = await answer(at, sink(f"file://{allowed.parent}/secret/new.csv"))
        assert code is DENIED
    assert sorted((allowed.parent / "secret").iterdir()) == before


@pytest.mark.parametrize(
    "place",
    [
        "{}/../secret/new.csv",
        "file://{}/%2e%2e/secret/new.csv",
        "file://{}/..%2fsecret%2fnew.csv",
        "file://{}/../secret/new.csv",
        "file://{}/%2E./secret/new.csv",
        "file://{}\\..\\secret\\new.csv",
        "file://{}/.\t./secret/new.csv",
        "out.csv",
        "",
        "file://{}/..",
        "file:///",
        "s3://bucket{}/out.csv",
    ],
)
async def test_places_to_write_to_that_can_be_read_in_two_ways_are_refused(allowed: Path, place: str) -> None:
    place = place.format(allowed)
    async with running(allowed, allow_writes=True) as at:
        assert await answer(at, sink(place)) == (
            INVALID,
            f"the plan's csv_sink writes to {place!r}: a URL such as 'file:///folder/name' is right",
        )
    assert not list(allowed.parent.rglob("new.csv"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_other_workers_are_those_of_the_setting_where_it_names_some(host: str) -> None:
    """A plan could have the worker connect to anything, and send it the request's headers."""
    query = uuid.uuid4()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.0)
        stranger = f"http://127.0.0.1:{listener.getsockname()[1]}"
        plan = coalesced(NUMBERS, 1, stage(1, scan("numbers.csv"), [stranger], query))
        named = ("http://worker-1:8000", "https://worker-2")
        async with running(host=host, cluster_workers=named) as at:
            policy = DefaultPolicy(worker.Settings(host=host, cluster_workers=named))
            for told in (lambda: status_of(at, ticket(plan)), lambda: refusal(at, plan)):
                if host == "0.0.0.0":
                    assert await told() == (
                        DENIED,
                        f"the plan reads from {stranger!r}: this worker reads from those alone that --cluster-workers "
                        "names",
                    )
                    with pytest.raises(BlockingIOError):
                        listener.accept()
            for known in ("http://WORKER-1:8000/", "https://worker-2:443"):
                read = coalesced(NUMBERS, 1, stage(1, scan("numbers.csv"), [known], query))
                access = access_of(read.SerializeToString(), with_functions=False)
                assert access.workers == {known}
                assert access.nodes == {"merge", "extension", "coalesce"}
                await policy.check(context(), access)


def context(builder: worker.SessionStateBuilder | None = None) -> worker.WorkerQueryContext:
    return worker.WorkerQueryContext(builder=builder or worker.SessionStateBuilder(), headers=worker.Headers(()))


async def test_a_store_for_files_that_a_builder_registered_says_what_they_are(allowed: Path) -> None:
    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_object_store("file://", LocalFileSystem(prefix=str(allowed))).build()

    policy = DefaultPolicy(worker.Settings(host="0.0.0.0"))
    async with running_worker(build, plan_policy=policy) as at:
        assert (await fetch_one(at, do_get(scan("numbers.csv").SerializeToString())))["a"].to_pylist() == [1]


async def test_the_store_of_one_request_is_not_there_for_another(allowed: Path) -> None:
    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        if ctx.headers.get("tenant") == "a":
            ctx.builder.with_object_store("tenant://a", LocalFileSystem(prefix=str(allowed)))
        return ctx.builder.build()

    plan = do_get(scan("numbers.csv", "tenant://a/").SerializeToString(), key=stage_key())
    async with running_worker(build) as at:
        table = await fetch_one(at, plan, [(b"tenant", b"a"), (b"authorization", b"a")])
        assert table["a"].to_pylist() == [1]
        code, text = await status_of(at, plan)
        assert code is not OK
        assert "object store found for tenant://a/" in text


async def test_the_command_line_sets_the_policy(allowed: Path) -> None:
    command = ("-m", "worker", "--port", "0", "--allow-path", str(allowed))
    async with listening(*command) as (_, address), WorkerClient(address) as client:
        plan = scan(allowed / "numbers.csv").SerializeToString()
        assert [batch.num_rows async for batch in client.execute(plan, 0)] == [1]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(client.execute(scan("etc/passwd").SerializeToString(), 0))
        assert (caught.value.code(), caught.value.details()) == denied("csv_scan", "etc/passwd")


class OfTenant:
    """Lets tenants read what is theirs, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[PlanAccess] = []

    async def check(self, ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        self.asked.append(access)
        folder = ctx.headers.get("tenant")
        for read in access.reads:
            if folder is None or read.path.split("/")[-2] != folder:
                raise worker.PermissionDenied(f"{read} is not for {ctx.principal}")


async def build_for_one(ctx: worker.WorkerQueryContext) -> SessionContext:
    ctx.principal = "somebody"
    return ctx.builder.build()


async def test_a_policy_of_ones_own_decides_on_every_request_of_a_shared_task(allowed: Path) -> None:
    policy = OfTenant()
    path = allowed / "numbers.csv"
    plan = scan(path)
    plan.csv_scan.base_conf.file_groups.add()
    key = stage_key()
    first, second = (do_get(plan.SerializeToString(), partition, key) for partition in (0, 1))
    refused = (DENIED, f"file://{path} is not for somebody")
    async with running_worker(build_for_one, plan_policy=policy) as at:
        assert (await fetch_one(at, first, [(b"tenant", b"allowed")]))["a"].to_pylist() == [1]
        assert await status_of(at, second) == refused
        assert (await fetch_one(at, second, [(b"tenant", b"allowed")])).num_rows == 0
        assert await refusal(at, plan) == refused
        assert await refusal(at, plan, metadata=[("tenant", "secret")]) == refused
        assert at.worker.statistics().plans_decoded == 1
    assert len(policy.asked) == 5


async def test_a_policy_sees_functions_and_those_that_come_inside_of_the_plan(tmp_path: Path) -> None:
    trap = Touch(tmp_path / "sprung")
    shout = udf(lambda text, trap=trap: pc.utf8_upper(text), [pa.string()], pa.string(), "immutable", "shout")
    session = SessionContext()
    session.register_udf(shout)
    sql = "SELECT shout(b) AS c, sum(a), row_number() OVER (ORDER BY b) FROM (SELECT 1 AS a, 'x' AS b) GROUP BY b"
    plan = session.sql(sql).execution_plan().to_bytes()
    asked: list[PlanAccess] = []

    async def policy(ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        asked.append(access)
        raise worker.QuotaExceeded("enough")

    async with running_worker(plan_policy=policy) as at:
        assert await status_of(at, do_get(plan)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
    (access,) = asked
    assert access.functions == {"shout", "sum", "row_number"}
    assert access.inlined_functions == {"shout"}
    assert not (tmp_path / "sprung").exists()


async def test_pickled_functions_run_neither_in_plans_of_coordinators_nor_in_heads(tmp_path: Path) -> None:
    trap = Touch(tmp_path / "sprung")
    session = SessionContext()
    session.register_udf(udf(lambda x, trap=trap: x, [pa.int64()], pa.int64(), "volatile", "trapped"))
    session.register_record_batches("t", [[pa.record_batch({"x": [1, 2]})]])
    trapped = plan_proto.parse(session.sql("SELECT trapped(x) AS x FROM t").execution_plan().to_bytes())
    partitioning = hashed(0, 2)
    partitioning.hash.hash_expr[0].CopyFrom(trapped.projection.expr[0])
    assert all(b"DFPYUDF" in message.SerializeToString() for message in (trapped, partitioning))
    async with running_worker() as at:
        async with coordinated(at, trapped) as task:
            code, text = await refused_read(at, task.key)
            assert (code, "the session has no scalar function 'trapped'" in text) == (INVALID, True)
        async with coordinated(at, plan_of([1, 2])) as task:
            code, text = await refused_read(at, task.key, range(2), repartition(partitioning))
            assert code is INVALID
            assert "trapped" in text
    assert not (tmp_path / "sprung").exists()


async def test_a_policy_that_fails_is_internal_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def policy(ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        raise KeyError("a secret")

    async with running_worker(plan_policy=policy) as at:
        told = await answer(at, scan("numbers.csv"))
        assert told == (grpc.StatusCode.INTERNAL, "the plan policy failed: the worker's log says why")
    assert "KeyError: 'a secret'" in caplog.text


async def test_a_policy_may_be_a_function_or_an_object_and_is_asynchronous() -> None:
    async def policy(ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        pass

    def synchronous(ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        pass

    assert check_of(policy) is policy
    assert check_of(mine := OfTenant()) == mine.check
    for wrong in (synchronous, OfTenant, object()):
        with pytest.raises(TypeError, match="is no plan policy"):
            worker.Worker(plan_policy=wrong)  # type: ignore[arg-type]


def test_bytes_that_are_no_plan_are_invalid() -> None:
    with pytest.raises(worker.InvalidPlan, match=r"is not a datafusion\.PhysicalPlanNode"):
        access_of(b"\xff", with_functions=False)
