"""A worker in this process, from the import of its session builder to its end."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from worker import metrics
from worker.allocator import keep_freed_memory
from worker.config import Settings, is_loopback
from worker.exit import end
from worker.importer import load_session_builder
from worker.logs import Event
from worker.server import Server
from worker.service import Worker
from worker.session import SessionBuilder
from worker.supervision.supervised import Supervised
from worker.supervision.supervisor import MARGIN

logger = logging.getLogger("worker")

# Where a supervisor reads the metrics of its workers.
LOOPBACK = "127.0.0.1"


def run(settings: Settings, announce: Callable[[str], None]) -> NoReturn:
    """Serves until a signal says that it is enough, and ends the process.

    Args:
        settings: the worker's.
        announce: is told the URL, unless a supervisor is.

    Raises:
        UnfitSettings: the session builder cannot be loaded, or the worker would be open to other machines.
        OSError: the address cannot be listened on.
    """
    supervised = Supervised.from_environment()
    try:
        if supervised is not None:
            supervised.watch(settings.shutdown_delay + settings.grace + MARGIN)
        builder = load_session_builder(settings.session_builder) if settings.session_builder else None
        keep_freed_memory()
        runner = asyncio.Runner(loop_factory=_loop_factory())
        runner.run(_serve(settings, builder, supervised, announce))
    finally:
        if supervised is not None:
            supervised.clean_up()
    # Without the runner's own end, which waits for whatever a session builder still hangs in.
    end(0)


async def _serve(
    settings: Settings,
    session_builder: SessionBuilder | None,
    supervised: Supervised | None,
    announce: Callable[[str], None],
) -> None:
    stopped = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set():
            end(128 + number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    journal = supervised.journal if supervised is not None else None
    async with Worker(session_builder, settings=settings, journal=journal) as worker:
        if settings.metrics_port is not None:
            # It ends with the process, so that the last requests are told of too.
            if supervised is not None:
                supervised.tell(metrics_port=metrics.serve(worker, LOOPBACK, 0).port)
            else:
                served = metrics.serve(worker, settings.host, settings.metrics_port)
                logger.info(Event("metrics are served", host=settings.host, port=served.port))
        async with Server(worker, settings, shares_port=supervised is not None) as server:
            url = f"{server.scheme}://{server.address}"
            logger.info(_started(url, settings))
            if supervised is None:
                announce(url)
                await stopped.wait()
                return
            beating = asyncio.ensure_future(supervised.beat())
            supervised.tell(listening=url)
            await stopped.wait()
            beating.cancel()


def _started(url: str, settings: Settings) -> Event:
    """What an operator wants to know of a worker that runs, and no more: values of settings may be secrets."""
    no_yes = ("no", "yes")
    return Event(
        "started",
        version=_version(),
        address=url,
        process=os.getpid(),
        memory=settings.memory,
        memory_limit=settings.pool_size,
        max_tasks=settings.max_tasks,
        max_streams=settings.max_streams,
        max_waiting=settings.max_waiting,
        max_wait=settings.max_wait,
        max_duration=settings.max_duration,
        max_spill=settings.max_spill,
        tls="mutual" if settings.tls_client_ca else no_yes[settings.tls_cert is not None],
        tokens=no_yes[settings.auth_token_file is not None],
        session_builder=no_yes[settings.session_builder is not None],
        files=",".join(map(str, settings.allow_path)) or ("any" if is_loopback(settings.host) else "none"),
        writes=no_yes[settings.allow_writes],
    )


def _version() -> str | None:
    with contextlib.suppress(PackageNotFoundError):  # it runs from its sources
        return version("datafusion-flight-worker")
    return None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
