"""A worker for tests: real, in this process, on a port of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from worker.config import Settings
from worker.policy import PlanPolicyLike
from worker.server import Server
from worker.service import Worker
from worker.session import SessionBuilderLike
from worker.supervision.journal import Journal


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker that answers at ``url``."""

    worker: Worker
    address: str
    """``host:port``, for gRPC."""
    scheme: str = "grpc"

    @property
    def url(self) -> str:
        """``grpc://host:port``, for Flight clients, or ``grpc+tls://host:port``."""
        return f"{self.scheme}://{self.address}"


@asynccontextmanager
async def running_worker(
    session_builder: SessionBuilderLike | None = None,
    *,
    settings: Settings | None = None,
    plan_policy: PlanPolicyLike | None = None,
    journal: Journal | None = None,
) -> AsyncIterator[RunningWorker]:
    """Runs a worker for as long as the block lasts; requests that are under way at its end are cancelled.

    Call clients that block, such as ``pyarrow.flight``, in a thread: the worker lives on this event loop.

    Args:
        session_builder: as ``Worker`` takes it.
        settings: as ``Worker`` takes it; host, port and grace are this function's.
        plan_policy: as ``Worker`` takes it.
        journal: as ``Worker`` takes it.
    """
    settings = settings if settings is not None else Settings()
    local = settings.model_copy(update={"host": "127.0.0.1", "port": 0, "grace": 0.0, "shutdown_delay": 0.0})
    async with (
        Worker(session_builder, settings=local, plan_policy=plan_policy, journal=journal) as worker,
        Server(worker, local) as server,
    ):
        yield RunningWorker(worker, server.address, server.scheme)
