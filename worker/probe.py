"""``python -m worker.probe``: whether a worker is serving, as an exit code, for containers and their like."""

import argparse
import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0


def main() -> None:
    """Exits with 0 if a worker is serving, and with 1 and the reason if not."""
    parser = argparse.ArgumentParser("python -m worker.probe", description="Exits with 0 if a worker is serving.")
    default = f"127.0.0.1:{os.environ.get('WORKER_PORT') or 8000}"
    parser.add_argument(
        "address", nargs="?", default=default, help="host:port (default: 127.0.0.1 and WORKER_PORT, or 8000)"
    )
    address = parser.parse_args().address
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
            sys.exit(f"{address}: {reason}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


if __name__ == "__main__":
    main()
