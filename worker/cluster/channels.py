"""Channels to the other workers of a cluster, one for each URL."""

from urllib.parse import urlsplit

import grpc

from worker.errors import InvalidPlan

# A worker that was restarted is to be found again soon; gRPC's default waits for up to two minutes.
MAX_BACKOFF_MILLISECONDS = 1000

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MILLISECONDS),
]


class Channels:
    """Channels, made when they are first needed and kept."""

    def __init__(self) -> None:
        self.credentials: grpc.ChannelCredentials | None = None
        """For ``https``; the system's certificates where there are none."""
        self._channels: dict[str, grpc.aio.Channel] = {}

    def to(self, url: str) -> grpc.aio.Channel:
        """The channel to a worker.

        Raises:
            InvalidPlan: the URL is none of a worker.
        """
        channel = self._channels.get(url)
        if channel is None:
            channel = self._channels[url] = self._open(url)
        return channel

    async def close(self) -> None:
        """Closes all."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

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
