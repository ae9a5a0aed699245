"""Channels to other workers: one for each URL, which has to be one of a worker."""

from urllib.parse import unquote

import grpc
import pytest
from support import status

from worker.cluster.channels import Channels
from worker.errors import InvalidPlan
from worker.proto import worker_pb2, worker_pb2_grpc
from worker.testing import RunningWorker, running_worker


async def version(channel: grpc.aio.Channel) -> str:
    answer = await worker_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    return answer.version


def urls(running: RunningWorker) -> list[str]:
    port = running.address.rpartition(":")[2]
    return [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/", f"HTTP://localhost:{port}"]


async def test_there_is_one_for_each_url_which_is_kept() -> None:
    channels = Channels()
    async with running_worker() as one, running_worker() as other:
        one.worker.with_version("one")
        other.worker.with_version("other")
        for running, expected in ((one, "one"), (other, "other")):
            for url in urls(running):
                assert channels.to(url) is channels.to(url)
                assert await version(channels.to(url)) == expected
        await channels.close()


async def test_one_that_was_closed_is_opened_anew() -> None:
    channels = Channels()
    async with running_worker() as running:
        url = urls(running)[0]
        first = channels.to(url)
        assert await version(first) == ""
        await channels.close()
        assert channels.to(url) is not first
        assert await version(channels.to(url)) == ""
        await channels.close()


async def test_https_is_not_served_by_a_worker_without_it() -> None:
    channels = Channels()
    async with running_worker() as running:
        channel = channels.to(f"https://{running.address}")
        call = worker_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        code, _ = await status(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        await channels.close()


async def test_an_address_of_ipv6_is_one() -> None:
    channels = Channels()
    call = worker_pb2_grpc.WorkerServiceStub(channels.to("http://[::1]:1")).GetWorkerInfo(
        worker_pb2.GetWorkerInfoRequest()
    )
    code, text = await status(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "[::1]:1:" in unquote(text)
    await channels.close()


@pytest.mark.parametrize(
    "url", ["", "worker", "worker:8000", "grpc://worker:8000", "http://", "http://:8000", "http://worker:x", "http://["]
)
async def test_what_is_no_url_of_a_worker_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidPlan) as raised:
        Channels().to(url)
    assert repr(url) in str(raised.value)
