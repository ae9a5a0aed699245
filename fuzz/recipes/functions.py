"""Functions that take memory which no pool counts, numbers that overflow, and functions that come in the plan."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from fuzz.building import (
    X,
    call,
    column,
    literal,
    planned,
    projected,
)
from fuzz.cases import Kind
from fuzz.recipes.recipe import I32, I64, Recipe, recipe
from worker import plan_proto
from worker.plan_proto import Message


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _functions()
    yield from _pickles()


FUNCTIONS: Mapping[str, tuple[str, Any]] = {
    "repeat_2_40": ("SELECT repeat('x', x) AS y FROM t", 1 << 40),
    "repeat_2_33": ("SELECT repeat('x', x) AS y FROM t", 1 << 33),
    "repeat_2_30": ("SELECT repeat('xxxxxxxx', x) AS y FROM t", 1 << 28),
    "lpad_2_24": ("SELECT lpad('x', x) AS y FROM t", 1 << 24),
    "rpad_2_24": ("SELECT rpad('x', x, 'ab') AS y FROM t", 1 << 24),
    "repeat_large_2_40": ("SELECT repeat(arrow_cast('x', 'LargeUtf8'), x) AS y FROM t", 1 << 40),
    "array_resize_large_2_40": ("SELECT array_resize(arrow_cast([1], 'LargeList(Int64)'), x, 7) AS y FROM t", 1 << 40),
    "percentile_of_2_32_centroids": ("SELECT approx_percentile_cont(x, 0.5, 4000000000) AS y FROM t", 1),
    "range_2_40": ("SELECT range(0, x) AS y FROM t", 1 << 40),
    "range_2_62": ("SELECT range(-x, x) AS y FROM t", 1 << 62),
    "generate_series_2_34": ("SELECT generate_series(0, x) AS y FROM t", 1 << 34),
    "array_repeat_2_40": ("SELECT array_repeat(7, x) AS y FROM t", 1 << 40),
    "array_resize_2_40": ("SELECT array_resize([1], x, 7) AS y FROM t", 1 << 40),
    "chr_negative": ("SELECT chr(x) AS y FROM t", -1),
    "chr_surrogate": ("SELECT chr(x) AS y FROM t", 0xD800),
    "factorial_overflow": ("SELECT factorial(x) AS y FROM t", 1 << 40),
    "power_overflow": ("SELECT power(x, x) AS y FROM t", 1 << 40),
    "division_overflow": ("SELECT x / -1 AS y FROM t", -(1 << 63)),
    "remainder_overflow": ("SELECT x % -1 AS y FROM t", -(1 << 63)),
    "division_by_zero": ("SELECT 1 / x AS y FROM t", 0),
    "abs_overflow": ("SELECT abs(x) AS y FROM t", -(1 << 63)),
    "negation_overflow": ("SELECT -x AS y FROM t", -(1 << 63)),
    "gcd_overflow": ("SELECT gcd(x, x) AS y FROM t", -(1 << 63)),
    "shift_2_62": ("SELECT x << x AS y FROM t", 1 << 62),
    "substr_overflow": ("SELECT substr('abc', x, x) AS y FROM t", I64),
    "left_negative": ("SELECT left('abc', x) AS y FROM t", -(1 << 63)),
    "split_part_overflow": ("SELECT split_part('a.b', '.', x) AS y FROM t", -(1 << 63)),
    "round_overflow": ("SELECT round(1.5, x) AS y FROM t", I32),
    "trunc_overflow": ("SELECT trunc(1.5, x) AS y FROM t", -(1 << 31)),
    "make_date_overflow": ("SELECT make_date(x, x, x) AS y FROM t", I32),
    "from_unixtime_overflow": ("SELECT from_unixtime(x) AS y FROM t", I64),
    "to_timestamp_overflow": ("SELECT to_timestamp_seconds(x) + INTERVAL '1 year' AS y FROM t", I64),
    "date_bin_0": ("SELECT date_bin(INTERVAL '0 second', to_timestamp_seconds(x)) AS y FROM t", 1),
    "array_element_overflow": ("SELECT [1, 2][x] AS y FROM t", -(1 << 63)),
    "array_slice_overflow": ("SELECT array_slice([1, 2], x, -x, x) AS y FROM t", I64),
    "lag_overflow": ("SELECT lag(x, -9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "lead_overflow": ("SELECT lead(x, 9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "ntile_2_63": ("SELECT ntile(9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "nth_value_overflow": ("SELECT nth_value(x, -9223372036854775807) OVER (ORDER BY x) AS y FROM t", 1),
    "window_frame_2_63": (
        "SELECT sum(x) OVER (ORDER BY x ROWS BETWEEN 9223372036854775807 PRECEDING "
        "AND 9223372036854775807 FOLLOWING) AS y FROM t",
        1,
    ),
    "window_range_overflow": (
        "SELECT sum(x) OVER (ORDER BY x RANGE BETWEEN 9223372036854775807 PRECEDING AND CURRENT ROW) AS y FROM t",
        -(1 << 63),
    ),
    "sum_overflow": ("SELECT sum(x) AS y FROM (SELECT x FROM t UNION ALL SELECT x FROM t)", I64),
    "cast_overflow": ("SELECT arrow_cast(x, 'Decimal128(2, 2)') AS y FROM t", I64),
    "cast_to_date_overflow": ("SELECT arrow_cast(arrow_cast(x, 'Timestamp(Second, None)'), 'Date32') AS y FROM t", I64),
    "to_char_pattern": ("SELECT to_char(to_timestamp_seconds(x), '%9999999999Y%Q%%%') AS y FROM t", 1),
    "to_hex_negative": ("SELECT to_hex(x) AS y FROM t", -(1 << 63)),
    "regexp_replace_bomb": ("SELECT regexp_replace(repeat('a', x), 'a', repeat('b', 1000), 'g') AS y FROM t", 100_000),
    "replace_bomb": ("SELECT replace(repeat('a', x), 'a', repeat('b', 1000)) AS y FROM t", 10_000),
    "levenshtein_quadratic": ("SELECT levenshtein(repeat('a', x), repeat('b', x)) AS y FROM t", 10_000),
}


def _functions() -> Iterator[Recipe]:
    """Memory that no pool counts, and numbers that overflow."""
    for name, (query, value) in FUNCTIONS.items():
        narrow = name in {"round_overflow", "trunc_overflow", "make_date_overflow"}
        plan = _over(query, value, kind=pa.int32() if narrow else pa.int64())
        kind = Kind.TASK if name.startswith("array_resize") else Kind.PLAN
        yield recipe(f"call_{name}", "a function with numbers that nobody means", plan, kind)
    yield recipe("call_of_nobody", "a function that is not there", projected(call("harm", X)))
    yield recipe("call_with_nul", "a NUL in a function's name", projected(call("abs\0", X)))
    yield recipe("call_with_1_mb", "a long name", projected(call("a" * (1 << 20), X)))
    yield recipe("call_without_arguments", "a function of one value without any", projected(call("abs")))
    yield recipe(
        "call_that_returns_another_type", "a number said to be a text", projected(call("abs", X, returns="UTF8"))
    )
    many = call("concat", *[literal(utf8_value="x")] * 20_000, returns="UTF8")
    yield recipe("call_with_20_000_arguments", "many arguments", projected(many))


def _pickles() -> Iterator[Recipe]:
    """Python functions that come in the plan: code of the stranger's."""
    about = "a pickled function, which must not be unpickled"
    for name, prefix in (("scalar", b"DFPYUDF"), ("aggregate", b"DFPYUDA"), ("window", b"DFPYUDW")):
        pickle = prefix + b"\x01cos\nsystem\n(S'kill -9 $PPID'\ntR."
        if name == "scalar":
            message = projected(
                {"scalar_udf": {"name": "abs", "args": [X], "fun_definition": pickle, "return_type": {"INT64": {}}}}
            )
        elif name == "aggregate":
            message = planned("SELECT sum(x) AS y FROM t", t=column([1]))
            for each in plan_proto.functions(message):
                each.fun_definition = pickle
        else:
            message = planned("SELECT sum(x) OVER (ORDER BY x) AS y FROM t", t=column([1]))
            for each in plan_proto.functions(message):
                each.fun_definition = pickle
        yield recipe(f"pickled_{name}_function", about, message)
        yield recipe(f"pickled_{name}_function_as_task", about, message, Kind.TASK)
    unknown = {"scalar_udf": {"name": "abs", "args": [X], "fun_definition": b"\x80harm", "return_type": {"INT64": {}}}}
    yield recipe("function_for_a_codec", "a definition that only a codec knows", projected(unknown))


def _over(query: str, *values: Any, kind: pa.DataType | None = None) -> Message:
    """A query over a table ``t`` whose values are in the plan: planning has no constants to fold."""
    return planned(query, t=column(list(values), kind))
