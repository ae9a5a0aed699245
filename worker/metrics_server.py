"""An HTTP server for Prometheus, that whoever reaches its port cannot make large."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

# Who connects and says nothing has a thread for so long.
SILENT_SECONDS = 10

# Each has a thread and a descriptor. When one more comes, the oldest is cut off: it is the likeliest to hold on to its.
MOST_CONNECTIONS = 32


class MetricsServer:
    """Threads that answer with the metrics of a registry, also while the event loop is busy."""

    def __init__(self, collected: CollectorRegistry, host: str, port: int) -> None:
        """
        Args:
            collected: what is served.
            host: the address to listen on.
            port: 0 picks a free one.

        Raises:
            OSError: the address cannot be listened on.
        """
        server_class = _ServerOfIPv6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, make_wsgi_app(collected), server_class, _Handler)
        except OSError as error:
            shown = f"[{host}]" if ":" in host else host
            raise OSError(f"cannot serve metrics on {shown}:{port}: {error.strerror or error}") from error
        self.port: int = self._server.server_port
        """Where it listens."""
        self._thread = threading.Thread(target=self._server.serve_forever, name="worker-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops to listen, which takes half a second at most."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingWSGIServer):
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection."""
        with self._lock:
            self._open[request] = None
            if len(self._open) > MOST_CONNECTIONS:
                oldest = next(iter(self._open))
                # Its thread reads the end, or cannot write any more, and closes it.
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
                del self._open[oldest]
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self._lock:
            self._open.pop(request, None)
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: who goes away in the midst is not worth a traceback each time."""


class _ServerOfIPv6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def log_message(self, *args: object) -> None:
        """Says nothing: a line a scrape is of no use."""
