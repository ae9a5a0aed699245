"""Files and stores that are not the client's to read or write, and scans that contradict themselves."""

from collections.abc import Iterator
from typing import Any

from fuzz.building import (
    FILES,
    column,
    file_scan,
    fill,
    node,
    numbers,
    scan,
    sink,
)
from fuzz.cases import FOLDER, Kind
from fuzz.recipes.recipe import U32, U64, Recipe, recipe


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _files()


SECRETS = {
    "link": f"{FOLDER}/link",
    "passwd": "/etc/passwd",
    "parent": "/tmp/../etc/passwd",
    "percent": "/tmp/%2e%2e/etc/passwd",
    "percent_slash": "/tmp%2f..%2fetc%2fpasswd",
    "double_percent": "/tmp/%252e%252e/etc/passwd",
    "relative": "etc/passwd",
    "environment": "/proc/self/environ",
    "memory": "/proc/self/mem",
    "root_link": "/proc/self/root/etc/passwd",
    "nul": "/etc/passwd\0.csv",
    "folder": "/etc/",
    "glob": "/etc/*",
    "zeros": "/dev/zero",
    "terminal": "/dev/stdin",
}

URLS = {
    "empty": "",
    "host": "file://somewhere/",
    "mixed_case": "FiLe:///",
    "folder": "file:///etc/",
    "s3": "s3://bucket/",
    "metadata_service": "http://169.254.169.254/",
    "garbage": "::::",
    "nul": "file:///\0",
    "credentials": "https://user:secret@127.0.0.1:1/",
}


def _files() -> Iterator[Recipe]:
    """Files that are not the client's to read or write."""
    for name, path in SECRETS.items():
        yield recipe(
            f"read_{name}", "a file that is not the client's to read", file_scan("csv_scan", path, size=1 << 30)
        )
    for name, url in URLS.items():
        yield recipe(
            f"store_{name}", "a store that is not the client's to use", file_scan("csv_scan", "etc/passwd", url=url)
        )
    for kind in ("csv_sink", "json_sink", "parquet_sink"):
        yield recipe(
            f"write_{kind}", "a file that is not the client's to write", sink(kind, "file:///proc/hostile/out")
        )
    yield recipe(
        "write_over", "a file that is not the client's to write", sink("csv_sink", "/proc/version", overwrite=True)
    )
    yield recipe(
        "write_as_task", "a file that is not the client's to write", sink("csv_sink", "/proc/hostile/out"), Kind.TASK
    )
    yield recipe(
        "read_as_task", "a file that is not the client's to read", file_scan("csv_scan", "/etc/passwd"), Kind.TASK
    )
    hidden = node("scalar_subquery", numbers(), subqueries=[file_scan("csv_scan", "/etc/passwd")])
    yield recipe("read_in_subquery", "a file below a subquery", hidden)
    union = node("union", scan(column(["a"])), sink("csv_sink", "/proc/hostile/out"))
    yield recipe("write_in_union", "a sink below other nodes", union)
    about = "a scan that contradicts itself"
    for kind in ("csv_scan", "parquet_scan"):
        for name, fields in _contradictions(FILES[kind]).items():
            plan = file_scan(kind, FILES[kind])
            conf = getattr(plan, kind).base_conf
            for field in fields:
                conf.ClearField(field)
            fill(conf, fields)
            yield recipe(f"{kind}_{name}", about, plan)
    old = file_scan("parquet_scan", FILES["parquet_scan"], projection=[0, 7])
    old.parquet_scan.base_conf.ClearField("projection_exprs")
    yield recipe("scan_of_51_columns_out_of_range", "an older scan of a column that is not there", old)
    for name, text in (("empty", ""), ("long", "abc"), ("wide", "é")):
        plan = file_scan("csv_scan", FILES["csv_scan"])
        plan.csv_scan.delimiter = plan.csv_scan.quote = plan.csv_scan.escape = plan.csv_scan.comment = text
        yield recipe(f"csv_delimiter_{name}", "a delimiter that is no byte", plan)
    options: Any
    for name, options in {
        "hint_2_64": {"metadata_size_hint": U64},
        "cache_2_64": {"max_predicate_cache_size": U64, "pushdown_filters": True},
        "garbage": {"coerce_int96": "harm", "compression": "harm", "encoding": "harm", "writer_version": "9"},
    }.items():
        plan = file_scan("parquet_scan", FILES["parquet_scan"])
        fill(plan.parquet_scan, {"parquet_options": {"global": {"writer_version": "1.0", **options}}})
        yield recipe(f"parquet_options_{name}", "options that nobody means", plan)
    for name, options in {
        "pages_of_0": {"data_pagesize_limit": 0, "write_batch_size": 0, "max_row_group_size": 0},
        "row_groups_2_64": {"max_row_group_size": U64, "write_batch_size": U64},
        "bloom_filter_2_64": {"bloom_filter_on_write": True, "bloom_filter_ndv": U64, "bloom_filter_fpp": 1e-300},
        "writers_2_64": {
            "allow_single_file_parallelism": True,
            "maximum_parallel_row_group_writers": U64,
            "maximum_buffered_record_batches_per_stream": U64,
        },
    }.items():
        plan = sink("parquet_sink", "file:///proc/hostile/out.parquet", parquet_options={"global": options})
        yield recipe(f"parquet_sink_{name}", "options that nobody means", plan)


def _contradictions(path: str) -> dict[str, dict[str, Any]]:
    return {
        "size_2_64": {"file_groups": [{"files": [{"path": path, "size": U64}]}]},
        "range_negative": {"file_groups": [{"files": [{"path": path, "size": 9, "range": {"start": -9, "end": -99}}]}]},
        "modified_2_64": {"file_groups": [{"files": [{"path": path, "last_modified_ns": U64}]}]},
        "columns_out_of_range": {
            "projection_exprs": {"projections": [{"alias": "y", "expr": {"column": {"index": U32}}}]}
        },
        "without_schema": {"schema": {}},
        "partition_columns_without_values": {"table_partition_cols": ["p", "q", "p"]},
        "statistics_missing": {"statistics": {}},
        "statistics_too_many": {"statistics": {"column_stats": [{}] * 5_000}},
        "statistics_of_2_64_rows": {
            "statistics": {
                "num_rows": {"precision_info": 0, "val": {"uint64_value": U64}},
                "total_byte_size": {"precision_info": 0, "val": {"uint64_value": U64}},
            }
        },
        "constraints_out_of_range": {"constraints": {"constraints": [{"primary_key": {"indices": [U64]}}]}},
        "orderings_out_of_range": {
            "output_ordering": [{"physical_sort_expr_nodes": [{"expr": {"column": {"index": U32}}}]}]
        },
        "10_000_groups": {"file_groups": [{"files": []}] * 10_000},
        "limit_0": {"limit": {"limit": 0}},
        "path_empty": {"file_groups": [{"files": [{"path": "", "size": 9}]}]},
        "path_of_50_kb": {"file_groups": [{"files": [{"path": "/" + "a/" * 25_000, "size": 9}]}]},
    }
