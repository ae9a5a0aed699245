"""Tokens from a file: whatever is asked of a worker needs one, and nothing tells what they are."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from datafusion import SessionConfig, SessionContext
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support import do_get, listening, stage_key, status, stub

import worker
from worker import Settings, TokenAuth, UnfitSettings, WorkerQueryContext, auth, server
from worker.client import WorkerClient
from worker.proto import Flight_pb2, Flight_pb2_grpc, observability_pb2, worker_pb2
from worker.testing import RunningWorker, running_worker

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

ADA, GRACE, NAMELESS = "ada-3f9c-5b21-77aa", "grace-71d0-9e8f-0c4b", "nameless-0123456789=="
TOKENS = f"""
# who may
ada:{ADA}
 grace : {GRACE}
{NAMELESS}
"""
OK = (grpc.StatusCode.OK, "")
REFUSED = grpc.StatusCode.UNAUTHENTICATED


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {token}")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    return path


@pytest.fixture
def settings(file: Path) -> Settings:
    return Settings(auth_token_file=file)


@pytest.fixture
def plan() -> bytes:
    return SessionContext().sql("select 1 as one").execution_plan().to_bytes()


async def answer(running: RunningWorker, plan: bytes, metadata: Metadata = ()) -> tuple[grpc.StatusCode, str]:
    async with stub(running.address) as service:
        return await status(service.DoGet(Flight_pb2.Ticket(ticket=do_get(plan)), metadata=metadata))


@pytest.mark.parametrize("token", [ADA, GRACE, NAMELESS])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_whoever_has_a_token_is_let_in(token: str, scheme: str, settings: Settings, plan: bytes) -> None:
    async with running_worker(settings=settings) as running:
        assert await answer(running, plan, [("authorization", f"{scheme} {token}")]) == OK


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ([], "the header authorization is missing: send 'authorization: Bearer' with a token"),
        (bearer("somebody-elses-token"), "the token in the header authorization is none of this worker's"),
        (bearer(ADA[:-1]), "is none of this worker's"),
        (bearer(f"{ADA}="), "is none of this worker's"),
        (bearer(f"ada:{ADA}"), "is none of this worker's"),
        (bearer(ADA.upper()), "is none of this worker's"),
        (bearer(f" {ADA}"), "is none of this worker's"),
        (bearer(""), "authorization"),
        ([("authorization", ADA)], "not of the form 'Bearer' and a token"),
        ([("authorization", f"Basic {ADA}")], "not of the form 'Bearer' and a token"),
        (bearer(ADA) + bearer(ADA), "was sent 2 times, once is right"),
        (bearer("wrong") + bearer(ADA), "was sent 2 times, once is right"),
        ([("authorization-bin", f"Bearer {ADA}".encode())], "is missing"),
        ([("x-authorization", f"Bearer {ADA}")], "is missing"),
    ],
)
async def test_whoever_has_none_is_told_what_is_wrong_and_not_what_they_sent(
    metadata: Metadata, text: str, settings: Settings, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_worker(settings=settings) as running:
        code, details = await answer(running, plan, metadata)
        assert code is REFUSED
        assert text in details
        assert running.worker.statistics().plans_decoded == 0
    for told in (details, caplog.text):
        assert not [token for token in (ADA, GRACE, NAMELESS, "somebody") if token in told]


class Details(grpc.HandlerCallDetails):
    """A request as its interceptors get it."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.method = "/arrow.flight.protocol.FlightService/DoGet"
        self.invocation_metadata = metadata


async def test_names_that_differ_in_their_case_are_one_name(file: Path) -> None:
    """Which HTTP/2 does not allow, and clients on gRPC do not send."""
    reached: Any = grpc.unary_unary_rpc_method_handler(print)

    async def let_in(*metadata: tuple[str, str | bytes]) -> bool:
        async def reach(_: grpc.HandlerCallDetails) -> Any:
            return reached

        return await TokenAuth(file).intercept_service(reach, Details(*metadata)) is reached

    token = f"Bearer {ADA}"
    assert await let_in(("Authorization", token))
    assert await let_in(("AUTHORIZATION", token.encode()))
    assert not await let_in(("authorization", token), ("Authorization", token))
    assert not await let_in(("Authorization", "Bearer wrong"), ("authorization", token))


def _methods() -> list[str]:
    """Every method of every service but health, and some that there are not."""
    services = [
        *Flight_pb2.DESCRIPTOR.services_by_name.values(),
        *worker_pb2.DESCRIPTOR.services_by_name.values(),
        *observability_pb2.DESCRIPTOR.services_by_name.values(),
        *reflection_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    methods = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    assert len(methods) > 14
    return [
        *methods,
        "/arrow.flight.protocol.FlightService/Nothing",
        "/nothing.Nothing/Nothing",
        "/grpc.health.v1.HealthAndMore/Check",
        "grpc.health.v1.Health/Check",
        "/Grpc.health.v1.Health/Check",
    ]


async def test_every_method_needs_a_token_and_none_is_called_without(settings: Settings) -> None:
    async with running_worker(settings=settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        for method in _methods():
            calls: list[Any] = [channel.stream_stream(method), channel.unary_unary(method)]
            for call, request in zip(calls, (iter([b""]), b""), strict=True):
                code, _ = await status(call(request))
                assert code is REFUSED, method
        assert running.worker.statistics().requests == 0


async def test_health_needs_none_and_nothing_else_is_open(settings: Settings) -> None:
    async with running_worker(settings=settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_what_comes_with_a_request_for_health_is_not_read_where_tokens_are_asked_for(
    method: str, settings: Settings
) -> None:
    """Whoever has none could send large messages, never quite to their ends, and have them kept."""
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    async with running_worker(settings=settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        call: Any = channel.stream_stream(f"/grpc.health.v1.Health/{method}")(nothing(), timeout=30)
        answer = health_pb2.HealthCheckResponse.FromString(await call.read())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_watches_of_health_are_no_more_than_so_many(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_WATCHES", 2)
    async with running_worker(settings=settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches: Any = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await status(health.Watch(health_pb2.HealthCheckRequest())))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()


async def test_reflection_answers_whoever_has_a_token_unless_it_is_off(settings: Settings) -> None:
    for on in (True, False):
        async with (
            running_worker(settings=settings.model_copy(update={"reflection": on})) as running,
            grpc.aio.insecure_channel(running.address) as channel,
        ):
            asked: Any = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            call: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                asked, metadata=bearer(ADA)
            )
            code, _ = await status(call)
            assert code is (grpc.StatusCode.OK if on else grpc.StatusCode.UNIMPLEMENTED)


async def test_who_has_no_token_is_refused_before_what_they_send_is_read(settings: Settings) -> None:
    """Its metadata comes, and no message ever does."""
    async with running_worker(settings=settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        open_ended: Any = channel.stream_stream("/arrow.flight.protocol.FlightService/DoGet")
        code, _ = await asyncio.wait_for(status(open_ended(metadata=bearer("somebody-elses-token"))), 30)
        assert code is REFUSED


async def test_the_name_of_a_token_is_the_principal_and_a_builder_sees_it(settings: Settings) -> None:
    seen: list[str] = []

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append(ctx.principal)
        return ctx.builder.build()

    session = SessionContext(SessionConfig().with_target_partitions(2))
    two = session.sql("select 1 union all select 2").execution_plan()
    key = stage_key()
    decoded = []
    async with running_worker(build, settings=settings) as running, stub(running.address) as service:
        for partition, token in ((0, ADA), (1, ADA), (0, GRACE), (1, NAMELESS)):
            ticket = Flight_pb2.Ticket(ticket=do_get(two.to_bytes(), partition, key))
            assert await status(service.DoGet(ticket, metadata=bearer(token))) == OK
            decoded.append(running.worker.statistics().plans_decoded)
    assert decoded == [1, 1, 2, 3]
    assert seen[:3] == ["ada", "ada", "grace"]
    assert seen[3] not in ("", "ada", "grace", NAMELESS)


async def test_a_file_that_changes_counts_within_a_second_and_one_of_no_use_does_not(
    file: Path, settings: Settings, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """
    1. A token is taken away, another is there.
    2. The file has no token, or is gone: the former ones stay in force.
    """
    new, write = "the-new-token-of-ada", file.write_text
    async with running_worker(settings=settings) as running:

        async def until_answered(token: str, expected: grpc.StatusCode) -> None:
            async with asyncio.timeout(30):
                while (await answer(running, plan, bearer(token)))[0] is not expected:
                    await asyncio.sleep(0.05)

        assert await answer(running, plan, bearer(ADA)) == OK
        write(f"ada:{new}\n")
        await until_answered(new, grpc.StatusCode.OK)
        assert (await answer(running, plan, bearer(ADA)))[0] is REFUSED

        for spoil in (lambda: write("# nobody\n"), file.unlink):
            caplog.clear()
            spoil()
            async with asyncio.timeout(30):
                while "the former tokens stay in force" not in caplog.text:
                    assert await answer(running, plan, bearer(new)) == OK
                    await asyncio.sleep(0.05)
            assert await answer(running, plan, bearer(new)) == OK
        assert str(file) in caplog.text
        assert new not in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no token"),
        ("# nothing\n\n", "has no token"),
        ("ada:short\n", "line 1 of .* is not"),
        (f"{ADA}\n:{ADA}\n", "line 2 of .* is not"),
        (f"ada: Bearer {ADA}", "line 1 of .* is not"),
        (f"ada:{ADA} # hers", "line 1 of .* is not"),
        (f"ada:{ADA}\ngrace:{ADA}", "line 2 of .* is there already"),
        ("\0" * 20, "line 1 of .* is not"),
        ("ä" * 20, "line 1 of .* is not"),
        ("\n".join(f"token-number-{number:06}" for number in range(auth.MAX_TOKENS + 1)), "1000 are the most"),
    ],
)
def test_a_file_of_no_use_is_refused_by_its_line_and_not_by_what_it_says(text: str, said: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(UnfitSettings, match=said) as refused:
        TokenAuth(file)
    assert str(file) in str(refused.value)
    assert ADA not in str(refused.value)


async def test_a_mark_of_the_byte_order_is_no_part_of_a_name(file: Path, settings: Settings, plan: bytes) -> None:
    """Some editors put one in front."""
    seen: list[str] = []
    write = file.write_text

    async def build(ctx: WorkerQueryContext) -> SessionContext:
        seen.append(ctx.principal)
        return ctx.builder.build()

    write(f"ada:{ADA}", encoding="utf-8-sig")
    async with running_worker(build, settings=settings) as running:
        assert await answer(running, plan, bearer(ADA)) == OK
    assert seen == ["ada"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokens"):
        TokenAuth(tmp_path / "tokens")


async def test_a_server_of_ones_own_takes_it_as_an_interceptor(file: Path, plan: bytes) -> None:
    async with worker.Worker() as servicer:
        server = grpc.aio.server(interceptors=[TokenAuth(str(file))], options=worker.server_options())
        Flight_pb2_grpc.add_FlightServiceServicer_to_server(servicer, server)
        running = RunningWorker(servicer, f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        try:
            assert await answer(running, plan, bearer(ADA)) == OK
            assert (await answer(running, plan))[0] is REFUSED
        finally:
            await server.stop(None)


async def test_no_token_is_in_what_a_process_says_whatever_fails(file: Path, tmp_path: Path) -> None:
    """With all that can be logged: refusals, a builder that raises, plans that fail or are none."""
    (tmp_path / "mine.py").write_text(
        "async def build_state(ctx):\n"
        "    if 'x-fail' in ctx.headers:\n"
        "        raise ValueError(f'no session for {ctx.headers!r} {ctx!r}')\n"
        "    return ctx.builder.build()\n"
    )
    failing = SessionContext().sql("select 1 / (value - 5) from range(0, 10)").execution_plan().to_bytes()
    arguments = ("--port", "0", "--log-level", "debug", "--session-builder", "mine:build_state")
    told = []
    async with (
        listening("-m", "worker", *arguments, "--auth-token-file", str(file), folder=tmp_path) as (process, url),
        WorkerClient(url) as client,
    ):
        for plan, metadata in (
            (failing, bearer(ADA)),
            (failing, [*bearer(ADA), ("x-fail", "1")]),
            (b"\xff" * 20, bearer(ADA)),
            (failing, bearer(GRACE[:-1])),
            (failing, bearer(ADA) + bearer(GRACE)),
            (failing, [("authorization", ADA)]),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async for _ in client.execute(plan, 0, headers=metadata):
                    pass
            told.append(error.value.details() or "")
        process.terminate()
        assert process.stdout is not None
        assert process.stderr is not None
        output = (await process.stdout.read() + await process.stderr.read()).decode()
    assert "no session for" in output
    assert not [text for text in (output, *told) if ADA in text or GRACE[:-1] in text or NAMELESS in text]
