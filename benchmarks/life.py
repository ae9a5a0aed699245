"""What a stream costs beside its rows: from outside, and in the pieces that the worker's time is made of."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from statistics import median

from benchmarks.report import print_table
from benchmarks.servers import Server
from benchmarks.wire import LARGEST, DoGet, do_get, request
from worker import PlanTicket, SessionStateBuilder, plan, plan_ticket
from worker.config import PlanLimits
from worker.encoding import flight_data
from worker.encoding.encode import Encoder
from worker.partitionwise import make_partitions_independent


def print_life(plans: dict[str, bytes], worker: Server, other: Server, helper: Executor, requests: int) -> None:
    lives = {name: helper.submit(_lives, plan_ticket(each), requests).result() for name, each in plans.items()}
    print_table(
        f"A stream's life in process, by the worker's functions: ms, medians of {requests}",
        ("plan", *next(iter(lives.values()))),
        [(name, *(f"{milliseconds:.3f}" for milliseconds in life.values())) for name, life in lives.items()],
    )
    with do_get(worker) as from_worker, do_get(other) as from_other:
        seen = {name: _seen_outside((from_worker, from_other), request(each), requests) for name, each in plans.items()}
    print_table(
        f"The same seen by a client: ms, medians of {requests} in turns",
        ("plan", "worker's first byte", "last byte", "flight's first byte", "last byte"),
        [(name, *(f"{milliseconds:.2f}" for milliseconds in times)) for name, times in seen.items()],
    )


def _seen_outside(servers: tuple[DoGet, DoGet], ticket: bytes, requests: int) -> list[float]:
    times = [[time for server in servers for time in _first_and_last(server, ticket)] for _ in range(requests + 1)]
    return [median(column) for column in zip(*times[1:], strict=True)]


def _first_and_last(server: DoGet, ticket: bytes) -> tuple[float, float]:
    start = time.perf_counter()
    messages = server(ticket)
    next(messages)
    first = time.perf_counter()
    for _message in messages:
        pass
    return (first - start) * 1000, (time.perf_counter() - start) * 1000


def _lives(ticket: bytes, requests: int) -> dict[str, float]:
    lives = [_life(ticket) for _ in range(requests + 1)][1:]
    return {piece: median(life[piece] for life in lives) for piece in lives[0]}


def _life(ticket: bytes) -> dict[str, float]:
    """The milliseconds of every piece, in the worker's order."""
    pieces: dict[str, float] = {}
    lap = _stopwatch(pieces)

    request = PlanTicket.from_bytes(ticket)
    lap("ticket")
    session = SessionStateBuilder().build()
    lap("session")
    plan_bytes = plan.without_python_udfs(request.plan)
    message = plan.parse(plan_bytes, PlanLimits()).message
    if make_partitions_independent(session, message):
        plan_bytes = message.SerializeToString()
    lap("check")
    instance = plan.decode(session, plan_bytes)
    lap("decode")
    stream = session.execute(instance, request.partition)
    lap("execute")
    batch = next(stream).to_pyarrow()
    lap("first batch")
    encoder = Encoder(batch.schema, LARGEST)
    for encoded in (encoder.schema(), *encoder.encode([batch])):
        flight_data.serialize(encoded)
    lap("encode")
    for _batch in stream:
        pass
    lap("end")
    return pieces


def _stopwatch(pieces: dict[str, float]) -> Callable[[str], None]:
    last = time.perf_counter()

    def lap(piece: str) -> None:
        nonlocal last
        now = time.perf_counter()
        pieces[piece] = (now - last) * 1000
        last = now

    return lap
