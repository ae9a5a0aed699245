"""The figures of a task, which go back to the coordinator for its ``EXPLAIN ANALYZE``.

Coordinators add up what has one name over all tasks of a stage and fail where its kinds differ, so each has the kind
that Distributed DataFusion's own workers send (4.0.0, ``src/protocol/grpc/metrics_proto.rs``). Times are nanoseconds.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from datafusion.plan import Metric, MetricsSet

from worker.cluster.sketch import Sketch
from worker.proto import worker_pb2

# Figures that have a message of their own, by name (``MetricValue::name`` in DataFusion), with the message's field.
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

# Gauges look like counts: these are all that DataFusion 55 has (its calls of ``MetricBuilder::gauge``).
_GAUGES = frozenset({"max_queued", "predicate_cache_inner_records", "predicate_cache_records", "stream_memory_usage"})

# What has no value in Python is read from its text, which has two to four digits (``human_readable_count`` and
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
    """The figures of an executed node of a plan, those of its partitions added up; what Python cannot read is left out.

    Coordinators add up by name as well, without regard to labels (``MetricsSet::aggregate_by_name``), and a figure for
    every partition and file costs seven times as much. Timestamps are the first and the last, in whole microseconds.
    Numbers of batches, ratios, counts of what was pruned, and peaks of memory are as exact as DataFusion prints them.
    """
    named: defaultdict[str, list[Metric]] = defaultdict(list)
    for metric in metrics.metrics() if metrics is not None else ():
        named[metric.name].append(metric)
    figures = (_figure(name, parts) for name, parts in named.items())
    return worker_pb2.MetricsSet(metrics=[figure for figure in figures if figure.WhichOneof("value")])


def _figure(name: str, parts: list[Metric]) -> worker_pb2.Metric:
    """The sum of figures of one name, without a value where Python cannot read it."""
    values = [part.value for part in parts]
    if name == "start_timestamp":
        start = worker_pb2.StartTimestamp(value=min(_moments(values), default=None))
        return worker_pb2.Metric(start_timestamp=start)
    if name == "end_timestamp":
        end = worker_pb2.EndTimestamp(value=max(_moments(values), default=None))
        return worker_pb2.Metric(end_timestamp=end)
    figure = worker_pb2.Metric()
    if integers := [value for value in values if isinstance(value, int)]:
        _set_integer(figure, name, sum(integers), repr(parts[0]))
    else:
        _set_from_texts(figure, name, Counter(map(repr, parts)))
    return figure


def _moments(values: Iterable[object]) -> Iterator[int]:
    """Nanoseconds since 1970 of those times that are known."""
    return ((value - _EPOCH) // _MICROSECOND * 1000 for value in values if isinstance(value, datetime))


def _set_integer(figure: worker_pb2.Metric, name: str, value: int, text: str) -> None:
    """Sets a value, of which the text of a part tells times from counts."""
    if field := _OWN_FIELDS.get(name):
        getattr(figure, field).value = value
    elif name in _GAUGES:
        figure.gauge.name, figure.gauge.value = name, value
    elif text.endswith("s") or text == "NOT RECORDED":
        figure.time.name, figure.time.value = name, value
    else:
        figure.count.name, figure.count.value = name, value


def _set_from_texts(figure: worker_pb2.Metric, name: str, texts: Counter[str]) -> None:
    """Sets a value from the texts of the parts, each with how often it is there."""
    if field := _OWN_FIELDS.get(name):
        getattr(figure, field).value = sum(_number(text, _COUNT_UNITS) * times for text, times in texts.items())
    elif pairs := _matches(_PRUNING, texts):
        total, matched = (_sum(pairs, group) for group in (1, 2))
        figure.pruning_metrics.name = name
        figure.pruning_metrics.pruned, figure.pruning_metrics.matched = total - matched, matched
    elif pairs := _matches(_RATIO, texts):
        figure.ratio.name, figure.ratio.part, figure.ratio.total = name, _sum(pairs, 1), _sum(pairs, 2)
    elif percentages := _matches(_PERCENTAGE, texts):
        known = [(float(found[1]), times) for found, times in percentages if found[1]]
        figure.ratio.name = name
        figure.ratio.part = round(sum(percent * times for percent, times in known) * 100)
        figure.ratio.total = sum(times for _, times in known) * 10_000
    elif _matches(_SIZE, texts):
        figure.peak_memory_usage.name = name
        figure.peak_memory_usage.value = sum(_number(text, _SIZE_UNITS) * times for text, times in texts.items())


def _matches(pattern: re.Pattern[str], texts: Counter[str]) -> list[tuple[re.Match[str], int]]:
    """How a pattern matches each of the texts, and how often that is there; nothing if it does not match them all."""
    found = [(pattern.fullmatch(text), times) for text, times in texts.items()]
    matches = [(match, times) for match, times in found if match]
    return matches if len(matches) == len(found) else []


def _sum(matches: Iterable[tuple[re.Match[str], int]], group: int) -> int:
    """The counts in a group of the matches added up."""
    return sum(_number(match[group], _COUNT_UNITS) * times for match, times in matches)


def _number(text: str, units: Mapping[str, int]) -> int:
    number, _, unit = text.partition(" ")
    return round(float(number) * units[unit])


def of_output(figures: worker_pb2.MetricsSet) -> worker_pb2.MetricsSet:
    """Those of a node's figures that a node which passes on its output has too."""
    return worker_pb2.MetricsSet(
        metrics=[metric for metric in figures.metrics if metric.WhichOneof("value") in _OUTPUT]
    )


_OUTPUT = frozenset({"output_rows", "output_bytes", "output_batches", "elapsed_compute"})

# As upstream's figure begins, which the smallest of several is taken of.
_NO_LATENCY = (1 << 64) - 1


def of_task(query_start: int, added: int, executed: int | None, finished: int | None) -> worker_pb2.MetricsSet:
    """When a task got its plan, was first executed, and ended, as times since the query's start; 0 for not yet.

    Takes nanoseconds since 1970; the query's start is by the coordinator's clock.
    """
    moments = {"plan_added_at": added, "plan_executed_at": executed, "plan_finished_at": finished}
    figures = worker_pb2.MetricsSet()
    for name, moment in moments.items():
        since = 0 if moment is None else max(0, moment - query_start)
        figures.metrics.add(custom_max_latency=worker_pb2.MaxLatency(name=name, value=since))
    return figures


class NetworkFigures:
    """The figures of a leaf that reads partitions of other tasks (upstream: ``src/protocol/grpc/worker_client.rs``)."""

    def __init__(self) -> None:
        self.local_connections = 0
        """How many tasks were on this same worker."""
        self.remote_connections = 0
        """How many were on others."""
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
        """The figures, with rows and bytes of so many partitions; those of the network only where it was used."""
        figures = worker_pb2.MetricsSet()
        add = figures.metrics.add
        for partition in range(partitions):
            add(partition=partition).output_rows.value = self._rows[partition]
            add(partition=partition).output_bytes.value = self._bytes[partition]
        add(count=worker_pb2.NamedCount(name="local_connections_used", value=self.local_connections))
        if not self.remote_connections:
            return figures
        add().elapsed_compute.value = self.elapsed_compute
        add(count=worker_pb2.NamedCount(name="msg_count", value=self._messages))
        add(gauge=worker_pb2.NamedGauge(name="max_mem_used", value=self.max_memory))
        add(custom_bytes_count=worker_pb2.BytesCount(name="bytes_transferred", value=self._transferred))
        self._add_latencies(figures)
        return figures

    def _add_latencies(self, figures: worker_pb2.MetricsSet) -> None:
        add, seen = figures.metrics.add, self._latencies
        sketch = seen.to_bytes()
        smallest = seen.min if seen.count else _NO_LATENCY
        add(custom_min_latency=worker_pb2.MinLatency(name="network_latency_min", value=smallest))
        add(custom_max_latency=worker_pb2.MaxLatency(name="network_latency_max", value=seen.max))
        add(custom_p50_latency=worker_pb2.PercentileLatency(name="network_latency_p50", sketch_bytes=sketch))
        add(custom_p95_latency=worker_pb2.PercentileLatency(name="network_latency_p95", sketch_bytes=sketch))
        add(custom_first_latency=worker_pb2.FirstLatency(name="network_latency_first", value=self._first_latency))
        add(time=worker_pb2.NamedTime(name="network_latency_sum", value=seen.sum))
        add(partition=0, count=worker_pb2.NamedCount(name="network_latency_count", value=seen.count))
