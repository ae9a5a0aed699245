"""The figures of a task, which go back to the coordinator for its ``EXPLAIN ANALYZE``.

Coordinators add up what has one name over all tasks of a stage and fail where its kinds differ, so each has the kind
that Distributed DataFusion's own workers send (4.0.0, ``src/protocol/grpc/metrics_proto.rs``). Times are nanoseconds.
"""

import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from datafusion.plan import Metric, MetricsSet

from worker.cluster.sketch import Sketch
from worker.proto import worker_pb2

# Names of figures with a message of their own, by name (``MetricValue::name`` in DataFusion), with its field.
_OWN_FIELDS = {
    "elapsed_compute": "elapsed_compute",
    "mem_used": "current_memory_usage",
    "output_batches": "output_batches",
    "output_bytes": "output_bytes",
    "output_rows": "output_rows",
    "spill_count": "spill_count",
    "spilled_bytes": "spilled_bytes",
    "spilled_rows": "spilled_rows",
}
_TIMESTAMPS = frozenset({"start_timestamp", "end_timestamp"})

# Gauges look like counts: these are all that DataFusion 55 has (its calls of ``MetricBuilder::gauge``).
_GAUGES = frozenset({"max_queued", "predicate_cache_inner_records", "predicate_cache_records", "stream_memory_usage"})

# Where Python cannot see a value it is read from its text, which has three or four digits (``human_readable_count`` and
# ``human_readable_size`` in DataFusion).
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
_COUNT = r"(\d+(?:\.\d+ [KMBT])?)"
_PRUNING = re.compile(rf"{_COUNT} total → {_COUNT} matched(?: -> {_COUNT} fully matched)?")
_RATIO = re.compile(rf"(?:N/A|[\d.]+%) \({_COUNT}/{_COUNT}\)")
_PERCENTAGE = re.compile(r"N/A|([\d.]+)%")
_SIZE = re.compile(r"\d+\.\d [KMGT]?B")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def of_node(metrics: MetricsSet | None) -> worker_pb2.MetricsSet:
    """The figures of an executed node of a plan; what Python cannot read is left out.

    Timestamps have microseconds. Counts of what was pruned, ratios, peaks of memory and numbers of batches have three
    or four digits.
    """
    figures = map(_figure, metrics.metrics() if metrics is not None else ())
    return worker_pb2.MetricsSet(metrics=[figure for figure in figures if figure.WhichOneof("value")])


def _figure(metric: Metric) -> worker_pb2.Metric:
    """A figure as coordinators read it, without a value where Python cannot read it."""
    figure = worker_pb2.Metric(partition=metric.partition)
    for label, text in metric.labels().items():
        figure.labels.add(name=label, value=text)
    name, value = metric.name, metric.value
    if name in _TIMESTAMPS:
        timestamp = figure.start_timestamp if name == "start_timestamp" else figure.end_timestamp
        timestamp.SetInParent()
        if isinstance(value, datetime):
            timestamp.value = (value - _EPOCH) // _MICROSECOND * 1000
    elif field := _OWN_FIELDS.get(name):
        getattr(figure, field).value = value if isinstance(value, int) else _number(repr(metric), _COUNT_UNITS)
    elif isinstance(value, int):
        _set_integer(figure, name, value, repr(metric))
    else:
        _set_from_text(figure, name, repr(metric))
    return figure


def _set_integer(figure: worker_pb2.Metric, name: str, value: int, text: str) -> None:
    """Sets the value of what is a gauge, a time or a count."""
    if name in _GAUGES:
        figure.gauge.name, figure.gauge.value = name, value
    elif text.endswith("s") or text == "NOT RECORDED":
        figure.time.name, figure.time.value = name, value
    else:
        figure.count.name, figure.count.value = name, value


def _set_from_text(figure: worker_pb2.Metric, name: str, text: str) -> None:
    """Sets the value of what Python can see as text alone."""
    if found := _PRUNING.fullmatch(text):
        total, matched = (_number(count, _COUNT_UNITS) for count in found.group(1, 2))
        figure.pruning_metrics.name = name
        figure.pruning_metrics.pruned, figure.pruning_metrics.matched = total - matched, matched
    elif found := _RATIO.fullmatch(text):
        figure.ratio.name = name
        figure.ratio.part, figure.ratio.total = (_number(count, _COUNT_UNITS) for count in found.group(1, 2))
    elif found := _PERCENTAGE.fullmatch(text):
        figure.ratio.name = name
        if percent := found.group(1):
            figure.ratio.part, figure.ratio.total = round(float(percent) * 100), 10_000
    elif _SIZE.fullmatch(text):
        figure.peak_memory_usage.name, figure.peak_memory_usage.value = name, _number(text, _SIZE_UNITS)


def _number(text: str, units: Mapping[str, int]) -> int:
    number, _, unit = text.partition(" ")
    return round(float(number) * units[unit])


def of_task(query_start: int, added: int, executed: int | None, finished: int | None) -> worker_pb2.MetricsSet:
    """When a task got its plan, was first executed, and ended, as times since the query's start; 0 for not yet.

    Takes nanoseconds since 1970; the query's start is by the coordinator's clock.
    """
    moments = {"plan_added_at": added, "plan_executed_at": executed, "plan_finished_at": finished}
    figures = worker_pb2.MetricsSet()
    for name, moment in moments.items():
        since = 0 if moment is None else max(0, moment - query_start)
        figures.metrics.add().custom_max_latency.MergeFrom(worker_pb2.MaxLatency(name=name, value=since))
    return figures


class NetworkFigures:
    """The figures of a leaf that reads partitions of other tasks (upstream: ``src/protocol/grpc/worker_client.rs``)."""

    def __init__(self) -> None:
        self.local_connections = 0
        """How many tasks were on this same worker."""
        self.max_memory = 0
        """The most bytes of messages that were held at once."""
        self.elapsed_compute = 0
        """Nanoseconds spent on receiving."""
        self._rows: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._messages = 0
        self._transferred = 0
        self._first_latency = 0
        self._latencies = Sketch()

    def batch_read(self, partition: int, rows: int, size: int) -> None:
        """Counts a batch of a partition, of so many bytes, wherever it comes from."""
        self._rows[partition] += rows
        self._bytes[partition] += size

    def message_received(self, partition: int, rows: int, size: int, created: int, received: int) -> None:
        """Counts a message that came over the network.

        Both times are nanoseconds since 1970, by the sender's clock and by this one's; ``created`` is 0 when the sender
        did not say, and a message from the future has no latency.
        """
        self.batch_read(partition, rows, size)
        self._messages += 1
        self._transferred += size
        if 0 < created <= received:
            latency = max(1, received - created)
            self._first_latency = self._first_latency or latency
            self._latencies.add(latency)

    def to_proto(self, partitions: int) -> worker_pb2.MetricsSet:
        """The figures, with rows and bytes of so many partitions, and latencies when there were any."""
        figures = worker_pb2.MetricsSet()
        add = figures.metrics.add
        for partition in range(partitions):
            add(partition=partition).output_rows.value = self._rows[partition]
            add(partition=partition).output_bytes.value = self._bytes[partition]
        add().elapsed_compute.value = self.elapsed_compute
        add(count=worker_pb2.NamedCount(name="local_connections_used", value=self.local_connections))
        add(count=worker_pb2.NamedCount(name="msg_count", value=self._messages))
        add(gauge=worker_pb2.NamedGauge(name="max_mem_used", value=self.max_memory))
        add(custom_bytes_count=worker_pb2.BytesCount(name="bytes_transferred", value=self._transferred))
        if self._latencies.count:
            self._add_latencies(figures)
        return figures

    def _add_latencies(self, figures: worker_pb2.MetricsSet) -> None:
        add, seen = figures.metrics.add, self._latencies
        sketch = seen.to_bytes()
        add(custom_min_latency=worker_pb2.MinLatency(name="network_latency_min", value=seen.min))
        add(custom_max_latency=worker_pb2.MaxLatency(name="network_latency_max", value=seen.max))
        add(custom_p50_latency=worker_pb2.PercentileLatency(name="network_latency_p50", sketch_bytes=sketch))
        add(custom_p95_latency=worker_pb2.PercentileLatency(name="network_latency_p95", sketch_bytes=sketch))
        add(custom_first_latency=worker_pb2.FirstLatency(name="network_latency_first", value=self._first_latency))
        add(time=worker_pb2.NamedTime(name="network_latency_sum", value=seen.sum))
        add(partition=0, count=worker_pb2.NamedCount(name="network_latency_count", value=seen.count))
