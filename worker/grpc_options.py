"""The options of gRPC that a server needs to serve a worker."""

from worker.config import Settings

# What a request or an answer has beside its ticket: descriptors, field tags. gRPC counts it in its limit.
MESSAGE_OVERHEAD = 64 * 1024

# A peer that does not answer for so long, which is gRPC's default, has gone.
KEEPALIVE_TIMEOUT = 20.0

# Clients may ask as often whether the worker is there. gRPC's default of five minutes ends connections of those that do
# what load balancers need of them.
CLIENT_KEEPALIVE = 5.0

# More partitions at once than one client reads, and fewer than a connection would need to do harm. Those beyond wait.
MAX_CONNECTION_STREAMS = 4096

# A connection that does not come to its first request in this time is closed, TLS included.
HANDSHAKE_TIMEOUT = 20.0


def server_options(settings: Settings | None = None) -> list[tuple[str, int]]:
    """The options that a ``grpc.aio.server`` needs to serve a worker.

    Tickets may be as large as ``max_ticket_size``, what is sent as large as it is, and a port belongs to one process.
    Connections are kept alive, limited and renewed as the settings say.
    """
    settings = settings if settings is not None else Settings()
    options = {
        "grpc.max_receive_message_length": settings.max_ticket_size + MESSAGE_OVERHEAD,
        "grpc.max_send_message_length": -1,
        "grpc.so_reuseport": 0,
        # Else what is not read yet of a request takes up to 4 MiB, instead of 64 KiB. Messages that are being read are
        # let in as a whole, so that they come as quickly.
        "grpc.http2.bdp_probe": 0,
        "grpc.max_concurrent_streams": MAX_CONNECTION_STREAMS,
        # Of those that come faster than they are taken, gRPC cancels some beyond the first number, and all beyond the
        # second, as if their clients had.
        "grpc.server.max_pending_requests": MAX_CONNECTION_STREAMS,
        "grpc.server.max_pending_requests_hard_limit": 2 * MAX_CONNECTION_STREAMS,
        "grpc.server_handshake_timeout_ms": _milliseconds(HANDSHAKE_TIMEOUT),
        "grpc.keepalive_time_ms": _milliseconds(settings.keepalive_time),
        "grpc.keepalive_timeout_ms": _milliseconds(KEEPALIVE_TIMEOUT),
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": _milliseconds(CLIENT_KEEPALIVE),
    }
    if settings.max_connection_age is not None:
        options["grpc.max_connection_age_ms"] = _milliseconds(settings.max_connection_age)
    if settings.max_connection_age_grace is not None:
        options["grpc.max_connection_age_grace_ms"] = _milliseconds(settings.max_connection_age_grace)
    return list(options.items())


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
