"""The table of statuses in the docs, against the errors that there are; and what is refused before any handler."""

import inspect
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import status

from worker import errors
from worker.cluster import observability
from worker.cluster import service as cluster
from worker.proto import Flight_pb2
from worker.service import SERVICE
from worker.testing import running_worker

STATUSES = (Path(__file__).parent.parent / "docs" / "statuses.md").read_text()
ERRORS = {
    name: error for name, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, errors.WorkerError)
}
ROWS: list[tuple[str, str, str, str]] = re.findall(
    r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*?) ?\|$", STATUSES, re.MULTILINE
)


def test_every_error_is_in_the_table_once() -> None:
    assert sorted(name for name, _, _, _ in ROWS) == sorted(ERRORS)


@pytest.mark.parametrize(("name", "status", "when", "retry"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_row_has_the_errors_status_and_says_when_it_comes_and_whether_to_retry(
    name: str, status: str, when: str, retry: str
) -> None:
    if name == "UpstreamFailed":
        assert status == "that of the upstream"
    else:
        assert status == ERRORS[name].status.name
    assert when
    assert retry or name == "WorkerError"


async def test_a_request_that_is_no_protobuf_is_the_clients_mistake() -> None:
    methods = {
        f"/{SERVICE}/": ("DoGet", "GetFlightInfo", "GetSchema", "DoAction", "ListFlights"),
        f"/{cluster.SERVICE}/": ("ExecuteTask", "GetWorkerInfo"),
        f"/{observability.SERVICE}/": ("Ping", "GetClusterWorkers"),
    }
    async with running_worker() as running, grpc.aio.insecure_channel(running.address) as channel:
        for service, names in methods.items():
            for name in names:
                is_stream = name in {"DoGet", "DoAction", "ListFlights", "ExecuteTask"}
                call: Any = (channel.unary_stream if is_stream else channel.unary_unary)(service + name)
                code, details = await status(call(b"\xff\xff\xff"))
                assert code is grpc.StatusCode.INVALID_ARGUMENT, name
                assert details.startswith("the request cannot be read: Error parsing message"), name
        # Those that are protobuf come to their handlers.
        call = channel.unary_unary(f"/{SERVICE}/GetSchema")
        descriptor = Flight_pb2.FlightDescriptor(path=["x"], type=Flight_pb2.FlightDescriptor.PATH)
        assert (await status(call(descriptor.SerializeToString())))[1].startswith("the descriptor is not a command")
