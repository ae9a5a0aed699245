"""`examples/s3_by_header.py` in a worker process, against an S3 server that checks signatures and rights."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import SessionConfig, SessionContext
from datafusion.object_store import AmazonS3
from pyarrow import flight
from support import EXAMPLES, listening

from worker import StageKey, plan_ticket
from worker.client import WorkerClient

REGION = "eu-central-1"
FILE = "sales/2024.parquet"
SALES = {"acme": [1, 2, 3], "umbrella": [10, 20, 30, 40]}

# Ends with its parent: its standard input does.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Tenant:
    bucket: str
    access_key_id: str
    secret_access_key: str


@dataclass(frozen=True)
class Stores:
    """An S3 server with a bucket for every tenant, which nobody but that tenant's user may touch."""

    endpoint: str
    tenants: Mapping[str, Tenant]

    def plan(self, tenant: str, sql: str = "select amount from sales order by amount") -> bytes:
        """A query over the tenant's file, planned with the tenant's own rights."""
        owner = self.tenants[tenant]
        session = SessionContext(SessionConfig().with_target_partitions(2))
        store = AmazonS3(
            bucket_name=owner.bucket,
            region=REGION,
            access_key_id=owner.access_key_id,
            secret_access_key=owner.secret_access_key,
            endpoint=self.endpoint,
            allow_http=True,
        )
        session.register_object_store("s3://", store, owner.bucket)
        session.register_parquet("sales", f"s3://{owner.bucket}/{FILE}")
        return session.sql(sql).execution_plan().to_bytes()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    log = tmp_path_factory.mktemp("s3") / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        endpoint = server.stdout.readline().strip()
        assert endpoint, log.read_text()
        yield Stores(endpoint, {name: _add_tenant(endpoint, name, amounts) for name, amounts in SALES.items()})
        server.stdin.close()


def _add_tenant(endpoint: str, name: str, amounts: list[int]) -> Tenant:
    """A bucket, a file in it, and a user who may use that bucket."""
    bucket = f"{name}-data"
    file = BytesIO()
    pq.write_table(pa.table({"amount": amounts}), file, row_group_size=2)
    _check_rights(endpoint, from_now_on=False)
    with (
        closing(boto3.client("s3", **_administrator(endpoint))) as s3,
        closing(boto3.client("iam", **_administrator(endpoint))) as iam,
    ):
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
        s3.put_object(Bucket=bucket, Key=FILE, Body=file.getvalue())
        iam.create_user(UserName=name)
        allowed = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
        statement = {"Effect": "Allow", "Action": "s3:*", "Resource": allowed}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
    _check_rights(endpoint, from_now_on=True)
    return Tenant(bucket, key["AccessKeyId"], key["SecretAccessKey"])


def _administrator(endpoint: str) -> dict[str, Any]:
    key = {"aws_access_key_id": "administrator", "aws_secret_access_key": "unchecked"}
    return {"endpoint_url": endpoint, "region_name": REGION, **key}


def _check_rights(endpoint: str, *, from_now_on: bool) -> None:
    """The server checks nothing of the next so many requests."""
    unchecked = b"0" if from_now_on else b"inf"
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", unchecked, {"Content-Type": "text/plain"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


@pytest.fixture
async def worker(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The URL of a worker for the two tenants, and for a third one, a spy: umbrella's keys for acme's bucket."""
    acme, umbrella = stores.tenants["acme"], stores.tenants["umbrella"]
    spy = Tenant(acme.bucket, umbrella.access_key_id, umbrella.secret_access_key)
    lines = []
    for name, tenant in {**stores.tenants, "spy": spy}.items():
        settings = {**vars(tenant), "region": REGION, "endpoint": stores.endpoint}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("\n".join(lines))
    monkeypatch.setenv("S3_TENANTS", str(tenants))
    # What a store would fall back on that is given no keys of its own.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", acme.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", acme.secret_access_key)
    command = ["-m", "worker", "--port", "0", "--session-builder", "s3_by_header:build_state"]
    async with listening(*command, folder=EXAMPLES) as (_, url):
        yield url


async def amounts_of(url: str, plan: bytes, *headers: tuple[str, str]) -> list[int]:
    async with WorkerClient(url, headers=headers) as client:
        return [amount async for batch in client.execute(plan) for amount in batch["amount"].to_pylist()]


async def refusal(url: str, plan: bytes, *headers: tuple[str, str]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await amounts_of(url, plan, *headers)
    return refused.value.code(), refused.value.details() or ""


async def test_every_tenant_reads_its_own_bucket(stores: Stores, worker: str) -> None:
    for tenant, amounts in SALES.items():
        assert await amounts_of(worker, stores.plan(tenant), ("x-tenant", tenant)) == amounts


async def test_a_tenants_store_is_invisible_to_the_next_request(stores: Stores, worker: str) -> None:
    plan = stores.plan("acme")
    for _ in range(2):
        assert await amounts_of(worker, plan, ("x-tenant", "acme")) == SALES["acme"]
        code, details = await refusal(worker, plan, ("x-tenant", "umbrella"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "no object store for 's3://acme-data'" in details


async def test_a_tenants_store_is_invisible_to_a_request_that_runs_beside_it_with_its_stage_key(
    stores: Stores, worker: str
) -> None:
    """
    1. Of a plan with two partitions, acme reads one to its end, so that the task waits for the other.
    2. Umbrella asks for the other, with acme's very ticket: no such store.
    3. Acme gets it.
    """
    plan = stores.plan("acme", "select amount from sales union all select amount from sales")
    key = StageKey.unique()
    with flight.connect(worker) as client:

        def read(partition: int, tenant: str) -> list[int]:
            options = flight.FlightCallOptions(headers=[(b"x-tenant", tenant.encode())])
            table = client.do_get(flight.Ticket(plan_ticket(plan, partition, key)), options).read_all()
            amounts: list[int] = table["amount"].to_pylist()
            return amounts

        assert await asyncio.to_thread(read, 0, "acme") == SALES["acme"]
        with pytest.raises(pa.ArrowInvalid, match="no object store for 's3://acme-data'"):
            await asyncio.to_thread(read, 1, "umbrella")
        assert await asyncio.to_thread(read, 1, "acme") == SALES["acme"]


async def test_the_right_bucket_with_anothers_keys_has_no_rows_not_even_those_just_read(
    stores: Stores, worker: str
) -> None:
    plan = stores.plan("acme")
    assert await amounts_of(worker, plan, ("x-tenant", "acme")) == SALES["acme"]
    code, details = await refusal(worker, plan, ("x-tenant", "spy"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "403 Forbidden" in details
    for tenant in stores.tenants.values():
        assert tenant.secret_access_key not in details


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ([("x-tenant", "nobody")], grpc.StatusCode.PERMISSION_DENIED, "there is no tenant 'nobody'"),
        ([], grpc.StatusCode.PERMISSION_DENIED, "there is no tenant ''"),
        ([("x-tenant", "acme"), ("x-tenant", "spy")], grpc.StatusCode.INVALID_ARGUMENT, "was sent 2 times"),
    ],
)
async def test_a_request_that_names_no_tenant_is_refused(
    headers: list[tuple[str, str]], status: grpc.StatusCode, text: str, stores: Stores, worker: str
) -> None:
    code, details = await refusal(worker, stores.plan("acme"), *headers)
    assert code is status
    assert text in details


def test_tables_that_name_no_keys_stop_the_worker_before_the_port_opens(tmp_path: Path) -> None:
    (tmp_path / "tenants.toml").write_text('[acme]\nbucket = "acme-data"\nregion = "eu-central-1"\n')
    command = [sys.executable, "-m", "worker", "--port", "0", "--session-builder", "s3_by_header:build_state"]
    environment = {"S3_TENANTS": str(tmp_path / "tenants.toml")}
    ended = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "secret_access_key" in ended.stderr
