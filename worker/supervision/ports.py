"""Ports that stay one's own while nobody listens on them."""

import errno
import socket
from contextlib import ExitStack

# A name may stand for addresses of a kind that the machine does not have, such as those of IPv6.
_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def reserve(host: str, port: int) -> list[socket.socket]:
    """Takes a port on all addresses of a host; returns sockets that are bound and do not listen.

    While they are open, nobody may listen there but who shares the port (``SO_REUSEPORT``) and is of the same user.

    Args:
        host: a name or an address.
        port: 0 for one that is free.

    Raises:
        OSError: another process has the port, or the host is not this machine's.
    """
    reserved = []
    with ExitStack() as opened:
        try:
            for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                bound = opened.enter_context(socket.socket(family, kind))
                try:
                    _bind(bound, (address[0], port, *address[2:]))
                except OSError as error:
                    if error.errno not in _MISSING:
                        raise
                else:
                    reserved.append(bound)
                    port = bound.getsockname()[1]
        except (OSError, OverflowError) as error:
            raise OSError(cannot_listen(host, port)) from error
        if not reserved:
            raise OSError(cannot_listen(host, port))
        opened.pop_all()
    return reserved


def cannot_listen(host: str, port: int) -> str:
    """What is said of a port that cannot be had."""
    host = f"[{host}]" if ":" in host else host
    return f"cannot listen on {host}:{port}: the port is taken, or the address not this machine's"


def _bind(bound: socket.socket, address: tuple[object, ...]) -> None:
    """Binds a socket to what nobody else has, and shares it only then."""
    if bound.family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    # What is left of connections that have ended is no obstacle, another socket is.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
