"""``python -m worker``: settings from the command line, and a supervisor or a worker by them."""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_origin

from pydantic import ByteSize, ValidationError
from pydantic_core import ErrorDetails

from worker import logs
from worker.allocator import engine_environment, restart_with
from worker.config import PlanLimits, Settings, UnfitSettings, usable_memory
from worker.exit import end
from worker.logs import Event
from worker.supervision import collector
from worker.supervision.board import VARIABLE
from worker.supervision.child import STANDARD_ERROR
from worker.supervision.supervisor import Supervisor

logger = logging.getLogger("worker")

PROGRAM = "python -m worker"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs workers, or one, until told to stop, and ends the process."""
    _open_standard_descriptors()
    try:
        settings = Settings(**vars(_parser().parse_args(arguments)))
        logs.configure(settings)
        if VARIABLE not in os.environ:
            for name in sorted(_unknown_variables()):
                logger.warning("there is no setting for the variable %s", name)
            if settings.supervisor:
                _supervise(settings)
            if settings.workers > 1:
                fail("--workers (WORKER_WORKERS): more than one takes the supervisor")
            restart_with(engine_environment(usable_memory()))
        # Not before: it loads DataFusion, which a supervisor is better without.
        from worker import serving

        serving.run(settings, _announce)
    except ValidationError as error:
        fail("; ".join(map(_said, error.errors())))
    except (UnfitSettings, OSError) as error:
        logger.debug("cannot start", exc_info=error)
        fail(str(error))


def _open_standard_descriptors() -> None:
    """Has something behind descriptors 0 to 2, where the process was started with one of them closed.

    Else a socket gets its number, and what the engine writes to standard error goes in there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has no stream for what was closed.
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(STANDARD_ERROR, "w")


def fail(reason: str) -> NoReturn:
    """Ends the process because it could not do what it was asked to."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
    end(2)


def _announce(url: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"listening on {url}", flush=True)


def _supervise(settings: Settings) -> NoReturn:
    supervisor = Supervisor(settings, _worker_command(), _announce)
    if settings.metrics_port is not None:
        port = collector.serve(supervisor, settings.host, settings.metrics_port)
        logger.info(Event("metrics are served", host=settings.host, port=port))
    end(asyncio.run(supervisor.run()))


def _worker_command() -> list[str]:
    """Starts this very program as a worker alone."""
    return [sys.executable, *sys.orig_argv[1:], "--no-supervisor", "--workers", "1"]


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
    limits = parser.add_argument_group("limits of plans")
    for name, field in Settings.model_fields.items():
        default = field.default.human_readable() if isinstance(field.default, ByteSize) else field.default
        shown = "" if field.default_factory or default is None else f" (default: {default})"
        kind: dict[str, Any] = {"metavar": name.rpartition("_")[2].upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(field.annotation) is tuple:
            kind["action"] = _Joined
        (limits if name in PlanLimits.model_fields else parser).add_argument(
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


def _said(problem: ErrorDetails) -> str:
    name = str(problem["loc"][0])
    # Not the value of any other: it may be a secret that was meant for another option.
    path = f": {problem['input']}" if problem["type"].startswith("path_") else ""
    return f"{_option(name)} (WORKER_{name.upper()}): {problem['msg']}{path}"
