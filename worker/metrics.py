"""A worker's statistics for Prometheus, and the port that they are read from. The names are in docs/operation.md."""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.durations import BOUNDS, Histogram
from worker.metrics_server import MetricsServer
from worker.servicer import Statistics


class Watched(Protocol):
    """What has statistics: a ``Worker``."""

    def statistics(self) -> Statistics:
        """What is held now and was done so far; called in threads."""
        ...


def registry(watched: Watched) -> CollectorRegistry:
    """A registry of a worker's own, with its statistics.

    It is a collector too: ``prometheus_client.REGISTRY.register`` adds it to those of another program, which tells
    of its process itself.
    """
    made = CollectorRegistry()
    made.register(_StatisticsCollector(watched))
    return made


def serve(watched: Watched, host: str, port: int) -> MetricsServer:
    """Serves a worker's metrics and those of its process over HTTP, whatever the path, until it is closed.

    Args:
        watched: the worker.
        host: the address to listen on.
        port: 0 picks a free one.

    Raises:
        OSError: the address cannot be listened on.
    """
    served = registry(watched)
    ProcessCollector(registry=served)
    return MetricsServer(served, host, port)


class _StatisticsCollector(Collector):
    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        now = self._watched.statistics()
        ended = CounterMetricFamily(
            "worker_requests", "Requests that have ended, by their status", labels=("method", "status")
        )
        for labels, number in now.requests_ended.items():
            ended.add_metric(labels, number)
        yield ended
        errors = CounterMetricFamily(
            "worker_errors", "Requests that were refused or have failed, by the class of the error", labels=("error",)
        )
        for name, number in now.errors.items():
            errors.add_metric((name,), number)
        yield errors
        for name, text, number in (
            ("worker_requests_active", "Requests under way", now.requests),
            ("worker_streams", "Partitions being streamed", now.streams),
            ("worker_tasks", "Plans held, for streams under way and for partitions yet to be asked for", now.tasks),
            ("worker_tasks_waiting", "Tasks that wait until there is memory for them", now.waiting),
            ("worker_memory_claimed_bytes", "Memory pools of the tasks that run", now.memory_claimed),
        ):
            yield GaugeMetricFamily(name, text, number)
        for name, text, number in (
            ("worker_partitions_executed", "Partitions that were executed", now.partitions_executed),
            ("worker_sent_rows", "Rows that were sent", now.rows_sent),
            ("worker_sent_bytes", "Bytes of IPC messages that were sent", now.bytes_sent),
        ):
            yield CounterMetricFamily(name, text, number)
        decoding = HistogramMetricFamily("worker_plan_decode_seconds", "From a plan's bytes to an instance of it")
        decoding.add_metric((), *_buckets(now.decoding))
        yield decoding
        first_byte = HistogramMetricFamily(
            "worker_first_byte_seconds", "From a request to the first message of its answer", labels=("method",)
        )
        for method, histogram in now.first_byte.items():
            first_byte.add_metric((method,), *_buckets(histogram))
        yield first_byte


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """What a ``HistogramMetricFamily`` takes: how many took at most so long, and the sum of all."""
    bounds = (*map(str, BOUNDS), "+Inf")
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets, histogram.seconds
