"""The figures of tasks that coordinators get: all that DataFusion's own list has, each of its kind."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from struct import Struct
from typing import Any

import pyarrow as pa
import pytest
from conftest import tpch_query
from datafusion import ExecutionPlan, SessionConfig, SessionContext
from datafusion.plan import MetricsSet

from worker.cluster.metrics import NetworkFigures, of_node, of_task
from worker.cluster.sketch import Sketch
from worker.encoding.encode import Encoder
from worker.message import HeaderType, header_type, row_count
from worker.proto import worker_pb2

# By name, the kinds of figures that workers in Rust send of the nodes of TPC-H's plans, as in DataFusion's source.
KINDS = {
    "elapsed_compute": "elapsed_compute",
    "output_batches": "output_batches",
    "output_bytes": "output_bytes",
    "output_rows": "output_rows",
    "spill_count": "spill_count",
    "spilled_bytes": "spilled_bytes",
    "spilled_rows": "spilled_rows",
    "start_timestamp": "start_timestamp",
    "end_timestamp": "end_timestamp",
    "build_mem_used": "peak_memory_usage",
    "peak_mem_used": "peak_memory_usage",
    "predicate_cache_inner_records": "gauge",
    "predicate_cache_records": "gauge",
    "time_calculating_group_ids": "time",
    "time_elapsed_opening": "time",
    "time_elapsed_processing": "time",
    "time_elapsed_scanning_total": "time",
    "time_elapsed_scanning_until_data": "time",
    "files_ranges_pruned_statistics": "pruning_metrics",
    "limit_pruned_row_groups": "pruning_metrics",
    "page_index_pages_pruned": "pruning_metrics",
    "page_index_rows_pruned": "pruning_metrics",
    "row_groups_pruned_bloom_filter": "pruning_metrics",
    "row_groups_pruned_statistics": "pruning_metrics",
    "avg_fanout": "ratio",
    "output_rows_skew": "ratio",
    "probe_hit_rate": "ratio",
    "reduction_factor": "ratio",
    "scan_efficiency_ratio": "ratio",
    "selectivity": "ratio",
    "array_map_created_count": "count",
    "batches_split": "count",
    "build_input_batches": "count",
    "build_input_rows": "count",
    "bytes_scanned": "count",
    "file_open_errors": "count",
    "file_scan_errors": "count",
    "files_opened": "count",
    "files_processed": "count",
    "input_batches": "count",
    "input_rows": "count",
    "num_predicate_creation_errors": "count",
    "page_index_load_skipped": "count",
    "page_index_pages_skipped_by_fully_matched": "count",
    "predicate_evaluation_errors": "count",
    "pushdown_rows_matched": "count",
    "pushdown_rows_pruned": "count",
    "row_groups_pruned_dynamic_filter": "count",
    "row_replacements": "count",
    "skipped_aggregation_rows": "count",
}
OWN_NAMES = {"elapsed_compute", "output_rows", "spill_count", "spilled_bytes", "spilled_rows"}


def kind(name: str) -> str:
    return "time" if name.endswith("_time") else KINDS[name]


def by_name(figures: worker_pb2.MetricsSet) -> dict[str, tuple[str, Any]]:
    """By name, the kind of a figure and its message."""
    found: dict[str, tuple[str, Any]] = {}
    for metric in figures.metrics:
        field = metric.WhichOneof("value")
        assert field is not None
        message = getattr(metric, field)
        found[getattr(message, "name", field)] = (field, message)
    assert len(found) == len(figures.metrics)
    return found


def nodes(plan: ExecutionPlan) -> Iterator[ExecutionPlan]:
    yield plan
    for child in plan.children():
        yield from nodes(child)


def execute(session: SessionContext, plan: ExecutionPlan) -> None:
    for partition in range(plan.partition_count):
        for _ in session.execute(plan, partition):
            pass


def node_metrics(plan: ExecutionPlan, name: str) -> MetricsSet:
    """The metrics of the first node of a name."""
    metrics = next(node for node in nodes(plan) if node.display().startswith(name)).metrics()
    assert metrics is not None
    return metrics


def executed(session: SessionContext, sql: str) -> ExecutionPlan:
    plan = session.sql(sql).execution_plan()
    execute(session, plan)
    return plan


@pytest.mark.parametrize("number", range(1, 23))
def test_the_figures_of_every_node_of_tpch_are_all_there_of_their_kinds_and_sums(
    tpch: SessionContext, number: int
) -> None:
    *before, query = (statement for statement in tpch_query(number) if not statement.strip().startswith("drop"))
    for statement in before:
        tpch.sql(statement).collect()
    plan = executed(tpch, query)
    for node in nodes(plan):
        metrics = node.metrics()
        figures = by_name(of_node(metrics))
        names = {metric.name for metric in metrics.metrics()} if metrics else set()
        assert {name: field for name, (field, _) in figures.items()} == {name: kind(name) for name in names}
        for name, (field, message) in figures.items():
            total = getattr(metrics, name) if name in OWN_NAMES else metrics.sum_by_name(name) if metrics else None
            if field in {"time", "elapsed_compute"}:
                # DataFusion adds a nanosecond for every part without time.
                assert 0 <= total - message.value < 100
            elif field in {"count", "gauge"} or name in OWN_NAMES:
                assert message.value == total
            elif field == "peak_memory_usage":
                assert message.value == pytest.approx(total, rel=0.03)
            elif field == "output_batches":
                assert (message.value > 0) == (figures["output_rows"][1].value > 0)


def test_what_is_printed_alone_is_read(tpch: SessionContext) -> None:
    tpch.sql("SET datafusion.execution.parquet.pushdown_filters = true")
    plan = executed(tpch, "SELECT l_orderkey FROM lineitem WHERE l_orderkey < 1000")
    scan = node_metrics(plan, "DataSourceExec")
    figures = by_name(of_node(scan))
    _, pruned = figures["row_groups_pruned_statistics"]
    printed = [repr(metric) for metric in scan.metrics() if metric.name == "row_groups_pruned_statistics"]
    assert pruned.pruned + pruned.matched == sum(int(text.split()[0]) for text in printed)
    assert (pruned.pruned > 0, pruned.matched) == (True, 1)
    _, scanned = figures["scan_efficiency_ratio"]
    assert scanned.part == pytest.approx(figures["bytes_scanned"][1].value, rel=0.01)
    assert 0 < scanned.part < scanned.total
    _, skew = figures["output_rows_skew"]
    (percentage,) = (repr(metric) for metric in scan.metrics() if metric.name == "output_rows_skew")
    assert (f"{skew.part / 100:g}%", skew.total) == (percentage, 10_000)


def test_ratios_of_partitions_are_added_up(tpch: SessionContext) -> None:
    plan = executed(tpch, "SELECT l_orderkey FROM lineitem WHERE l_quantity = 7")
    figures = by_name(of_node(node_metrics(plan, "FilterExec")))
    _, selectivity = figures["selectivity"]
    assert selectivity.part == pytest.approx(figures["output_rows"][1].value, rel=0.005)
    assert selectivity.total == pytest.approx(600_572, rel=0.001)


def test_timestamps_are_the_first_and_the_last_of_the_partitions(tpch: SessionContext) -> None:
    plan = tpch.sql("SELECT l_orderkey FROM lineitem WHERE l_quantity = 7").execution_plan()
    before = datetime.now(UTC).timestamp()
    execute(tpch, plan)
    after = datetime.now(UTC).timestamp()
    metrics = node_metrics(plan, "FilterExec")
    figures = by_name(of_node(metrics))
    start, end = (figures[name][1].value for name in ("start_timestamp", "end_timestamp"))
    assert before * 1e9 - 1000 <= start < end <= after * 1e9
    times = {metric.name: metric.value for metric in metrics.metrics() if metric.name.endswith("_timestamp")}
    assert set(times) == {"start_timestamp", "end_timestamp"}
    firsts = min(m.value for m in metrics.metrics() if m.name == "start_timestamp" and isinstance(m.value, datetime))
    assert start % 10**9 == firsts.microsecond * 1000


def test_a_partition_that_nobody_executed_to_its_end_has_an_end_without_a_value(tpch: SessionContext) -> None:
    plan = tpch.sql("SELECT l_orderkey FROM lineitem WHERE l_quantity = 7").execution_plan()
    stream = tpch.execute(plan, 0)
    next(iter(stream))
    field, end = by_name(of_node(node_metrics(plan, "FilterExec")))["end_timestamp"]
    assert field == "end_timestamp"
    assert not end.HasField("value")


def test_spills_and_peaks_of_memory_are_figures_of_their_own() -> None:
    session = SessionContext(SessionConfig().with_target_partitions(2))
    session.sql("CREATE TABLE pairs AS SELECT value AS a, value AS b FROM generate_series(1, 20000)").collect()
    session.sql("SET datafusion.optimizer.prefer_hash_join = false").collect()
    plan = executed(session, "SELECT l.a FROM pairs l JOIN pairs r ON l.a = r.a ORDER BY l.b")
    figures = by_name(of_node(node_metrics(plan, "SortMergeJoinExec")))
    assert figures["peak_mem_used"][0] == "peak_memory_usage"
    assert figures["peak_mem_used"][1].value > 0
    assert figures["spill_count"] == ("spill_count", worker_pb2.SpillCount())


def test_a_node_without_metrics_has_no_figures() -> None:
    assert of_node(None) == worker_pb2.MetricsSet()


def test_the_moments_of_a_task_are_times_since_the_start_of_the_query() -> None:
    task = by_name(of_task(query_start=1_000, added=1_250, executed=1_700, finished=None))
    assert {name: (field, message.value) for name, (field, message) in task.items()} == {
        "plan_added_at": ("custom_max_latency", 250),
        "plan_executed_at": ("custom_max_latency", 700),
        "plan_finished_at": ("custom_max_latency", 0),
    }
    # The coordinator's clock is ahead of this one's.
    _, ahead = by_name(of_task(query_start=1_000, added=900, executed=None, finished=None))["plan_added_at"]
    assert ahead.value == 0


def test_the_figures_of_a_network_leaf() -> None:
    network = NetworkFigures()
    network.local_connections, network.remote_connections = 1, 1
    network.max_memory, network.elapsed_compute = 300, 77
    network.message_received(0, rows=10, size=100, created=1_000, received=1_500)
    network.message_received(2, rows=5, size=200, created=2_000, received=2_100)
    network.message_received(2, rows=0, size=50, created=0, received=2_200)
    network.message_received(2, rows=1, size=1, created=3_000, received=2_900)
    network.message_received(2, rows=1, size=1, created=3_000, received=3_000)
    network.batch_read(1, rows=3, size=30)
    figures = network.to_proto(3)
    per_partition = [
        metric for metric in figures.metrics if metric.WhichOneof("value") in {"output_rows", "output_bytes"}
    ]
    assert [(m.partition, m.output_rows.value or m.output_bytes.value) for m in per_partition] == [
        *((0, 10), (0, 100)),
        *((1, 3), (1, 30)),
        *((2, 7), (2, 252)),
    ]
    rest = worker_pb2.MetricsSet(metrics=[metric for metric in figures.metrics if metric not in per_partition])
    values = {name: (field, getattr(message, "value", 0)) for name, (field, message) in by_name(rest).items()}
    assert values == {
        "elapsed_compute": ("elapsed_compute", 77),
        "local_connections_used": ("count", 1),
        "msg_count": ("count", 5),
        "max_mem_used": ("gauge", 300),
        "bytes_transferred": ("custom_bytes_count", 352),
        "network_latency_min": ("custom_min_latency", 1),
        "network_latency_max": ("custom_max_latency", 500),
        "network_latency_p50": ("custom_p50_latency", 0),
        "network_latency_p95": ("custom_p95_latency", 0),
        "network_latency_first": ("custom_first_latency", 500),
        "network_latency_sum": ("time", 601),
        "network_latency_count": ("count", 3),
    }


def test_a_network_leaf_that_got_no_message_has_the_same_figures() -> None:
    used, unused = NetworkFigures(), NetworkFigures()
    used.remote_connections = unused.remote_connections = 1
    used.message_received(0, rows=10, size=100, created=1_000, received=1_500)
    assert by_name(used.to_proto(1)).keys() == by_name(unused.to_proto(1)).keys()


def test_a_network_leaf_that_read_this_worker_alone_has_no_figures_of_the_network() -> None:
    figures = NetworkFigures().to_proto(1)
    assert by_name(figures).keys() == {"output_rows", "output_bytes", "local_connections_used"}


def test_the_rows_of_messages_are_read_from_their_headers() -> None:
    words = pa.array(["x", "y", "x"]).dictionary_encode()
    batch = pa.record_batch({"words": words, "others": words, "numbers": [1, 2, 3]})
    encoder = Encoder(batch.schema, 2**20)
    messages = [encoder.schema(), *encoder.encode([batch]), *encoder.encode([batch.slice(0, 2)])]
    assert {header_type(message.header): row_count(message.header) for message in messages[:4]} == {
        HeaderType.SCHEMA: 0,
        HeaderType.DICTIONARY_BATCH: 0,
        HeaderType.RECORD_BATCH: 3,
    }
    assert row_count(messages[-1].header) == 2


# What the crate writes of a sketch with its defaults before the bins: the most bins, gamma and its logarithm, the
# smallest number, and an offset.
SKETCH_CONFIG = "00080000fd4a815abf52f03f97059d050e7b943f95d626e80b2e113e0d040000"
STORE = Struct("<QiiiQ?")


def quantile(sketch: bytes, q: float) -> float:
    """As the crate computes it from what it reads."""
    count_of_bins, *_ = Struct("<Q").unpack_from(sketch, 32)
    bins = Struct(f"<{count_of_bins}Q").unpack_from(sketch, 40)
    place = 40 + 8 * count_of_bins
    count, first, last, offset, most, collapsed = STORE.unpack_from(sketch, place)
    assert (sum(bins), first, last, most, collapsed) == (count, offset, offset + len(bins) - 1, 2048, False)
    rank, seen = int(q * (count - 1)), 0
    for key, times in enumerate(bins, offset):
        seen += times
        if seen > rank:
            return math.exp(key * 0.020000666706669543) * 2 / (1 + 1.02020202020202)
    raise AssertionError(q)


@pytest.mark.parametrize(
    "values",
    [[1], [250_000], list(range(1, 2000)), [7**k for k in range(21)]],
    ids=["one nanosecond", "one value", "many", "up to two years"],
)
def test_percentiles_are_right_within_a_percent(values: list[int]) -> None:
    sketch = Sketch()
    for value in reversed(values):
        sketch.add(value)
    encoded = sketch.to_bytes()
    assert encoded[:32].hex() == SKETCH_CONFIG
    for q in (0.5, 0.95):
        assert quantile(encoded, q) == pytest.approx(values[int(q * (len(values) - 1))], rel=0.0101)
    # An empty store of negative numbers, then the smallest, the largest, the sum, and no zeros.
    negative = bytes(8) + STORE.pack(0, 2**31 - 1, -(2**31), 0, 2048, False)
    assert encoded.endswith(negative + Struct("<dddQ").pack(values[0], values[-1], sum(values), 0))
    assert (sketch.count, sketch.min, sketch.max, sketch.sum) == (len(values), values[0], values[-1], sum(values))
