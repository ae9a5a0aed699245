"""How many bytes either server sends for a result, counted as they come out of gRPC."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from benchmarks.plans import Case
from benchmarks.report import MEGABYTE, holds, print_table
from benchmarks.servers import Server
from worker import plan_ticket
from worker.proto import Flight_pb2

DoGet: TypeAlias = "grpc.UnaryStreamMultiCallable[bytes, bytes]"

MOST_TO_FLIGHT = 1.05
# What clients of gRPC accept unless they are told otherwise.
LARGEST = 4 << 20
# gRPC puts a flag and a length before each message.
PREFIX_BYTES = 5


@dataclass(frozen=True)
class Sent:
    size: int
    messages: int
    largest: int


@contextmanager
def do_get(server: Server) -> Iterator[DoGet]:
    """``DoGet`` with messages as the bytes that they are."""
    address, options = server.url.removeprefix("grpc://"), [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:
        yield channel.unary_stream("/arrow.flight.protocol.FlightService/DoGet")


def request(plan: bytes, partition: int = 0) -> bytes:
    """What ``DoGet`` is sent."""
    return Flight_pb2.Ticket(ticket=plan_ticket(plan, partition)).SerializeToString()


def print_wire(cases: list[Case], worker: Server, other: Server) -> None:
    with do_get(worker) as from_worker, do_get(other) as from_other:
        print_table(
            f"Bytes on the wire; at most {MOST_TO_FLIGHT} of pyarrow.flight's, and messages of at most 4 MiB",
            (
                "result",
                "worker MB",
                "flight MB",
                "ratio",
                "holds",
                "messages",
                "flight's",
                "largest",
                "flight's",
                "holds",
            ),
            [_row(case, _sent(from_worker, case), _sent(from_other, case)) for case in cases],
        )


def _row(case: Case, worker: Sent, other: Sent) -> tuple[str, ...]:
    ratio = worker.size / other.size
    return (
        case.name,
        *(f"{sent.size / MEGABYTE:.1f}" for sent in (worker, other)),
        f"{ratio:.3f}",
        holds(ratio <= MOST_TO_FLIGHT and worker.size <= case.most),
        *(str(sent.messages) for sent in (worker, other)),
        *(f"{sent.largest:,}" for sent in (worker, other)),
        holds(worker.largest <= LARGEST),
    )


def _sent(do_get: DoGet, case: Case) -> Sent:
    sizes = [len(message) for partition in range(case.partitions) for message in do_get(request(case.plan, partition))]
    return Sent(sum(sizes) + PREFIX_BYTES * len(sizes), len(sizes), max(sizes))
