"""Tickets and requests that are none."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from fuzz.building import (
    X,
    file_scan,
    fill,
    literal,
    node,
    numbers,
    schema,
    sink,
)
from fuzz.cases import EXECUTE_QUERY, Case, Kind
from fuzz.recipes.recipe import I32, QUERY, U32, U64, Recipe
from worker import plan_proto
from worker.proto import plan_pb2, worker_pb2


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _requests()
    yield from _executes()


def _requests() -> Iterator[Recipe]:
    """Tickets and requests that are none."""
    plan = numbers().SerializeToString()
    tickets: Mapping[str, bytes] = {
        "empty": b"",
        "garbage": b"\xff" * 99,
        "without_plan": plan_pb2.DoGet(target_partition=1).SerializeToString(),
        "partition_2_64": plan_pb2.DoGet(plan_proto=plan, target_partition=U64).SerializeToString(),
        "task_2_64": plan_pb2.DoGet(plan_proto=plan, target_task_index=U64, target_task_count=1).SerializeToString(),
        "short_key": plan_pb2.DoGet(
            plan_proto=plan, stage_key=plan_pb2.StageKey(query_id=b"short")
        ).SerializeToString(),
        "empty_key": plan_pb2.DoGet(plan_proto=plan, stage_key=plan_pb2.StageKey()).SerializeToString(),
        "plan_of_text": plan_pb2.DoGet(plan_proto=b"SELECT 1").SerializeToString(),
        "cut": plan_pb2.DoGet(plan_proto=plan).SerializeToString()[:-9],
        "groups_in_each_other": b"\x0b" * 5_000,
        "length_2_64": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        "number_without_end": b"\x08" + b"\xff" * 99,
        "twice": plan_pb2.DoGet(plan_proto=plan).SerializeToString()
        + plan_pb2.DoGet(plan_proto=b"\xff").SerializeToString(),
    }
    for name, data in tickets.items():
        yield f"ticket_{name}", "a ticket that is none", Case(Kind.TICKET, data)
        yield f"descriptor_{name}", "a descriptor that is none", Case(Kind.DESCRIPTOR, data)
    killer = node("empty", schema=schema(pa.int64()), partitions=U32).SerializeToString()
    described = {
        "of_2_32_partitions": killer,
        "of_2_20_partitions": node("empty", schema=schema(pa.int64()), partitions=1 << 20).SerializeToString(),
        "of_a_file": file_scan("csv_scan", "/etc/passwd").SerializeToString(),
        "of_a_sink": sink("csv_sink", "/proc/hostile/out").SerializeToString(),
    }
    for name, data in described.items():
        case = Case(Kind.DESCRIPTOR, plan_pb2.DoGet(plan_proto=data).SerializeToString())
        yield f"descriptor_{name}", "a plan that is only described", case
    yield from _set_plans(plan)


def _set_plans(plan: bytes) -> Iterator[Recipe]:
    key = worker_pb2.TaskKey(query_id=QUERY, stage_id=1, task_number=0)
    declared = [worker_pb2.SetPlanRequest.WorkUnitFeedDeclaration(id=b"\xff", partitions=U64)]
    make = partial(worker_pb2.SetPlanRequest, task_key=key, task_count=1, plan_proto=plan)
    for name, request in {
        "empty": worker_pb2.SetPlanRequest(),
        "without_plan": make(plan_proto=b""),
        "without_key": make(task_key=None),
        "short_query": make(task_key=worker_pb2.TaskKey(query_id=b"short")),
        "task_2_64": make(task_key=worker_pb2.TaskKey(query_id=QUERY, stage_id=U64, task_number=U64)),
        "of_2_64_tasks": make(task_count=U64),
        "of_no_tasks": make(task_count=0),
        "fed_with_work": make(work_unit_feed_declarations=declared),
        "for_no_url": make(target_worker_url="\0"),
        "of_another_time": make(query_start_time_ns=U64),
        "garbage": make(plan_proto=b"\xff" * 99),
    }.items():
        yield f"set_plan_{name}", "a request that is none", Case(Kind.SET_PLAN, request.SerializeToString())
    yield "set_plan_bytes", "a request that is none", Case(Kind.SET_PLAN, b"\xff" * 99)


def _executes() -> Iterator[Recipe]:
    key = worker_pb2.TaskKey(query_id=EXECUTE_QUERY, stage_id=0, task_number=0)
    none = worker_pb2.NoneHead()

    def repartition(**fields: Any) -> worker_pb2.RepartitionExecHead:
        message = plan_proto.Partitioning()
        fill(message, fields)
        return worker_pb2.RepartitionExecHead(partitioning=message.SerializeToString())

    make = partial(worker_pb2.ExecuteTaskRequest, task_key=key, target_partition_end=1)
    huge = {"null_value": {"FIXED_SIZE_BINARY": I32}}
    for name, request in {
        "without_head": make(),
        "without_key": make(task_key=None, none=none),
        "of_2_64_partitions": make(none=none, target_partition_end=U64),
        "backwards": make(none=none, target_partition_start=9),
        "from_2_64": make(none=none, target_partition_start=U64, target_partition_end=U64),
        "broadcast_2_64": make(broadcast=worker_pb2.BroadcastExecHead(output_partitions=U64), target_partition_end=U64),
        "broadcast_0": make(broadcast=worker_pb2.BroadcastExecHead(output_partitions=0)),
        "hash_2_64": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": U64})),
        "hash_2_20": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": 1 << 20})),
        "hash_0": make(repartition=repartition(hash={"hash_expr": [X], "partition_count": 0})),
        "hash_by_nothing": make(repartition=repartition(hash={"hash_expr": [{}], "partition_count": 2})),
        "hash_by_large_values": make(
            repartition=repartition(hash={"hash_expr": [literal(**huge)], "partition_count": 2})
        ),
        "hash_out_of_range": make(
            repartition=repartition(hash={"hash_expr": [{"column": {"name": "x", "index": U32}}], "partition_count": 2})
        ),
        "hash_by_60_000_operands": make(
            repartition=repartition(
                hash={
                    "hash_expr": [{"binary_expr": {"op": "Plus", "operands": [X] * 60_000}}],
                    "partition_count": 2,
                }
            )
        ),
        "round_robin_2_32": make(repartition=repartition(round_robin=U32)),
        "unknown_2_64": make(repartition=repartition(unknown=U64)),
        "of_garbage": make(repartition=worker_pb2.RepartitionExecHead(partitioning=b"\xff" * 99)),
    }.items():
        yield f"execute_{name}", "a request that does not fit", Case(Kind.EXECUTE, request.SerializeToString())
    yield "execute_bytes", "a request that is none", Case(Kind.EXECUTE, b"\xff" * 99)
