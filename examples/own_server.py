r"""A Flight server of your own: callers show a token, and their plans may call a Python function.

    python examples/own_server.py --port 8000

Ask it something, and keep the answer in a file for ``own_client.py``, which shows how a client uses the function:

    python -m worker.client --header 'authorization=Bearer a-token-of-ada' --output weather.parquet \
        "select 'Oslo' as station, 41.0 as fahrenheit union all select 'Cairo', 95.0"
    python examples/own_client.py --token a-token-of-ada weather.parquet

``python -m worker.client`` itself cannot call it: a query is planned where it is asked, and only this server and
``own_client.py`` know ``celsius``.
"""

import argparse
import asyncio
import hmac
import os
import signal

import grpc
import pyarrow as pa
import pyarrow.compute as pc
from datafusion import SessionContext, udf

from worker import (
    PermissionDenied,
    Unauthenticated,
    Worker,
    WorkerQueryContext,
    add_FlightServiceServicer_to_server,
    add_WorkerServiceServicer_to_server,
    keep_freed_memory,
    server_options,
)

TOKENS = {"ada": "a-token-of-ada", "grace": "a-token-of-grace"}

# Seconds that running streams have to finish in after SIGTERM or SIGINT.
GRACE = 30.0


def to_celsius(fahrenheit: pa.Array) -> pa.Array:
    """Degrees Celsius, a batch at a time."""
    return pc.divide(pc.subtract(fahrenheit, 32.0), 1.8)


CELSIUS = udf(to_celsius, [pa.float64()], pa.float64(), "immutable", "celsius")


async def authenticate(authorization: str | None) -> str:
    """The name of the user whose token it is; awaitable, because yours may ask another service."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("send the header 'authorization: Bearer <token>'")
    # Every token is compared, in constant time: how long it takes says nothing about any of them.
    users = [user for user, known in TOKENS.items() if hmac.compare_digest(known.encode(), token.encode())]
    if not users:
        raise PermissionDenied("nobody has this token")
    return users[0]


async def build_state(ctx: WorkerQueryContext) -> SessionContext:
    """The session of one request."""
    ctx.principal = await authenticate(ctx.headers.get("authorization"))
    return (
        ctx.builder.with_scalar_functions([CELSIUS])
        .with_config_option("datafusion.execution.batch_size", "4096")
        .build()
    )


async def serve(port: int) -> None:
    """Serves until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Worker.from_session_builder(build_state) as worker:
        server = grpc.aio.server(options=server_options())
        add_FlightServiceServicer_to_server(worker, server)
        # For coordinators of a cluster, and its other workers.
        add_WorkerServiceServicer_to_server(worker, server)
        # Beyond this machine, tokens need TLS: ``add_secure_port``.
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        print(f"listening on grpc://127.0.0.1:{port}", flush=True)
        await stopped.wait()
        await server.stop(GRACE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Flight server with a worker in it.")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    port = parser.parse_args().port
    keep_freed_memory()
    asyncio.run(serve(port))
    # Threads of DataFusion's runtime may outlive the server, and crash in an interpreter that is being finalized.
    os._exit(0)
