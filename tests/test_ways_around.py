"""Ways around what guards a worker: tokens, principals, folders, object stores, its word on writes and on pickles.

Those that have tests of their own where the guard is tested are in ``ELSEWHERE``, by name; the others are here.
"""

import ast
import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionConfig, SessionContext, udf
from datafusion.object_store import LocalFileSystem
from flight_plans import coalesced, distributed, network, stage, ticket, url
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import Touch, do_get, fetch_one, stage_key, status, status_of, stub
from test_cluster_attacks import SCHEMA, encoded, upstream
from test_policy import NUMBERS, answer, denied, running, scan, sink
from worker_service import (
    Metadata,
    coordinated,
    execute_request,
    plan_of,
    refusal,
    refused_read,
    repartition,
    service,
    task_key,
    values,
)

import worker
from worker import plan_proto
from worker.plan import schema_message
from worker.plan_proto import Message
from worker.policy import PlanAccess
from worker.proto import Flight_pb2, nodes_pb2, observability_pb2, observability_pb2_grpc, plan_pb2, worker_pb2
from worker.supervision.journal import Journal
from worker.testing import RunningWorker, running_worker
from worker.ticket import StageKey

DENIED = grpc.StatusCode.PERMISSION_DENIED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
OK = grpc.StatusCode.OK

ADA, GRACE = ((("authorization", f"Bearer {name}-0123456789abcdef"),) for name in ("ada", "grace"))

# The guard, a way around it, and the test.
ELSEWHERE = """
Tokens
  no token, or one that is nearly right
    test_tokens::test_whoever_has_none_is_told_what_is_wrong_and_not_what_they_sent
  two authorization headers, authorization-bin
    test_tokens::test_whoever_has_none_is_told_what_is_wrong_and_not_what_they_sent
  names of headers in another case
    test_tokens::test_names_that_differ_in_their_case_are_one_name
  methods that nobody thinks of, reflection, health in another case
    test_tokens::test_every_method_needs_a_token_and_none_is_called_without
  a file that is spoilt
    test_tokens::test_a_file_that_changes_counts_within_a_second_and_one_of_no_use_does_not
  a message before the refusal
    test_tokens::test_who_has_no_token_is_refused_before_what_they_send_is_read
Certificates
  no certificate, or one of another authority
    test_tls::test_clients_have_to_show_a_certificate_that_is_vouched_for
  no TLS
    test_tls::test_flight_reads_through_tls_and_nobody_without_it
  a certificate in the place of another's
    test_tls::test_a_certificate_is_the_principal_of_who_shows_it
  an open port
    test_exposure::test_it_is_not_open_by_accident
Session builders
  a token that was good for another partition
    test_auth::test_a_token_that_is_revoked_is_refused_on_the_second_partition_of_a_task
  a shared task
    test_auth::test_a_stage_key_stands_for_one_task_of_each_token
  a key that stands for another's plan
    test_auth::test_two_tokens_may_use_one_stage_key_for_different_plans_and_one_may_not
  a header that is there twice
    test_auth::test_a_header_that_was_sent_twice_is_invalid_and_its_values_are_not_in_the_answer
  reads of a coordinator's task
    test_worker_service::test_the_session_builder_is_awaited_for_every_read_and_may_refuse_it
  another's key
    test_worker_service::test_a_task_is_found_by_its_own_authorization_and_without_any_by_its_key
  the console
    test_observability::test_tasks_and_workers_are_shown_to_their_own_principal_alone
Folders
  symbolic links
    test_policy::test_links_out_of_the_folder_are_seen_through
  ..
    test_policy::test_dots_do_not_lead_out_of_the_folder
  percent-encodings
    test_policy::test_what_is_percent_encoded_in_a_path_is_a_name
  other ways to write file:///
    test_policy::test_every_way_to_write_the_local_file_system_is_known
  another host
    test_policy::test_a_file_of_another_host_is_one_of_none
  what is no file
    test_policy::test_only_regular_files_are_opened
  files of the kernel's
    test_policy::test_files_of_the_kernel_are_not_read_on_this_machine_either
  nested nodes, extensions, subqueries
    test_policy::test_scans_are_found_wherever_they_are
  new fields that name files
    test_policy::test_all_kinds_of_scans_and_sinks_are_known
  GetFlightInfo, GetSchema
    test_policy::test_descriptions_of_plans_are_refused_too
  the cluster's dialect
    test_policy::test_tasks_of_a_cluster_are_refused_too
  what a task was sent
    test_policy::test_what_a_task_was_sent_is_for_no_other_plan
  a partition of a task that another may read
    test_policy::test_a_policy_of_ones_own_decides_on_every_request_of_a_shared_task
Writes
  any
    test_policy::test_nothing_is_written_unless_the_setting_says_so
  links out of a folder
    test_policy::test_what_may_be_written_is_written_in_the_folder_alone
  URLs that are read in two ways
    test_policy::test_places_to_write_to_that_can_be_read_in_two_ways_are_refused
Stores
  that of another request
    test_policy::test_the_store_of_one_request_is_not_there_for_another
  that of a request with the same stage key
    test_s3::test_a_tenants_store_is_invisible_to_a_request_that_runs_beside_it_with_its_stage_key
  the right bucket with another's keys
    test_s3::test_the_right_bucket_with_anothers_keys_has_no_rows_not_even_those_just_read
Other workers
  addresses that are none of the cluster's
    test_policy::test_other_workers_are_those_of_the_setting_where_it_names_some
Pickles
  in a ticket's plan, of each kind
    test_auth::test_a_function_that_the_session_lacks_is_named_and_the_clients_own_is_never_unpickled
  under a name that the session knows
    test_auth::test_a_function_of_the_session_is_what_runs_and_the_clients_own_is_never_unpickled
  beside a request that may
    test_auth::test_inlining_is_asked_for_by_one_request_alone
  in a coordinator's plan, in a head
    test_policy::test_pickled_functions_run_neither_in_plans_of_coordinators_nor_in_heads
"""


def test_the_ways_that_are_tested_elsewhere_are() -> None:
    tests = [line.strip().split("::") for line in ELSEWHERE.splitlines() if line.startswith("    ")]
    defined = {
        module: {getattr(node, "name", "") for node in ast.parse(file.read_text()).body}
        for module in {module for module, _ in tests}
        if (file := Path(__file__).parent / f"{module}.py")
    }
    assert len(tests) > 30
    assert not [(module, name) for module, name in tests if name not in defined[module]]


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """A folder with a file in it that plans may read, beside one that they may not."""
    for folder, number in (("allowed", 1), ("secret", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "numbers.csv").write_text(f"a\n{number}\n")
    return tmp_path / "allowed"


@pytest.fixture
def tokens(tmp_path: Path) -> worker.Settings:
    """The settings of a worker that Ada and Grace may use."""
    file = tmp_path / "tokens"
    file.write_text("".join(f"{name}:{name}-0123456789abcdef\n" for name in ("ada", "grace")))
    return worker.Settings(auth_token_file=file)


# Who asks


async def test_the_task_of_another_is_neither_read_nor_shown_nor_taken(tokens: worker.Settings) -> None:
    """Grace knows the key of Ada's task: from a log, say."""
    async with (
        running_worker(settings=tokens) as at,
        coordinated(at, plan_of([1], [2]), metadata=ADA) as task,
        grpc.aio.insecure_channel(at.address) as channel,
    ):
        console = observability_pb2_grpc.ObservabilityServiceStub(channel)

        async def shown(metadata: Metadata) -> int:
            asked = observability_pb2.GetTaskProgressRequest()
            return len((await console.GetTaskProgress(asked, metadata=metadata)).tasks)

        code, text = await refused_read(at, task.key, metadata=GRACE)
        assert (code, text.startswith("no plan has been set for task")) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        assert (await refused_read(at, task.key))[0] is grpc.StatusCode.UNAUTHENTICATED
        code, text = await refusal(at, plan_of([3]), key=task.key, metadata=GRACE)
        assert (code, "has been set already" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        assert (await shown(ADA), await shown(GRACE)) == (1, 0)
        assert values((await task.read(range(1), metadata=ADA))[0]) == [1]
        await task.call.done_writing()


async def test_whom_a_session_builder_names_reads_no_task_of_another_by_its_key() -> None:
    """Callers are told apart by another header than ``authorization`` here."""

    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        if user := ctx.headers.get("x-user"):
            ctx.principal = user
        return ctx.builder.build()

    ada, bob = (("x-user", "ada"),), (("x-user", "bob"),)
    async with running_worker(build) as at, coordinated(at, plan_of([1], [2]), metadata=ada) as task:
        assert (await refused_read(at, task.key, metadata=bob))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert values((await task.read(range(1), metadata=ada))[0]) == [1]
        # A worker in Rust sends no headers, and the builder has let it in.
        assert values((await task.read(range(1, 2)))[1]) == [2]


async def test_keys_that_the_worker_makes_cannot_be_guessed() -> None:
    session = SessionContext(SessionConfig().with_target_partitions(2))
    plan = session.sql("SELECT 1 UNION ALL SELECT 2").execution_plan().to_bytes()
    descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(plan))
    keys = []
    async with running_worker() as at, stub(at.address) as flight:
        for _ in range(2):
            info = await flight.GetFlightInfo(descriptor)
            (key,) = {plan_pb2.DoGet.FromString(end.ticket.ticket).stage_key.query_id for end in info.endpoint}
            keys.append(uuid.UUID(bytes=key))
    assert keys[0] != keys[1]
    # Of 122 random bits of the system's.
    assert {key.version for key in keys} == {4}


def test_nobody_has_the_plan_of_another_refused_for_what_their_own_has_done() -> None:
    """Plans that ended the worker are refused whatever their query is, and whoever sends one says which that is."""
    theirs = plan_of([1])
    # As protobuf is read, sixteen bytes at the end of a plan can make another of it.
    query = uuid.uuid4()
    journal = Journal()
    honest = journal.admit(theirs, StageKey.unique()).digest
    assert journal.admit(theirs, None).digest == honest
    assert journal.admit(theirs + query.bytes, StageKey(query)).digest != honest


async def test_health_says_the_same_whatever_comes_as_a_token(tokens: worker.Settings) -> None:
    async with running_worker(settings=tokens) as at, grpc.aio.insecure_channel(at.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for metadata in (None, ADA, (("authorization", "Bearer nobody"),)):
            told = await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
            assert told == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        # Services are no way to find out what there is.
        unknown = await health.Check(health_pb2.HealthCheckRequest(service="worker.Secret"))
        assert unknown.status == health_pb2.HealthCheckResponse.SERVING


# What no client on gRPC sends

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4

Fields = Sequence[tuple[str, str]]


def _frame(kind: int, flags: int, on_stream: bool, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags, 0, 0, 0, on_stream]) + payload


def _block(fields: Fields) -> bytes:
    """Header fields as HPACK's literals, whose lengths are below 127."""
    texts = (text.encode() for field in fields for text in field)
    octets = [bytes([len(text)]) + text for text in texts]
    return b"".join(b"\x10" + name + value for name, value in zip(octets[::2], octets[1::2], strict=True))


async def _ask(at: RunningWorker, fields: Fields, message: bytes, trailers: Fields = ()) -> None:
    """Sends a request by hand, and waits for what ends it."""
    host, port = at.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b"\0" + len(message).to_bytes(4, "big") + message
    writer.write(
        _PREFACE
        + _frame(_SETTINGS, 0, False)
        + _frame(_HEADERS, _END_HEADERS, True, _block(fields))
        + _frame(_DATA, 0 if trailers else _END_STREAM, True, body)
        + (_frame(_HEADERS, _END_HEADERS | _END_STREAM, True, _block(trailers)) if trailers else b"")
    )
    try:
        async with asyncio.timeout(30):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                ends = head[3] in (_RESET, _GOAWAY) or (head[3] in (_DATA, _HEADERS) and head[4] & _END_STREAM)
                if ends:
                    return
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


DO_GET = "/arrow.flight.protocol.FlightService/DoGet"
HEALTH = "/grpc.health.v1.Health/Check"
GOOD, BAD = ADA[0][1], "Bearer nobody-0123456789abcdef"


def _fields(*more: tuple[str, str], path: str = DO_GET) -> Fields:
    """What a request begins with."""
    standard = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "worker"))
    return (*standard, ("te", "trailers"), ("content-type", "application/grpc"), *more)


async def test_headers_that_say_two_things_let_nobody_in(tokens: worker.Settings) -> None:
    plan = SessionContext().sql("SELECT 1").execution_plan().to_bytes()
    message = Flight_pb2.Ticket(ticket=do_get(plan)).SerializeToString()
    async with running_worker(settings=tokens) as at:
        for fields in (
            _fields(("authorization", BAD), ("Authorization", GOOD)),
            _fields(("Authorization", GOOD), ("authorization", BAD)),
            _fields(("authorization", BAD), ("authorization", GOOD)),
            _fields(("authorization", GOOD), ("authorization", GOOD)),
            _fields(("authorization", f"{BAD}, {GOOD}")),
            _fields(("authorization", f"{BAD}\0{GOOD}")),
            _fields((":authorization", GOOD)),
            _fields(("authorization ", GOOD)),
            _fields(("authorization-bin", "QmVhcmVyIGFkYS0wMTIzNDU2Nzg5YWJjZGVm")),
            _fields(("proxy-authorization", GOOD)),
            _fields(("cookie", f"authorization={GOOD}")),
            _fields((":path", DO_GET), path=HEALTH),
            _fields((":path", HEALTH)),
            _fields(path=f"{HEALTH}/../../{DO_GET}"),
            _fields(path=f"/grpc.health.v1.Health/..{DO_GET}"),
            _fields(path=f"/{DO_GET}"),
            _fields(path=f"{DO_GET}?"),
            _fields(path=f"http://worker{DO_GET}"),
        ):
            await _ask(at, fields, message)
        await _ask(at, _fields(), message, trailers=(("authorization", GOOD),))
        assert at.worker.statistics().plans_decoded == 0
        # So that it is known that requests by hand are understood.
        await _ask(at, _fields(("authorization", GOOD)), message)
        assert at.worker.statistics().requests_ended["DoGet", "OK"] == 1


# Which files


def _lookalikes(folder: Path) -> list[str]:
    """Names of the secret file that only some readers of paths take for it."""
    secret = "secret/numbers.csv"
    return [
        f"{folder}/%252e%252e/{secret}",
        f"{folder}/%2e%2e/{secret}",
        f"{folder}/..%2f{secret}",
        f"{folder}/.\t./{secret}",
        f"{folder}/..\t/{secret}",
        f"{folder}/..\0/{secret}",
        f"{folder}/\0/../../{secret}",
        f"{folder}/..\\{secret}",
        f"{folder}/\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/{secret}",
        f"{folder}/\N{TWO DOT LEADER}/{secret}",
        f"{folder}//../{secret}",
        f"{folder}/numbers.csv/../../{secret}",
        f"{folder}/;/../../{secret}",
        f"{folder}?/../{secret}",
        f"{folder}#/../{secret}",
        f"{folder.parent}/{secret}/",
        f"/proc/self/root{folder.parent}/{secret}",
        f"/dev/../{folder.parent}/{secret}",
        f"{folder.parent}/./{secret}",
        f"file://{folder.parent}/{secret}",
    ]


async def test_no_other_name_of_a_file_leads_to_it(allowed: Path) -> None:
    async with running(allowed) as at:
        for path in _lookalikes(allowed):
            for store in ("file:///", "", "file://localhost/"):
                code, text = await answer(at, scan(path, store))
                assert code in (DENIED, INVALID, grpc.StatusCode.NOT_FOUND), (path, text)
        assert at.worker.statistics().rows_sent == 0


async def test_files_that_are_open_are_not_read_by_their_numbers(tmp_path: Path) -> None:
    """What was deleted has no name, and no folder, but the kernel's link to it has. Likewise memory that is shared."""
    with (tmp_path / "deleted.csv").open("w+") as file, os.fdopen(os.memfd_create("shared"), "w+") as memory:
        for each in (file, memory):
            each.write("a\n2\n")
            each.flush()
        (tmp_path / "deleted.csv").unlink()
        number, other = file.fileno(), memory.fileno()
        async with running(host="127.0.0.1") as at:
            for path in (
                f"/proc/self/fd/{number}",
                f"/dev/fd/{number}",
                f"/proc/{os.getpid()}/fd/{number}",
                f"/proc/self/fd/{other}",
            ):
                assert await answer(at, scan(path)) == (
                    DENIED,
                    f"the plan's csv_scan names 'file://{path}', which is no regular file",
                )
            for path in ("/dev/stdin", "/proc/self/root/proc/self/environ", "/proc/thread-self/root/proc/1/environ"):
                assert (await answer(at, scan(path)))[0] is DENIED


async def test_a_plan_in_two_pieces_is_seen_as_it_is_decoded(allowed: Path) -> None:
    """Protobuf that is written one after the other is one message: lists grow, and the last of several kinds counts."""
    own = scan(allowed / "numbers.csv").SerializeToString()
    secret = allowed.parent / "secret" / "numbers.csv"
    other = scan(secret).SerializeToString()
    union = plan_proto.PhysicalPlanNode()
    union.union.inputs.add().ParseFromString(own)
    async with running(allowed) as at:
        for plan in (own + other, other + own, union.SerializeToString() + other):
            assert await status_of(at, do_get(plan)) == denied("csv_scan", secret)


async def test_a_key_that_stands_for_a_plan_that_may_opens_no_other(allowed: Path) -> None:
    plan = scan(allowed / "numbers.csv")
    plan.csv_scan.base_conf.file_groups.add()
    secret = allowed.parent / "secret" / "numbers.csv"
    key = stage_key()
    async with running(allowed) as at:
        assert await status_of(at, do_get(plan.SerializeToString(), 0, key)) == (OK, "")
        assert await status_of(at, do_get(scan(secret).SerializeToString(), 1, key)) == denied("csv_scan", secret)


def _nodes_of_a_cluster(below: Message) -> list[Message]:
    """Nodes of Distributed DataFusion's over another, among them one that leaves it out."""
    left_out = [nodes_pb2.Children(), nodes_pb2.Children()]
    chosen = [nodes_pb2.Children(child_ctx=[nodes_pb2.Child(child_idx=0, task_idx=0, task_count=1)])]
    return [
        distributed(nodes_pb2.Node(broadcast=nodes_pb2.Broadcast(consumer_task_count=2)), below),
        distributed(nodes_pb2.Node(sampler=nodes_pb2.Sampler()), below),
        distributed(nodes_pb2.Node(partition_isolator=nodes_pb2.PartitionIsolator(n_tasks=1)), below),
        *(
            distributed(
                nodes_pb2.Node(
                    children_isolator_union=nodes_pb2.ChildrenIsolatorUnion(partition_count=1, task_idx_map=children)
                ),
                below,
            )
            for children in (left_out, chosen)
        ),
    ]


async def test_nodes_of_a_cluster_hide_nothing_however_deep(allowed: Path) -> None:
    secret = allowed.parent / "secret" / "numbers.csv"
    async with running(allowed, allow_writes=True) as at:
        for node in _nodes_of_a_cluster(scan(secret)):
            for plan in (node, *_nodes_of_a_cluster(node)):
                assert await refusal(at, plan) == denied("csv_scan", secret)
                assert await status_of(at, ticket(plan, count=1)) == denied("csv_scan", secret)
        out = allowed.parent / "secret" / "out.csv"
        for node in _nodes_of_a_cluster(sink(f"file://{out}")):
            assert await refusal(at, node) == denied("csv_sink", out)
        assert at.worker.statistics().plans_decoded == 0


async def test_the_plan_of_a_stage_is_looked_at_by_who_executes_it(allowed: Path, tmp_path: Path) -> None:
    """A plan has plans of other stages inside, which the worker sends on: also to itself."""
    secret = allowed.parent / "secret" / "numbers.csv"
    trapped = _trapped(Touch(tmp_path / "sprung"))
    async with running(allowed) as at:
        for below, expected in (
            (scan(secret), denied("csv_scan", secret)),
            (sink(f"file://{allowed}/out.csv"), None),
            (trapped, (INVALID, "the session has no scalar function 'trapped': register it in the session builder")),
        ):
            code, text = await status_of(at, ticket(coalesced(NUMBERS, 1, stage(1, below, [url(at)]))))
            assert (code, text) == expected if expected else (code is DENIED and "--allow-writes" in text)
    assert not (allowed / "out.csv").exists()
    assert not (tmp_path / "sprung").exists()


@asynccontextmanager
async def _coordinating(
    at: RunningWorker, *messages: worker_pb2.CoordinatorToWorkerMsg
) -> AsyncIterator[grpc.aio.StreamStreamCall[Any, Any]]:
    async with service(at) as client:
        call = client.CoordinatorChannel()
        for message in messages:
            await call.write(message)
        yield call
        call.cancel()


async def test_nothing_takes_the_place_of_a_plan_that_may(allowed: Path) -> None:
    """Work units, which could say what is read, and a second plan."""
    key = task_key()

    def set_plan(plan: Message) -> worker_pb2.CoordinatorToWorkerMsg:
        request = worker_pb2.SetPlanRequest(task_key=key, task_count=1, plan_proto=plan.SerializeToString())
        return worker_pb2.CoordinatorToWorkerMsg(set_plan_request=request)

    harmless, secret = scan(allowed / "numbers.csv"), scan(allowed.parent / "secret" / "numbers.csv")
    units = worker_pb2.CoordinatorToWorkerMsg(work_unit_batch=worker_pb2.WorkUnitBatch())
    end = worker_pb2.CoordinatorToWorkerMsg(work_unit_eos=True)
    first = (INVALID, "the first message of a CoordinatorChannel must be a set_plan_request")
    async with running(allowed) as at, asyncio.timeout(60):
        for early in (units, end):
            async with _coordinating(at, early) as call:
                assert await status(call) == first
        async with _coordinating(at, set_plan(harmless), units, end, set_plan(secret)) as call:
            assert await status(call) == (INVALID, "a CoordinatorChannel sets one plan, with its first message")
        assert at.worker.statistics().tasks == 0
        # Whoever waits for the task is not given what was refused.
        async with service(at) as client:
            waiting = asyncio.ensure_future(status(client.ExecuteTask(execute_request(key, range(1)))))
            assert await refusal(at, secret, key=key) == await waiting
        assert at.worker.statistics().rows_sent == 0


async def test_hosts_of_workers_are_hosts_and_no_sockets_of_this_machine() -> None:
    """``unix-abstract:8000`` is a target of gRPC's, for a socket of that name."""
    with socket.socket(socket.AF_UNIX) as listener, socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        listener.bind(f"\0{number}")
        listener.listen()
        listener.settimeout(0.0)
        plan = coalesced(NUMBERS, 1, stage(1, scan("numbers.csv"), [f"http://unix-abstract:{number}"]))
        async with running_worker() as at, stub(at.address) as flight:
            code, _ = await status(flight.DoGet(Flight_pb2.Ticket(ticket=ticket(plan)), timeout=5))
            assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        with pytest.raises(BlockingIOError):
            listener.accept()


# Writes


@pytest.mark.parametrize("wrap", range(6))
async def test_what_writes_is_found_wherever_it_is(allowed: Path, wrap: int) -> None:
    inner = sink(f"file://{allowed}/out.csv")
    below: list[Callable[[Message], Message]] = [
        lambda node: node.union.inputs.add(),
        lambda node: node.projection.input,
        lambda node: node.scalar_subquery.subqueries.add(),
        lambda node: node.analyze.input,
        lambda node: node.nested_loop_join.right,
        lambda node: node.extension.inputs.add(),
    ]
    outer = plan_proto.PhysicalPlanNode()
    below[wrap](outer).CopyFrom(inner)
    async with running(allowed) as at:
        for told in (await answer(at, outer), await refusal(at, outer)):
            assert told == (
                DENIED,
                f"the plan's csv_sink writes 'file://{allowed}/out.csv': this worker writes nothing, "
                "--allow-writes lets it",
            )
        assert at.worker.statistics().plans_decoded == 0
    assert not (allowed / "out.csv").exists()


async def test_to_describe_a_plan_writes_nothing_and_calls_nothing(allowed: Path) -> None:
    called = []

    def count(column: pa.Array) -> pa.Array:
        called.append(len(column))
        return column

    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        counted = udf(count, [pa.int64()], pa.int64(), "volatile", "counted")
        return ctx.builder.with_scalar_functions([counted]).build()

    session = SessionContext()
    session.register_udf(udf(count, [pa.int64()], pa.int64(), "volatile", "counted"))
    calling = session.sql("SELECT counted(1) AS a").execution_plan().to_bytes()
    writing = sink(f"file://{allowed}/out.csv").SerializeToString()
    settings = worker.Settings(allow_path=(allowed,), allow_writes=True)
    called.clear()
    async with running_worker(build, settings=settings) as at, stub(at.address) as flight:
        for plan in (calling, writing):
            descriptor = Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=do_get(plan))
            assert await status(flight.GetSchema(descriptor)) == (OK, "")
            assert await status(flight.GetFlightInfo(descriptor)) == (OK, "")
        assert not sum(called)
        assert not (allowed / "out.csv").exists()
        assert await status_of(at, do_get(writing)) == (OK, "")
        assert (allowed / "out.csv").exists()


async def test_names_that_are_made_of_what_is_written_stay_in_the_folder(allowed: Path) -> None:
    """Values of partition columns become folders, and the extension the end of a name."""
    session = SessionContext(SessionConfig().with_target_partitions(1))
    climbing = ["../../../secret/new", "..", "/absolute", "a/b", "%2e%2e%2f"]
    session.register_record_batches("t", [[pa.record_batch({"a": range(len(climbing)), "p": climbing})]])
    before = sorted(allowed.parent.rglob("*"))
    async with running(allowed, allow_writes=True) as at:
        for options in ("STORED AS CSV PARTITIONED BY (p)", "STORED AS CSV"):
            copy = f"COPY t TO '{allowed}/out/' {options}"
            message = plan_proto.parse(session.sql(copy).execution_plan().to_bytes())
            message.csv_sink.sink.config.file_extension = "csv/../../../../secret/new"
            assert await answer(at, message) == (OK, "")
    written = [path for path in allowed.parent.rglob("*") if path not in before]
    assert len([path for path in written if path.is_file()]) == len(climbing) + 1
    assert all(path.resolve().is_relative_to(allowed / "out") for path in written)


# Stores


@pytest.mark.parametrize(
    "store",
    [
        "tables://customers/",
        "TABLES://customers/",
        "tables://ada@customers/",
        "tables://allowed:pass@customers/",
        "tables://customers:/",
        "http://internal/",
        "http://INTERNAL/",
        "http://internal:80/",
        "http://internal:/",
        "http://intern%61l/",
        "http://\N{CIRCLED LATIN SMALL LETTER I}nternal/",
        "http://allowed@internal/",
    ],
)
async def test_a_policy_sees_the_store_that_is_read_however_it_is_written(allowed: Path, store: str) -> None:
    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        for known in ("tables://customers", "http://internal"):
            ctx.builder.with_object_store(known, LocalFileSystem(prefix=str(allowed)))
        return ctx.builder.build()

    asked: list[str] = []

    async def policy(ctx: worker.WorkerQueryContext, access: PlanAccess) -> None:
        asked.extend(read.store for read in access.reads)

    async with running_worker(build, plan_policy=policy) as at:
        assert (await fetch_one(at, do_get(scan("numbers.csv", store).SerializeToString())))["a"].to_pylist() == [1]
    assert asked == ["http://internal" if "http" in store else "tables://customers"]


async def test_the_store_of_one_task_is_not_there_for_another(allowed: Path) -> None:
    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        if ctx.headers.get("tenant") == "a":
            ctx.builder.with_object_store("tenant://a", LocalFileSystem(prefix=str(allowed)))
        return ctx.builder.build()

    plan = scan("numbers.csv", "tenant://a/")
    key = task_key()
    async with running_worker(build) as at, coordinated(at, plan, key=key, metadata=(("tenant", "a"),)) as task:
        assert (await task.read(range(1)))[0]["a"].to_pylist() == [1]
        # Of the same query, as the next stage of it would be.
        async with coordinated(at, plan, key=task_key(query=key.query_id, stage=2)) as other:
            code, text = await refused_read(at, other.key)
        assert code is not OK
        assert "tenant://a" in text


async def test_headers_set_no_option_of_the_workers_own(allowed: Path) -> None:
    """A coordinator's headers set DataFusion's options, and not what the process has: folders, memory, credentials.

    Nor what SQL of a session builder means, nor what takes memory beyond the pool.
    """
    sessions = []

    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        ctx.builder.with_config_option("datafusion.catalog.information_schema", True)
        sessions.append(ctx.builder.build())
        return sessions[-1]

    options = {
        "datafusion.runtime.temp_directory": str(allowed),
        "datafusion.runtime.memory_limit": "9999G",
        "datafusion.runtime.max_temp_directory_size": "9999G",
        "datafusion.aws.endpoint": "http://127.0.0.1:1",
        "aws.endpoint": "http://127.0.0.1:1",
        "datafusion.catalog.location": "no location",
        "datafusion.catalog.default_schema": "theirs",
        "datafusion.sql_parser.dialect": "mysql",
        "datafusion.optimizer.enable_join_dynamic_filter_pushdown": "true",
        "datafusion.execution.perfect_hash_join_small_build_threshold": str(1 << 60),
        "datafusion.execution.perfect_hash_join_min_key_density": "0",
        "datafusion.execution.planning_concurrency": "7",
    }
    headers = [(f"x-datafusion-distributed-config-{name}", value) for name, value in options.items()]
    sql = "SELECT name, value FROM information_schema.df_settings"

    async def settings_of(metadata: Metadata) -> dict[str, str]:
        async with coordinated(at, plan_of([1]), metadata=metadata):
            table = pa.Table.from_batches(await asyncio.to_thread(sessions[-1].sql(sql).collect))
            return dict(zip(*table.to_pydict().values(), strict=True))

    async with running_worker(build) as at:
        before, after = await settings_of([]), await settings_of(headers)
    assert {name for name in before if before[name] != after[name]} == {"datafusion.execution.planning_concurrency"}


# Pickles


def _trapped(trap: Touch) -> Message:
    """A plan that calls a pickled function, which creates a file when it is unpickled."""
    session = SessionContext(SessionConfig().with_target_partitions(1))
    session.register_udf(udf(lambda x, trap=trap: x, [pa.int64()], pa.int64(), "volatile", "trapped"))
    session.register_record_batches("t", [[pa.record_batch({"a": [1, 2]})]])
    plan = session.sql("SELECT trapped(a) AS a FROM t").execution_plan().to_bytes()
    assert b"DFPYUDF" in plan
    return plan_proto.parse(plan)


def _places_of_a_call(call: Message, path: Path) -> list[Message]:
    """Plans with an expression where few look for one."""
    projected, ordered, hashed = scan(path), scan(path), plan_proto.PhysicalPlanNode()
    projected.csv_scan.base_conf.projection_exprs.projections[0].expr.CopyFrom(call)
    order = ordered.csv_scan.base_conf.output_ordering.add()
    order.physical_sort_expr_nodes.add().expr.CopyFrom(call)
    # A coordinator's plan has one on top that is not executed.
    hashed.merge.input.repartition.input.CopyFrom(scan(path))
    hashed.merge.input.repartition.partitioning.CopyFrom(_hashed_by(call))
    return [projected, ordered, hashed]


def _hashed_by(call: Message) -> Message:
    partitioning = plan_proto.Partitioning()
    partitioning.hash.hash_expr.add().CopyFrom(call)
    partitioning.hash.partition_count = 1
    return partitioning


@pytest.mark.parametrize("before", [b"", b"\0"])
async def test_pickles_run_nowhere_in_a_plan(allowed: Path, tmp_path: Path, before: bytes) -> None:
    """Nor does what is no pickle by how it begins."""
    call = _trapped(Touch(tmp_path / "sprung")).projection.expr[0]
    call.scalar_udf.fun_definition = before + call.scalar_udf.fun_definition
    # Readers of shuffles tell how rows are distributed, where something above them needs to know.
    read = nodes_pb2.Stage(query_id=uuid.uuid4().bytes, num=2)
    interleaved = plan_proto.PhysicalPlanNode()
    async with running_worker() as at, upstream(*(data.SerializeToString() for data in encoded())) as answering:
        read.tasks.add(url_str=answering)
        for _ in range(2):
            leaf = network("shuffle", schema_message(SCHEMA), _hashed_by(call), read)
            interleaved.interleave.inputs.add().CopyFrom(leaf)
        for plan in (interleaved, *_places_of_a_call(call, allowed / "numbers.csv")):
            assert b"DFPYUDF" in plan.SerializeToString()
            assert (await status_of(at, ticket(plan, count=1)))[0] is INVALID
            async with coordinated(at, plan) as task:
                code, text = await refused_read(at, task.key)
                assert (code, "trapped" in text) == (INVALID, True), text
    assert not (tmp_path / "sprung").exists()


async def test_a_reader_has_no_pickle_run_that_only_the_coordinator_may(tmp_path: Path) -> None:
    """What a task is read with is decoded in the session of who has set it."""

    async def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        return ctx.builder.with_python_udf_inlining("x-trusted" in ctx.headers).build()

    trusted = (("x-trusted", "1"),)
    head = repartition(_hashed_by(_trapped(Touch(tmp_path / "sprung")).projection.expr[0]))
    async with running_worker(build) as at:
        async with coordinated(at, plan_of([1, 2]), metadata=trusted) as task:
            code, text = await refused_read(at, task.key, head=head)
            assert (code, "trapped" in text) == (INVALID, True)
            assert not (tmp_path / "sprung").exists()
        # Nor where the reader is another task of the same worker.
        below = task_key(stage=2)
        above = task_key(query=below.query_id)
        read = nodes_pb2.Stage(query_id=below.query_id, num=2, tasks=[nodes_pb2.Task(url_str=url(at))])
        partitioning = plan_proto.Partitioning.FromString(head.partitioning)
        reading = network("shuffle", schema_message(pa.schema({"x": pa.int64()})), partitioning, read)
        async with (
            coordinated(at, plan_of([1, 2]), key=below, metadata=trusted),
            coordinated(at, reading, key=above) as task,
        ):
            code, text = await refused_read(at, task.key)
            assert (code, "trapped" in text) == (INVALID, True)
            assert not (tmp_path / "sprung").exists()
        async with coordinated(at, plan_of([1, 2]), metadata=trusted) as task:
            assert values((await task.read(range(1), head, trusted))[0]) == [1, 2]
            assert (tmp_path / "sprung").exists()
