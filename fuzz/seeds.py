"""Real plans to be mutated: what DataFusion makes of SQL over small tables, and what coordinators send."""

import datetime
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datafusion import SessionConfig, SessionContext, udf

from fuzz.building import distributed, network, node, schema
from fuzz.cases import EXECUTE_QUERY, Case, Kind
from worker import plan_proto
from worker.plan_proto import Message
from worker.proto import plan_pb2, worker_pb2

ROWS = 200

# Nobody listens there: what a mutated plan asks of other workers is refused at once.
NOBODY = "http://127.0.0.1:1"

QUERY = uuid.UUID(int=7).bytes

QUERIES = (
    "SELECT * FROM orders",
    "SELECT key, price * 2 AS double, city FROM orders WHERE price > 50 AND city LIKE 'O%' ORDER BY price DESC LIMIT 7",
    "SELECT city, count(*) AS n, sum(price) AS s, avg(price) AS a FROM orders GROUP BY city HAVING count(*) > 1",
    "SELECT DISTINCT city FROM orders ORDER BY city",
    "SELECT o.city, sum(l.amount) AS s FROM orders o JOIN lines l ON o.key = l.key WHERE l.day < '2026-03-01' "
    "GROUP BY o.city ORDER BY s DESC",
    "SELECT * FROM orders o LEFT JOIN lines l ON o.key = l.key AND l.amount > o.price",
    "SELECT * FROM orders o FULL JOIN few f ON o.key = f.id",
    "SELECT count(*) FROM orders o JOIN few f ON o.price > f.id * 10",
    "SELECT * FROM orders WHERE key IN (SELECT key FROM lines WHERE amount > 5)",
    "SELECT * FROM orders WHERE key NOT IN (SELECT id FROM few WHERE id IS NOT NULL)",
    "SELECT * FROM orders o WHERE price > (SELECT avg(amount) FROM lines l WHERE l.key = o.key)",
    "SELECT city, (SELECT max(amount) FROM lines) AS most FROM orders",
    "SELECT a.id, b.id FROM few a CROSS JOIN few b",
    "SELECT key, row_number() OVER (PARTITION BY city ORDER BY price) AS r, lag(price, 2) OVER (ORDER BY key) AS p, "
    "sum(price) OVER (ORDER BY key ROWS BETWEEN 3 PRECEDING AND CURRENT ROW) AS s FROM orders",
    "SELECT city, price, first_value(key) OVER (PARTITION BY city ORDER BY price RANGE BETWEEN UNBOUNDED PRECEDING "
    "AND CURRENT ROW) AS f FROM orders",
    "SELECT city FROM orders UNION ALL SELECT name FROM few UNION ALL SELECT 'x'",
    "SELECT key FROM orders INTERSECT SELECT key FROM lines",
    "SELECT key FROM orders EXCEPT SELECT id FROM few",
    "SELECT city, day, sum(amount) FROM orders o JOIN lines l ON o.key = l.key "
    "GROUP BY GROUPING SETS ((city), (day), (city, day), ())",
    "SELECT city, key, count(*) FROM orders GROUP BY ROLLUP (city, key)",
    "SELECT value FROM generate_series(1, 100, 3)",
    "SELECT value FROM generate_series(TIMESTAMP '2026-01-01', TIMESTAMP '2026-02-01', INTERVAL '1 day')",
    "SELECT * FROM (VALUES (1, 'a', 1.5), (2, NULL, 2.5)) AS v (n, s, f)",
    "SELECT unnest(tags) AS tag, id FROM few",
    "SELECT id, tags[1], cardinality(tags), point['x'] FROM few",
    "SELECT array_agg(name ORDER BY id) AS l, string_agg(name, ',') AS s, median(id), approx_distinct(name) FROM few",
    "SELECT arrow_cast(name, 'Dictionary(Int32, Utf8)') AS d, arrow_cast(id, 'Decimal128(20, 3)') AS m FROM few",
    "SELECT CASE WHEN id > 3 THEN name WHEN id IS NULL THEN 'none' ELSE upper(name) END AS c FROM few",
    "SELECT id FROM few WHERE tags <> [1, 2, 3] OR point = named_struct('x', 1, 'y', 2.5) OR id IN (1, 2, 3, 4, 5)",
    "SELECT MAP {'a': id, 'b': 2} AS m, make_array(id, 3) AS l FROM few",
    "SELECT date_trunc('month', day) AS m, extract(year FROM day) AS y, day + INTERVAL '3 days' AS d FROM lines",
    "SELECT to_char(day, '%Y-%m-%d'), day AT TIME ZONE 'Europe/Rome' FROM "
    "(SELECT CAST(day AS TIMESTAMP) AS day FROM lines)",
    "SELECT regexp_replace(name, 'a+', 'b'), concat(name, '-', id), substr(name, 2, 3), repeat(name, 2) FROM few",
    "SELECT * FROM words WHERE length > 3 ORDER BY word",
    "SELECT word, coalesce(length, 0) FROM words w JOIN few f ON w.length = f.id",
    "SELECT * FROM events WHERE kind = 'a' OR kind = 'b' OR value < 3",
    "SELECT kind, max(value), min(value), stddev(value), corr(value, value) FROM events GROUP BY kind",
    "SELECT a.key FROM orders a JOIN orders b ON a.key = b.key JOIN orders c ON b.key = c.key LIMIT 5",
    "SELECT twice(id) AS t FROM few WHERE twice(id) > 4",
    "SELECT sum(amount) FILTER (WHERE amount > 2), count(DISTINCT key) FROM lines",
    "SELECT key FROM orders ORDER BY city, price, key DESC NULLS LAST",
    "EXPLAIN SELECT key FROM orders",
    "EXPLAIN ANALYZE SELECT count(*) FROM few",
    "SELECT 1 AS one, 'text' AS t, NULL AS n, DATE '2026-01-01' AS d, X'00ff' AS b, TIMESTAMP '2026-01-01' AS ts",
)


def write_tables(folder: Path) -> None:
    """Writes the tables that plans are over: two Parquet files, one of CSV and one of JSON."""
    numbers = range(ROWS)
    cities = ["Oslo", "Rome", "Bonn", None]
    orders = {"key": [*numbers], "city": [cities[at % 4] for at in numbers], "price": [at * 1.5 for at in numbers]}
    pq.write_table(pa.table(orders), folder / "orders.parquet")
    day = datetime.date(2026, 1, 1)
    lines = {
        "key": [at // 2 for at in numbers],
        "amount": pa.array([at % 9 for at in numbers], pa.decimal128(12, 2)),
        "day": [day + datetime.timedelta(days=at) for at in numbers],
    }
    pq.write_table(pa.table(lines), folder / "lines.parquet", row_group_size=50)
    words = "\n".join(f"{'w' * (at % 7)},{at % 7}" for at in numbers)
    (folder / "words.csv").write_text(f"word,length\n{words}\n")
    events = [{"kind": "abc"[at % 3], "value": at} for at in numbers]
    (folder / "events.json").write_text("".join(json.dumps(each) + "\n" for each in events))


def few() -> pa.RecordBatch:
    """A table that is in the plan."""
    return pa.RecordBatch.from_pydict(
        {
            "id": pa.array([1, 2, None, 4], pa.int64()),
            "name": pa.array(["a", "bb", "ccc", None]),
            "tags": pa.array([[1, 2], [], None, [3]], pa.list_(pa.int64())),
            "point": pa.array([{"x": 1, "y": 2.5}] * 4, pa.struct({"x": pa.int64(), "y": pa.float64()})),
        }
    )


def session(folder: Path, partitions: int = 2) -> SessionContext:
    """A session that knows the tables of a folder."""
    made = SessionContext(
        SessionConfig({"datafusion.optimizer.repartition_file_min_size": "0"}).with_target_partitions(partitions)
    )
    made.register_parquet("orders", folder / "orders.parquet")
    made.register_parquet("lines", folder / "lines.parquet")
    made.register_csv("words", folder / "words.csv")
    made.register_json("events", folder / "events.json")
    made.register_record_batches("few", [[few()]])
    made.register_udf(udf(lambda values: pc.add(values, values), [pa.int64()], pa.int64(), "volatile", "twice"))
    return made


def plans(folder: Path) -> Iterator[Message]:
    """The plans of all queries, those around them that DataFusion plans seldom, and those of coordinators."""
    made = []
    for partitions in (1, 3):
        context = session(folder, partitions)
        made += [plan_proto.parse(context.sql(query).execution_plan().to_bytes()) for query in QUERIES]
    merge = SessionContext(SessionConfig({"datafusion.optimizer.prefer_hash_join": "false"}).with_target_partitions(2))
    merge.register_parquet("orders", folder / "orders.parquet")
    made.append(
        plan_proto.parse(
            merge.sql("SELECT a.key FROM orders a JOIN orders b ON a.key = b.key").execution_plan().to_bytes()
        )
    )
    yield from made
    yield from _sinks(folder)
    first = made[0]
    yield node("coalesce_batches", first, target_batch_size=8192)
    yield node("buffer", first, capacity=1 << 20)
    yield node("cooperative", first)
    yield node("repartition", first, partitioning={"round_robin": 4})
    yield node("interleave", first, first)
    yield node("empty", schema=schema(pa.int64(), pa.string()), partitions=2)
    yield node("placeholder_row", schema=schema(pa.int64(), pa.list_(pa.string())), partitions=1)
    yield distributed("partition_isolator", first, n_tasks=2)
    yield distributed("broadcast", first, consumer_task_count=2)
    yield node("merge", distributed("sampler", first))
    children = [{"child_ctx": [{"child_idx": 0, "task_idx": 0, "task_count": 1}]}]
    yield distributed("children_isolator_union", first, first, partition_count=2, task_idx_map=children)
    stage = made[2].SerializeToString()
    for kind in ("shuffle", "coalesce", "network_broadcast"):
        yield node("merge", network(kind, 3, [NOBODY, NOBODY], QUERY))
    yield node("merge", network("coalesce", 3, [NOBODY], QUERY, plan_proto=stage))


def _sinks(folder: Path) -> Iterator[Message]:
    context = session(folder)
    for kind in ("csv", "json", "parquet"):
        copy = f"COPY (SELECT key, price FROM orders) TO '{folder}/written.{kind}'"
        yield plan_proto.parse(context.sql(copy).execution_plan().to_bytes())


def requests(folder: Path) -> list[Case]:
    """One real request of each kind but those that are plans alone."""
    plan = next(plans(folder)).SerializeToString()
    key = worker_pb2.TaskKey(query_id=EXECUTE_QUERY, stage_id=0, task_number=0)
    stage = plan_pb2.StageKey(query_id=uuid.UUID(int=9).bytes, stage_id=1)
    ticket = plan_pb2.DoGet(plan_proto=plan, target_task_count=1, stage_key=stage).SerializeToString()
    task = worker_pb2.SetPlanRequest(
        task_key=worker_pb2.TaskKey(query_id=uuid.UUID(int=11).bytes, stage_id=1),
        task_count=1,
        plan_proto=plan,
        target_worker_url=NOBODY,
        query_start_time_ns=1_800_000_000_000_000_000,
    )
    partitioning = plan_proto.Partitioning()
    partitioning.hash.hash_expr.add().column.name = "x"
    partitioning.hash.partition_count = 4
    heads = (
        {"none": worker_pb2.NoneHead()},
        {"broadcast": worker_pb2.BroadcastExecHead(output_partitions=2)},
        {"repartition": worker_pb2.RepartitionExecHead(partitioning=partitioning.SerializeToString())},
    )
    return [
        Case(Kind.TICKET, ticket),
        Case(Kind.DESCRIPTOR, ticket),
        Case(Kind.SET_PLAN, task.SerializeToString()),
        *(
            Case(
                Kind.EXECUTE,
                worker_pb2.ExecuteTaskRequest(task_key=key, target_partition_end=1, **head).SerializeToString(),
            )
            for head in heads
        ),
    ]
