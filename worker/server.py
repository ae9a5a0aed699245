"""A ``grpc.aio`` server for one worker: its listener, health, reflection, and the stages of its end."""

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from worker.auth import TokenAuth
from worker.cluster import observability
from worker.cluster import service as cluster
from worker.config import Settings, UnfitSettings, is_loopback
from worker.grpc_options import server_options
from worker.service import SERVICE, Worker, add_FlightServiceServicer_to_server
from worker.servicer import Context
from worker.tls import Certificates

logger = logging.getLogger("worker")


# Nobody needs a token to watch.
MOST_WATCHES = 1000

# A client that watches health and does not read must not hold up the end.
WATCH_SECONDS = 1.0


class Server:
    """Serves a worker. The worker is not closed with it."""

    def __init__(self, worker: Worker, settings: Settings, *, shares_port: bool = False) -> None:
        """
        Args:
            worker: what is served.
            settings: where, to whom, and how long the end may take.
            shares_port: whether other processes of this user that say so too may have the port at the same time.

        Raises:
            UnfitSettings: it would be open to other machines, or a file of certificates or tokens is of no use.
        """
        _check_exposure(settings)
        self._worker = worker
        self._settings = settings
        self._certificates = Certificates.of(settings)
        self._health = _Health()
        interceptors = [TokenAuth(settings.auth_token_file, worker.refused)] if settings.auth_token_file else []
        # Of an option that comes twice, gRPC takes the first.
        options = [("grpc.so_reuseport", int(shares_port)), *server_options(settings)]
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        add_FlightServiceServicer_to_server(worker, self._server)
        cluster.add_WorkerServiceServicer_to_server(worker, self._server)
        observability.add_ObservabilityServiceServicer_to_server(worker, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            services = (SERVICE, cluster.SERVICE, observability.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, self._server)
        self.address = ""
        """Where it listens, as ``host:port``; known once it has started."""
        self.scheme = "grpc+tls" if self._certificates else "grpc"
        """Of the URLs that Flight clients know it by."""

    async def start(self) -> None:
        """Opens the port.

        Raises:
            OSError: the address cannot be listened on, because another process does, for example.
        """
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"{host}:{self._settings.port}"
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.server_credentials())
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {address}: the port is taken, or the address not this machine's"
            ) from error
        await self._server.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        """Ends in stages, so that no client loses a stream that could have been finished.

        Health says NOT_SERVING, for ``shutdown_delay`` seconds; then new requests are refused and health watches end;
        streams have ``grace`` seconds to finish in; what is left then is cancelled.
        """
        await self._say_not_serving()
        if self._settings.shutdown_delay:
            logger.info("health is NOT_SERVING: new requests are refused in %g s", self._settings.shutdown_delay)
        await asyncio.sleep(self._settings.shutdown_delay)
        await self._say_not_serving()
        requests = self._worker.statistics().requests
        logger.info("shutting down: %d requests have %g s to finish", requests, self._settings.grace)
        stopping = asyncio.ensure_future(self._server.stop(self._settings.grace))
        # An open watch never ends on its own, and would use up the whole grace.
        self._health.end_watches()
        try:
            async with asyncio.timeout(self._settings.grace):
                await asyncio.shield(stopping)
        except TimeoutError:
            if requests := self._worker.statistics().requests:
                logger.warning("shutting down: %d requests cancelled", requests)
            await stopping

    async def _say_not_serving(self) -> None:
        # A service's watches take turns with ``set``: the second time, they all have written what they heard the first.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS):
                for service in ("", SERVICE):
                    await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


def _check_exposure(settings: Settings) -> None:
    if is_loopback(settings.host):
        return
    lacking = []
    if not settings.tls_cert:
        lacking.append("no TLS (--tls-cert and --tls-key)")
    if not (settings.auth_token_file or settings.tls_client_ca or settings.session_builder):
        lacking.append("no check of who asks (--auth-token-file, --tls-client-ca or a --session-builder)")
    if not lacking:
        return
    what = f"{settings.host} is reached from other machines, and there is {' and '.join(lacking)}"
    if not settings.insecure:
        raise UnfitSettings(
            f"--host (WORKER_HOST): {what}: anybody could run plans here, or listen in. Add that, listen on 127.0.0.1, "
            "or say --insecure (WORKER_INSECURE=true) where something in front of the worker does it"
        )
    logger.warning("insecure: %s", what)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The health service, whose watches can be ended."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[None]] = set()

    async def Watch(self, request: Any, context: Context) -> None:
        if len(self._watches) >= MOST_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "health is watched by too many: check it instead")
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await watch
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is shutting down")
        finally:
            self._watches.discard(watch)

    def end_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()
