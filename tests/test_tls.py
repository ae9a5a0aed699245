"""TLS and certificates of clients, from files that change while the worker runs."""

import asyncio
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from certificates import Authority, Pair
from datafusion import SessionContext
from pyarrow import flight
from support import do_get, in_threads, listening, stage_key, status
from test_client import command
from test_interop import CHECKERS, check_folder, ipc
from test_probe import probe
from test_worker_network import shuffle
from worker_service import Metadata, execute_request, plan_of, task_key

from worker import Settings, UnfitSettings
from worker.client import WorkerClient
from worker.cluster.channels import Channels
from worker.proto import Flight_pb2, Flight_pb2_grpc, worker_pb2, worker_pb2_grpc
from worker.testing import RunningWorker, running_worker
from worker.tls import Certificates

ROWS = {"one": [1]}


class Files:
    """A folder with the worker's certificate, its key, and who vouches for clients, each of an authority of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.renew()

    def renew(self) -> None:
        """Writes files of new authorities, over those that are there."""
        self.authority, self.clients = Authority(), Authority()
        self.cert, self.key = self.authority.issue("worker").write(self.folder, "worker")
        self.client_ca = self.folder / "clients.pem"
        self.client_ca.write_bytes(self.clients.pem)

    def spoil(self, name: str) -> Path:
        """Writes what is not PEM over one of them."""
        path: Path = getattr(self, name)
        path.write_bytes(b"nothing")
        return path

    def settings(self, *, mutual: bool = False, **others: Any) -> Settings:
        return Settings(
            tls_cert=self.cert, tls_key=self.key, tls_client_ca=self.client_ca if mutual else None, **others
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    folder = tmp_path / "tls"
    folder.mkdir()
    return Files(folder)


@pytest.fixture
def plan() -> bytes:
    return SessionContext().sql("select 1 as one").execution_plan().to_bytes()


async def rows(running: RunningWorker, plan: bytes, ca: Authority, client: Pair | None = None) -> Any:
    """What ``pyarrow.flight`` reads over a connection of its own."""

    def read() -> pa.Table:
        shown = {"cert_chain": client.cert, "private_key": client.key} if client else {}
        # Without it, the connection of an earlier client of this process would be used.
        options = [("grpc.use_local_subchannel_pool", 1)]
        with flight.connect(running.url, tls_root_certs=ca.pem, generic_options=options, **shown) as connection:
            return connection.do_get(flight.Ticket(do_get(plan)), flight.FlightCallOptions(timeout=30)).read_all()

    (table,) = await in_threads([read])
    return table.to_pydict()


async def test_flight_reads_through_tls_and_nobody_without_it(files: Files, plan: bytes) -> None:
    async with running_worker(settings=files.settings()) as running:
        assert running.url == f"grpc+tls://{running.address}"
        assert await rows(running, plan, files.authority) == ROWS
        with pytest.raises(flight.FlightUnavailableError):
            await rows(running, plan, Authority())
        async with WorkerClient(f"grpc://{running.address}") as client:
            with pytest.raises(grpc.aio.AioRpcError) as plain:
                await client.schema(plan)
        assert plain.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_clients_have_to_show_a_certificate_that_is_vouched_for(files: Files, plan: bytes) -> None:
    async with running_worker(settings=files.settings(mutual=True)) as running:
        assert await rows(running, plan, files.authority, files.clients.issue("ada")) == ROWS
        for refused in (None, files.authority.issue("ada"), Authority().issue("ada")):
            with pytest.raises(flight.FlightUnavailableError):
                await rows(running, plan, files.authority, refused)


@pytest.mark.parametrize("mutual", [False, True])
async def test_new_files_count_from_the_next_connection_on_and_what_is_under_way_goes_on(
    mutual: bool, files: Files, plan: bytes
) -> None:
    """
    1. A stream is under way, its reader waits.
    2. The files change, to those of other authorities.
    3. New connections are of the new ones; the reader goes on over the old one.
    """
    large = SessionContext().sql("select value from range(0, 3000000)").execution_plan()
    async with running_worker(settings=files.settings(mutual=mutual)) as running:
        former, client = files.authority, files.clients.issue("ada") if mutual else None
        async with _client(running, former, client) as reader:
            batches = reader.execute(large, 0)
            read = (await anext(batches)).num_rows
            files.renew()
            with pytest.raises(flight.FlightUnavailableError):
                await rows(running, plan, former, client)
            if mutual:
                with pytest.raises(flight.FlightUnavailableError):
                    await rows(running, plan, files.authority, client)
                client = files.clients.issue("ada")
            assert await rows(running, plan, files.authority, client) == ROWS
            assert read + sum([batch.num_rows async for batch in batches]) == 3_000_000


@pytest.mark.parametrize("broken", ["certificate", "key", "clients", "gone"])
async def test_files_that_are_of_no_use_leave_the_former_in_force_and_the_log_says_so_once(
    broken: str, files: Files, plan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_worker(settings=files.settings(mutual=True)) as running:
        former, client = files.authority, files.clients.issue("ada")
        other = former.issue("worker")
        match broken:
            case "certificate":
                files.cert.write_bytes(other.cert[:100])
            case "key":
                files.key.write_bytes(other.key)
            case "clients":
                files.client_ca.write_bytes(b"nothing")
            case "gone":
                files.cert.unlink()
        for _ in range(2):
            assert await rows(running, plan, former, client) == ROWS
        (warning,) = [text for text in caplog.messages if "the former certificates stay in force" in text]
        assert str(files.folder) in warning

        files.renew()
        assert await rows(running, plan, files.authority, files.clients.issue("ada")) == ROWS
        assert "new certificates are in force" in caplog.text
    assert "PRIVATE" not in caplog.text


def _client(running: RunningWorker, ca: Authority, shown: Pair | None = None) -> WorkerClient:
    return WorkerClient(
        running.url,
        tls_root_certs=ca.pem,
        cert_chain=shown.cert if shown else None,
        private_key=shown.key if shown else None,
    )


def _channel(running: RunningWorker, ca: Authority, shown: Pair) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(running.address, grpc.ssl_channel_credentials(ca.pem, shown.key, shown.cert))


async def test_a_certificate_is_the_principal_of_who_shows_it(files: Files, plan: bytes) -> None:
    """Two of one name are the same caller's; whoever has another neither finds their task, nor shares it."""
    two_partitions = SessionContext().sql("select 1 union all select 2").execution_plan()
    assert two_partitions.partition_count > 1
    key = stage_key()
    async with running_worker(settings=files.settings(mutual=True)) as running:
        decoded = []
        for partition, name in ((0, "ada"), (1, "ada"), (0, "grace")):
            async with _channel(running, files.authority, files.clients.issue(name)) as channel:
                ticket = Flight_pb2.Ticket(ticket=do_get(two_partitions.to_bytes(), partition, key))
                answer = await status(Flight_pb2_grpc.FlightServiceStub(channel).DoGet(ticket))
                assert answer == (grpc.StatusCode.OK, "")
            decoded.append(running.worker.statistics().plans_decoded)
    assert decoded == [1, 1, 2]


@pytest.mark.parametrize("metadata", [[], [("authorization", "Bearer of-the-coordinator")]])
async def test_workers_show_each_other_their_certificates(metadata: Metadata, files: Files, tmp_path: Path) -> None:
    """A coordinator sets a task on one worker and another that reads it, and reads that; each has its own certificate.

    The client authority vouches for the workers too, as they all are clients of each other.
    """
    settings = []
    for number in range(2):
        cert, key = files.clients.issue("worker").write(tmp_path, f"worker-{number}")
        settings.append(Settings(tls_cert=cert, tls_key=key, tls_client_ca=files.client_ca))
    coordinator, query = files.clients.issue("coordinator"), task_key().query_id
    async with (
        running_worker(settings=settings[0]) as source,
        running_worker(settings=settings[1]) as reader,
        _channel(source, files.clients, coordinator) as to_source,
        _channel(reader, files.clients, coordinator) as to_reader,
    ):
        first = await _set(to_source, task_key(0, query), plan_of([1, 2]), metadata)
        plan = shuffle(1, [f"https://{source.address}"], query).SerializeToString()
        reading = task_key()
        second = await _set(to_reader, reading, plan, metadata)
        request = execute_request(reading, range(1))
        read = worker_pb2_grpc.WorkerServiceStub(to_reader).ExecuteTask(request, metadata=metadata)
        assert len([data async for data in read]) == 2
        assert source.worker.statistics().bytes_sent > 0
        first.cancel()
        second.cancel()


async def _set(channel: grpc.aio.Channel, key: worker_pb2.TaskKey, plan: bytes, metadata: Metadata) -> Any:
    request = worker_pb2.SetPlanRequest(task_key=key, task_count=1, plan_proto=plan)
    call = worker_pb2_grpc.WorkerServiceStub(channel).CoordinatorChannel(metadata=metadata)
    await call.write(worker_pb2.CoordinatorToWorkerMsg(set_plan_request=request))
    return call


async def test_channels_to_other_workers_are_new_when_the_files_are(files: Files) -> None:
    files.client_ca.write_bytes(files.authority.pem)
    certificates = Certificates(files.cert, files.key, files.client_ca)
    channels = Channels()
    channels.credentials = certificates.channel_credentials
    async with running_worker(settings=files.settings(mutual=True)) as running:
        url = f"https://{running.address}"
        async with channels.to(url) as first:
            assert (await _version(first)).version == ""
            async with channels.to(url) as again:
                assert again is first
            files.renew()
            files.client_ca.write_bytes(files.authority.pem)
            async with channels.to(url) as second:
                assert second is not first
                await _version(second)
            # Whoever uses it still has it.
            await _version(first)
        await _is_closed(first)
        async with channels.to(url) as third:
            assert third is second
        files.renew()
        files.client_ca.write_bytes(files.authority.pem)
        async with channels.to(url) as fourth:
            await _version(fourth)
            await _is_closed(second)
        await channels.close()


async def _is_closed(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.UsageError, match="closed"):
        await _version(channel)


async def _version(channel: grpc.aio.Channel) -> worker_pb2.GetWorkerInfoResponse:
    request = worker_pb2.GetWorkerInfoRequest()
    return await worker_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(request, timeout=30)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["tls_cert"], "--tls-cert .* add --tls-key"),
        (["tls_key"], "--tls-key is for TLS, .* add --tls-cert"),
        (["tls_client_ca"], "--tls-client-ca is for TLS, .* add --tls-cert"),
    ],
)
async def test_what_lacks_its_counterpart_is_refused(names: list[str], text: str, files: Files) -> None:
    settings = files.settings(mutual=True).model_dump(include=set(names))
    with pytest.raises(UnfitSettings, match=text):
        async with running_worker(settings=Settings(**settings)):
            pass


@pytest.mark.parametrize("broken", ["cert", "key", "client_ca"])
async def test_files_that_are_of_no_use_are_refused_at_start_by_their_names(broken: str, files: Files) -> None:
    path = files.spoil(broken)
    with pytest.raises(UnfitSettings, match=str(path)):
        async with running_worker(settings=files.settings(mutual=True)):
            pass


async def test_a_key_that_is_encrypted_is_refused_and_no_password_asked_for(files: Files) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    with pytest.raises(UnfitSettings, match="not encrypted"):
        async with running_worker(settings=files.settings()):
            pass


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("grpc://127.0.0.1:1", {"tls_root_certs": b""" """}, "not of TLS"),
        ("grpc+tls://127.0.0.1:1", {"cert_chain": b" "}, "go together"),
        ("grpc+tls://127.0.0.1:1", {"private_key": b" "}, "go together"),
    ],
)
async def test_a_clients_certificates_must_go_with_its_url(url: str, options: dict[str, bytes], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        WorkerClient(url, **options)  # type: ignore[arg-type]


async def test_the_commands_speak_tls(files: Files, tmp_path: Path) -> None:
    """The worker, its client and its probe, which has the worker's own certificate for all that it needs."""
    files.client_ca.write_bytes(files.authority.pem)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(files.authority.pem)
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    arguments = ("-m", "worker", "--port", "0", *tls, "--tls-client-ca", str(files.client_ca))
    async with listening(*arguments) as (process, url):
        address = url.removeprefix("grpc+tls://")
        assert address != url
        # Whoever speaks no TLS gets no answer, and no line of gRPC's own in the log.
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.read()
        writer.close()
        (code, output, errors), answer = await asyncio.gather(
            command(url, "--tls-ca", str(ca), *tls, "SELECT 42 AS answer"),
            probe(address, WORKER_TLS_CERT=str(files.cert), WORKER_TLS_KEY=str(files.key)),
        )
        assert (code, errors) == (0, "")
        assert "42" in output
        assert answer == (0, "")
        process.terminate()
        assert process.stderr is not None
        lines = (await process.stderr.read()).decode().splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\dT\S+ INFO ", line) for line in lines), lines
        assert " tls=mutual tokens=no session_builder=no files=any writes=no" in lines[0]


@pytest.mark.parametrize("client", CHECKERS)
async def test_a_checker_reads_through_tls(client: str, files: Files, plan: bytes, tmp_path: Path) -> None:
    """With and without a certificate of its own, before the files change and after."""
    (tmp_path / "one.ticket").write_bytes(do_get(plan))
    table = pa.table(ROWS, pa.schema([pa.field("one", pa.int64(), nullable=False)]))
    (tmp_path / "one.arrow").write_bytes(ipc(table.schema, table.to_batches()))

    def pems(mutual: bool) -> Iterator[Path]:
        (tmp_path / "ca.pem").write_bytes(files.authority.pem)
        yield tmp_path / "ca.pem"
        if mutual:
            yield from files.clients.issue("ada").write(tmp_path, "ada")

    for mutual in (False, True):
        async with running_worker(settings=files.settings(mutual=mutual)) as running:
            for _ in range(2):
                shown = list(pems(mutual))
                assert await check_folder(client, running.url, tmp_path, *shown) == ["ok one"]
                if mutual:
                    assert (await check_folder(client, running.url, tmp_path, *shown[:1]))[0].startswith("FAIL")
                files.renew()
                assert (await check_folder(client, running.url, tmp_path, *shown))[0].startswith("FAIL")


def test_a_settings_file_is_named_where_it_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tls_cert\n"):
        Settings(tls_cert=tmp_path / "none", tls_key=Path(os.devnull))
