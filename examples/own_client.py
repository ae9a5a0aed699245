"""Calls the function of ``own_server.py`` over a Parquet file that the server can read under the same path.

    python examples/own_client.py --token a-token-of-ada weather.parquet

To plan a query, its functions' names and types are enough. A plan carries the Python functions of its client along;
the worker drops them unread and runs its own.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import grpc
import pyarrow as pa
from datafusion import ExecutionPlan, SessionContext, udf

from worker.client import WorkerClient

QUERY = "select station, celsius(fahrenheit) as celsius from weather order by station"


def not_here(*_: pa.Array) -> pa.Array:
    """What a function does that is planned with here, and runs there."""
    raise NotImplementedError("this function is the worker's")


CELSIUS = udf(not_here, [pa.float64()], pa.float64(), "immutable", "celsius")


def plan(file: Path) -> ExecutionPlan:
    """The plan of the query over a file with the columns ``station`` and ``fahrenheit``."""
    session = SessionContext()
    session.register_udf(CELSIUS)
    session.register_parquet("weather", file.absolute())
    return session.sql(QUERY).execution_plan()


async def run(url: str, token: str, file: Path) -> None:
    """Prints the rows as they come."""
    async with WorkerClient(url, headers={"authorization": f"Bearer {token}"}) as client:
        async for batch in client.execute(plan(file)):
            for row in batch.to_pylist():
                print(f"{row['station']}: {row['celsius']:.1f} °C")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Temperatures in degrees Celsius.")
    parser.add_argument("--url", default="grpc://127.0.0.1:8000", help="the worker (default: %(default)s)")
    parser.add_argument("--token", required=True)
    parser.add_argument("file", type=Path, help="a Parquet file with the columns station and fahrenheit")
    options = parser.parse_args()
    if not options.file.is_file():
        sys.exit(f"there is no file {options.file}")
    try:
        asyncio.run(run(options.url, options.token, options.file))
    except grpc.aio.AioRpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
