"""``python -m worker.probe``: whether a worker is serving, as an exit code, for containers and their like."""

import argparse
import os
import socket
import ssl
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0


def main() -> None:
    """Exits with 0 if a worker is serving, and with 1 and the reason if not."""
    parser = argparse.ArgumentParser(
        "python -m worker.probe",
        description="Exits with 0 if a worker is serving. Where WORKER_TLS_CERT and WORKER_TLS_KEY are set, as the "
        "worker has them, it asks by TLS.",
    )
    default = f"127.0.0.1:{os.environ.get('WORKER_PORT') or 8000}"
    parser.add_argument(
        "address", nargs="?", default=default, help="host:port (default: 127.0.0.1 and WORKER_PORT, or 8000)"
    )
    address = parser.parse_args().address
    cert, key = (os.environ.get(f"WORKER_TLS_{name}") for name in ("CERT", "KEY"))
    try:
        channel = _secure_channel(address, cert, key) if cert and key else grpc.insecure_channel(address)
        with channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    except grpc.RpcError as error:
        reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        sys.exit(f"{address}: {reason}")
    except (OSError, ValueError) as error:
        sys.exit(f"{address}: {error}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _secure_channel(address: str, cert: str, key: str) -> grpc.Channel:
    """A channel to a worker that has this certificate, whatever name that is for, and takes it from clients too."""
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_cert_chain(cert, key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), SECONDS) as connection,
        context.wrap_socket(connection) as secured,
    ):
        names = (secured.getpeercert() or {}).get("subjectAltName", ())
    pem = Path(cert).read_bytes()
    credentials = grpc.ssl_channel_credentials(pem, Path(key).read_bytes(), pem)
    name = str(names[0][1]) if names else host
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", name)])


if __name__ == "__main__":
    main()
