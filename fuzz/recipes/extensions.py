"""Nodes of Distributed DataFusion, in both of its dialects."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from fuzz.building import (
    distributed,
    extension,
    file_scan,
    fill,
    network,
    node,
    numbers,
    schema,
    typed_schema,
)
from fuzz.cases import Kind
from fuzz.recipes.recipe import I32, NOBODY, QUERY, U32, U64, Recipe, recipe
from worker import plan_proto
from worker.proto import nodes_pb2


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _extensions()


def _extensions() -> Iterator[Recipe]:
    """Nodes of Distributed DataFusion, in both of its dialects."""
    for kind in (Kind.PLAN, Kind.TASK):
        said = kind.value
        yield recipe(f"extension_garbage_as_{said}", "no node", extension(b"\xff" * 50), kind)
        yield recipe(f"extension_empty_as_{said}", "no node", extension(b""), kind)
        unknown = nodes_pb2.Encoded(blob=b"\xfa\x3e\x03abc")
        yield recipe(f"extension_unknown_as_{said}", "a node of another version", extension(unknown), kind)
        other = nodes_pb2.Encoded(encoder_position=U32, blob=b"harm")
        yield recipe(
            f"extension_of_a_codec_as_{said}", "a node for a codec that is not there", extension(other, numbers()), kind
        )
        yield recipe(
            f"isolator_0_as_{said}",
            "the partitions of no task",
            distributed("partition_isolator", numbers(), n_tasks=0),
            kind,
        )
        yield recipe(
            f"isolator_2_64_as_{said}",
            "the partitions of so many tasks",
            distributed("partition_isolator", numbers(), n_tasks=U64),
            kind,
        )
        yield recipe(
            f"broadcast_2_40_as_{said}",
            "memory for each copy",
            distributed("broadcast", numbers(), consumer_task_count=1 << 40),
            kind,
        )
        yield recipe(
            f"broadcast_of_nothing_as_{said}",
            "a broadcast without input",
            distributed("broadcast", consumer_task_count=1),
            kind,
        )
        nested = numbers()
        for _ in range(9):
            nested = distributed("broadcast", nested, consumer_task_count=100)
        yield recipe(f"broadcasts_in_each_other_as_{said}", "10^18 copies", node("merge", nested), kind)
        children = [{"child_ctx": [{"child_idx": U64, "task_idx": U64, "task_count": 0}]}]
        union = distributed("children_isolator_union", numbers(), partition_count=U64, task_idx_map=children)
        yield recipe(f"isolated_union_out_of_range_as_{said}", "inputs that are not there", union, kind)
        for name, partitions in (("2_40", 1 << 40), ("0", 0)):
            read = network("shuffle", partitions, [NOBODY], QUERY)
            yield recipe(
                f"shuffle_of_{name}_partitions_as_{said}", "memory for each partition", node("merge", read), kind
            )
        read = network("shuffle", 1, [NOBODY], b"short")
        yield recipe(f"shuffle_of_a_short_query_as_{said}", "a query's number of five bytes", read, kind)
        read = network("shuffle", 1, [], QUERY)
        yield recipe(f"shuffle_from_nobody_as_{said}", "a stage without tasks", read, kind)
        read = network("shuffle", 1, ["file:///etc/passwd", "\0", "http://[::1"], QUERY)
        yield recipe(f"shuffle_from_no_url_as_{said}", "workers that are none", read, kind)
        read = network("coalesce", 1, [NOBODY], QUERY, plan_proto=b"\xff" * 99)
        yield recipe(f"coalesce_of_garbage_as_{said}", "a stage's plan that is none", read, kind)
        bad = node("empty", schema=schema(pa.int64()), partitions=U32)
        read = network("coalesce", 1, [NOBODY], QUERY, plan_proto=bad.SerializeToString())
        yield recipe(
            f"coalesce_of_2_32_partitions_as_{said}", "a stage's plan that kills whoever decodes it", read, kind
        )
        hidden = network(
            "coalesce", 1, [NOBODY], QUERY, plan_proto=file_scan("csv_scan", "/etc/passwd").SerializeToString()
        )
        yield recipe(f"coalesce_of_a_file_as_{said}", "a stage's plan that reads what it must not", hidden, kind)
        read = distributed("shuffle", schema=b"\xff", partitioning=b"\xff", input_stage={"query_id": QUERY})
        yield recipe(f"shuffle_of_garbage_as_{said}", "a schema that is none", read, kind)
        huge = distributed(
            "shuffle",
            schema=_schema_bytes(typed_schema({"FIXED_SIZE_BINARY": I32})),
            partitioning=plan_proto.Partitioning(unknown=1).SerializeToString(),
            input_stage={"query_id": QUERY, "num": 2, "tasks": [{"url_str": NOBODY}]},
        )
        yield recipe(f"shuffle_of_large_values_as_{said}", "a type of 2 GiB a value", huge, kind)
        yield recipe(f"sampler_of_nothing_as_{said}", "a sampler without input", distributed("sampler"), kind)


def _schema_bytes(fields: Mapping[str, Any]) -> bytes:
    made = plan_proto.Schema()
    fill(made, fields)
    return bytes(made.SerializeToString())
