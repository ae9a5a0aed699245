"""Expressions that are flat on the wire and deep, or quadratic, in memory."""

from collections.abc import Iterator, Mapping
from typing import Any

from fuzz.building import (
    X,
    literal,
    node,
    numbers,
    projected,
)
from fuzz.cases import Kind
from fuzz.recipes.recipe import U32, U64, Recipe, recipe


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _expressions()


def _expressions() -> Iterator[Recipe]:
    """What is flat on the wire and deep, or quadratic, in memory."""
    for count in (3_000, 60_000):
        chain = {"binary_expr": {"op": "Or", "operands": [literal(bool_value=True)] * count}}
        yield recipe(f"operands_{count}", "a chain of operands, as deep as it is long", projected(chain))
    pairs = {"binary_expr": {"op": "And", "operands": [{"binary_expr": {"op": "Or", "operands": [X] * 500}}] * 40}}
    yield recipe("operands_in_operands", "chains in chains", projected(pairs))
    yield recipe("operands_none", "an operator without operands", projected({"binary_expr": {"op": "Or"}}))
    one = {"binary_expr": {"op": "Or", "operands": [X]}}
    yield recipe("operands_one", "an operator with one operand", projected(one))
    yield recipe(
        "operator_unknown", "an operator that is none", projected({"binary_expr": {"op": "Harm", "l": X, "r": X}})
    )
    expression: Mapping[str, Any] = literal(bool_value=True)
    for _ in range(45):
        expression = {"not_expr": {"expr": expression}}
    yield recipe("not_not_not", "as deep as protobuf takes", projected(expression))
    yield recipe("column_2_32", "a column that is not there", projected({"column": {"name": "x", "index": U32}}))
    yield recipe("column_unknown", "a column that has no place", projected({"unknown_column": {"name": "y"}}))
    yield recipe("expression_nothing", "an expression that is none", projected({}))
    cases = {"case_": {"when_then_expr": [{"when_expr": X, "then_expr": X}] * 5_000}}
    yield recipe("case_of_numbers", "5,000 branches, none of them a boolean", projected(cases))
    listed = {"in_list": {"expr": X, "list": [literal(utf8_value="a")] * 5_000}}
    yield recipe("in_list_of_another_type", "5,000 values of another type", projected(listed))
    like = {"like_expr": {"expr": literal(utf8_value="a" * 5_000), "pattern": literal(utf8_value="%a" * 2_500 + "b")}}
    yield recipe("like_backtracking", "a pattern with 2,500 wildcards", projected(like))
    for name, pattern in {
        "repetitions": "((((a{100}){100}){100}){100})",
        "alternatives": "(x+x+)+y" * 500,
        "groups": "(" * 2_000 + ")" * 2_000,
    }.items():
        match = {
            "binary_expr": {"op": "RegexMatch", "l": literal(utf8_value="x" * 99), "r": literal(utf8_value=pattern)}
        }
        yield recipe(f"regex_{name}", "an expression that grows when it is compiled", projected(match))
    hashed = {"hash_expr": {"on_columns": [X] * 9, "seed0": U64, "description": "\0"}}
    yield recipe("hash_expression", "an expression that no query has", projected(hashed))
    dynamic = {"dynamic_filter": {"children": [X], "remapped_children": [], "generation": U64, "inner_expr": X}}
    yield recipe("dynamic_filter_with_missing_children", "a filter that lost its columns", projected(dynamic))
    yield recipe(
        "subquery_of_nothing",
        "the result of a subquery that is not there",
        projected({"scalar_subquery": {"index": U32}}),
    )
    yield recipe("lambda_alone", "a function without a caller", projected({"lambda": {"params": ["a"], "body": X}}))
    yield recipe("lambda_variable_alone", "a variable of no function", projected({"lambda_variable": {"index": U32}}))
    yield recipe("expression_of_nobody", "an expression for a codec", projected({"extension": {"expr": b"\xff" * 99}}))
    same = {"expr_id": 1, **X}
    yield recipe(
        "expressions_with_one_number",
        "different expressions of one identity",
        projected(same, {"expr_id": 1, "not_expr": {"expr": X}}),
    )
    keys = [{"sort": {"expr": {"column": {"name": f"e{at}", "index": at}}, "asc": True}} for at in range(400)]
    aliases = node("projection", numbers(), expr=[X] * 400, expr_name=[f"e{at}" for at in range(400)])
    yield recipe("sort_keys_times_aliases", "orderings of aliases of one column", node("sort", aliases, expr=keys))
    yield recipe(
        "projection_names_missing",
        "more expressions than names",
        node("projection", numbers(), expr=[X] * 9, expr_name=["a"]),
    )
    named = node("projection", numbers(), expr=[X], expr_name=["a\0b"])
    yield recipe("projection_name_with_nul", "a NUL in a column's name", named)
    yield recipe("projection_name_with_nul_as_task", "a NUL in a column's name", named, Kind.TASK)
    yield recipe(
        "projection_names_of_1_mb", "a long name", node("projection", numbers(), expr=[X], expr_name=["a" * (1 << 20)])
    )
