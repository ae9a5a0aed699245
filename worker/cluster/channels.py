"""Channels to the other workers of a cluster, one for each URL."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

import grpc

from worker.errors import InvalidPlan

# A worker that was restarted is to be found again soon; gRPC's default waits for up to two minutes.
MAX_BACKOFF_MILLISECONDS = 1000

# The most that are kept when nobody uses them; each has a socket.
MAX_KEPT = 256

# A worker whose machine is gone says nothing, and is not to be waited for until TCP gives up.
KEEPALIVE_MILLISECONDS = 60_000

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MILLISECONDS),
    ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
]


@dataclass(eq=False, slots=True)
class _Entry:
    channel: grpc.aio.Channel
    credentials: grpc.ChannelCredentials | None
    users: int = 0


class Channels:
    """Channels, made when they are first needed and kept, but those that do not lead to a worker.

    gRPC would connect to them for ever, each time with sockets of its own.
    """

    def __init__(self) -> None:
        self.credentials: Callable[[], grpc.ChannelCredentials] = cache(grpc.ssl_channel_credentials)
        """For ``https``; the system's certificates unless set. Where it gives others than before, channels are new."""
        self._entries: dict[str, _Entry] = {}

    @asynccontextmanager
    async def to(self, url: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to a worker, for as long as the block lasts.

        Raises:
            InvalidPlan: the URL is none of a worker.
        """
        entry = former = self._entries.get(url)
        if entry is None or (entry.credentials and entry.credentials is not self.credentials()):
            entry = self._entries[url] = self._open(url)
        entry.users += 1
        try:
            if former and former is not entry and not former.users:
                await former.channel.close()
            yield entry.channel
        finally:
            entry.users -= 1
            if not entry.users and not (self._entries.get(url) is entry and self._is_kept(entry.channel)):
                if self._entries.get(url) is entry:
                    del self._entries[url]
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

    def _open(self, url: str) -> _Entry:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise InvalidPlan(f"a task of the plan is to be read from {url!r}: http://host:port or https:// is right")
        # gRPC takes a host that is called unix, say, for the scheme of a target.
        address = "dns:///" + (f"[{host}]" if ":" in host else host)
        if parts.scheme == "https":
            credentials = self.credentials()
            return _Entry(
                grpc.aio.secure_channel(f"{address}:{port or 443}", credentials, options=OPTIONS), credentials
            )
        return _Entry(grpc.aio.insecure_channel(f"{address}:{port or 80}", options=OPTIONS), None)
