"""``python -m worker``: settings from the command line, a server, and an orderly end."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_origin

from pydantic import ByteSize, ValidationError

from worker import logs, metrics
from worker.allocator import keep_freed_memory
from worker.config import Settings, UnfitSettings
from worker.importer import ImportFailed, load_session_builder
from worker.logs import Event
from worker.server import Server
from worker.service import Worker
from worker.session import SessionBuilder

logger = logging.getLogger("worker")

PROGRAM = "python -m worker"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a worker until it is told to stop, and ends the process."""
    try:
        settings = Settings(**vars(_parser().parse_args(arguments)))
        logs.configure(settings)
        for name in sorted(_unknown_variables()):
            logger.warning("there is no setting for the variable %s", name)
        builder = load_session_builder(settings.session_builder) if settings.session_builder else None
        keep_freed_memory()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, builder))
            # Not after the runner's own end, which waits for whatever a session builder still hangs in.
            end(0)
    except ValidationError as error:
        fail("; ".join(f"{_names(problem['loc'])}: {problem['msg']}" for problem in error.errors()))
    except (ImportFailed, UnfitSettings, OSError) as error:
        logger.debug("cannot start", exc_info=error)
        fail(str(error))


def fail(reason: str) -> NoReturn:
    """Ends the process because it could not do what it was asked to."""
    print(f"{PROGRAM}: {reason}", file=sys.stderr)
    end(2)


def end(code: int) -> NoReturn:
    """Ends the process without finalizing the interpreter, in which threads of DataFusion's runtime may crash it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


async def _serve(settings: Settings, session_builder: SessionBuilder | None) -> None:
    stopped = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set():
            end(128 + number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    async with Worker(session_builder, settings=settings) as worker:
        if settings.metrics_port is not None:
            # It ends with the process, so that the last requests are told of too.
            served = metrics.serve(worker, settings.host, settings.metrics_port)
            logger.info(Event("metrics are served", host=settings.host, port=served.port))
        async with Server(worker, settings) as server:
            print(f"listening on {server.scheme}://{server.address}", flush=True)
            await stopped.wait()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _parser() -> argparse.ArgumentParser:
    """Every setting as an option, its value left as text: the model knows what it may be.

    One that is true or false is a flag, ``--name`` or ``--no-name``; one of several values may come several times.
    """
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Executes DataFusion plans that come in Arrow Flight tickets, and streams record batches back.",
        epilog="Every option may be given as an environment variable too: WORKER_PORT for --port, and so on.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        default = field.default.human_readable() if isinstance(field.default, ByteSize) else field.default
        shown = "" if field.default_factory or default is None else f" (default: {default})"
        kind: dict[str, Any] = {"metavar": name.rpartition("_")[2].upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(field.annotation) is tuple:
            kind["action"] = _Joined
        parser.add_argument(
            _option(name), default=argparse.SUPPRESS, help=f"{field.description}{shown}".replace("%", "%%"), **kind
        )
    return parser


class _Joined(argparse.Action):
    """All values of an option as one text, as a variable has them: separated by commas."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def _unknown_variables() -> set[str]:
    """Variables that look like settings, and are none: misspelt, most likely."""
    known = {f"WORKER_{name.upper()}" for name in Settings.model_fields}
    return {name for name in os.environ if name.startswith("WORKER_") and name not in known}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _names(location: tuple[int | str, ...]) -> str:
    name = str(location[0])
    return f"{_option(name)} (WORKER_{name.upper()})"
