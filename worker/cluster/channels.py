"""Channels to the other workers of a cluster, one for each URL."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import grpc

from worker.errors import InvalidPlan

# A worker that was restarted is to be found again soon; gRPC's default waits for up to two minutes.
MAX_BACKOFF_MILLISECONDS = 1000

# The most that are kept when nobody uses them; each has a socket.
MAX_KEPT = 256

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MILLISECONDS),
]


@dataclass(eq=False, slots=True)
class _Entry:
    channel: grpc.aio.Channel
    users: int = 0


class Channels:
    """Channels, made when they are first needed and kept, but those that do not lead to a worker.

    gRPC would connect to them for ever, each time with sockets of its own.
    """

    def __init__(self) -> None:
        self.credentials: grpc.ChannelCredentials | None = None
        """For ``https``; the system's certificates where there are none."""
        self._entries: dict[str, _Entry] = {}

    @asynccontextmanager
    async def to(self, url: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to a worker, for as long as the block lasts.

        Raises:
            InvalidPlan: the URL is none of a worker.
        """
        entry = self._entries.get(url)
        if entry is None:
            entry = self._entries[url] = _Entry(self._open(url))
        entry.users += 1
        try:
            yield entry.channel
        finally:
            entry.users -= 1
            if not entry.users and not self._is_kept(entry.channel):
                self._entries.pop(url, None)
                await entry.channel.close()

    async def close(self) -> None:
        """Closes all."""
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            await entry.channel.close()

    def _is_kept(self, channel: grpc.aio.Channel) -> bool:
        # Idle is one whose worker has closed the connection.
        leads_on = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE)
        return len(self._entries) <= MAX_KEPT and channel.get_state() in leads_on

    def _open(self, url: str) -> grpc.aio.Channel:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise InvalidPlan(f"a task of the plan is to be read from {url!r}: http://host:port or https:// is right")
        address = f"[{host}]" if ":" in host else host
        if parts.scheme == "https":
            credentials = self.credentials or grpc.ssl_channel_credentials()
            return grpc.aio.secure_channel(f"{address}:{port or 443}", credentials, options=OPTIONS)
        return grpc.aio.insecure_channel(f"{address}:{port or 80}", options=OPTIONS)
