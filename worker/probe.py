"""``python -m worker.probe``: whether a worker is serving, as an exit code, for containers and their like."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from worker.config import Settings

SECONDS = 5.0


def main() -> None:
    """Exits with 0 when the worker on this machine's ``WORKER_PORT`` (or of ``host:port``, if given) is serving."""
    address = sys.argv[1] if len(sys.argv) > 1 else f"127.0.0.1:{Settings().port}"
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            sys.exit(f"{address}: {error}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


if __name__ == "__main__":
    main()
