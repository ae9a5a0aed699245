"""`python -m worker.probe`, which containers ask."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE

from support import listening


async def probe(*arguments: str, **environment: str) -> tuple[int | None, str]:
    """The exit code, and what was complained about."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker.probe", *arguments, stderr=PIPE, env={**os.environ, **environment}
    )
    _, errors = await running.communicate()
    return running.returncode, errors.decode()


async def test_a_worker_is_serving_until_it_is_told_to_stop_and_none_is_when_it_has() -> None:
    async with listening("-m", "worker", "--port", "0", "--shutdown-delay", "60") as (process, url):
        address = url.removeprefix("grpc://")
        assert await probe(address) == (0, "")
        assert await probe(WORKER_PORT=address.rpartition(":")[2]) == (0, "")

        process.send_signal(signal.SIGTERM)
        while (answer := await probe(address)) == (0, ""):
            pass
        assert answer == (1, f"{address}: NOT_SERVING\n")
    code, errors = await probe(address)
    assert code == 1
    assert errors.startswith(f"{address}: ")
