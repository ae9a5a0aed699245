"""Types whose values take more memory than there is, or that do not exist, and literals that are not of theirs."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from fuzz.building import (
    X,
    literal,
    node,
    projected,
    schema,
    typed_schema,
)
from fuzz.recipes.recipe import I32, I64, U32, Recipe, recipe


def recipes() -> Iterator[Recipe]:
    """All of them."""
    yield from _types()
    yield from _literals()


TYPES: Mapping[str, Mapping[str, Any]] = {
    "fixed_size_binary_2_31": {"FIXED_SIZE_BINARY": I32},
    "fixed_size_binary_negative": {"FIXED_SIZE_BINARY": -1},
    "fixed_size_binary_2_24": {"FIXED_SIZE_BINARY": 1 << 24},
    "fixed_size_list_2_31": {
        "FIXED_SIZE_LIST": {
            "field_type": {"name": "i", "arrow_type": {"INT64": {}}, "nullable": True},
            "list_size": I32,
        }
    },
    "fixed_size_list_negative": {
        "FIXED_SIZE_LIST": {"field_type": {"name": "i", "arrow_type": {"INT64": {}}, "nullable": True}, "list_size": -1}
    },
    "fixed_size_lists_in_each_other": {
        "FIXED_SIZE_LIST": {
            "list_size": 1 << 15,
            "field_type": {
                "name": "i",
                "nullable": True,
                "arrow_type": {
                    "FIXED_SIZE_LIST": {
                        "list_size": 1 << 15,
                        "field_type": {"name": "i", "nullable": True, "arrow_type": {"INT64": {}}},
                    }
                },
            },
        }
    },
    "decimal128_precision_255": {"DECIMAL128": {"precision": U32, "scale": 127}},
    "decimal256_scale_negative": {"DECIMAL256": {"precision": 76, "scale": -(1 << 31)}},
    "time_zone_with_nul": {"TIMESTAMP": {"time_unit": 2, "timezone": "Europe\0/Rome"}},
    "time_zone_that_is_none": {"TIMESTAMP": {"time_unit": 2, "timezone": "+99:99"}},
    "time_zone_of_50_kb": {"TIMESTAMP": {"time_unit": 2, "timezone": "+" * 50_000}},
    "time_unit_that_is_none": {"TIMESTAMP": {"time_unit": 77}},
    "struct_without_fields": {"STRUCT": {}},
    "list_without_field": {"LIST": {}},
    "map_of_a_number": {"MAP": {"field_type": {"name": "m", "arrow_type": {"INT64": {}}}}},
    "dictionary_with_string_keys": {"DICTIONARY": {"key": {"UTF8": {}}, "value": {"UTF8": {}}}},
    "union_with_wrong_type_ids": {
        "UNION": {
            "union_types": [{"name": "u", "arrow_type": {"INT64": {}}}],
            "union_mode": 1,
            "type_ids": [-7, 7, I32],
        }
    },
    "run_ends_of_strings": {
        "RUN_END_ENCODED": {
            "run_ends_field": {"name": "r", "arrow_type": {"UTF8": {}}},
            "values_field": {"name": "v", "arrow_type": {"UTF8": {}}},
        }
    },
    "interval_that_is_none": {"INTERVAL": 9},
}


def _types() -> Iterator[Recipe]:
    """Sizes that are part of a type, and types that do not exist."""
    for name, arrow_type in TYPES.items():
        about = "a type whose values take more memory than there is, or that is none"
        made = typed_schema(arrow_type)
        yield recipe(f"placeholder_{name}", about, node("placeholder_row", schema=made, partitions=1))
        yield recipe(f"null_{name}", about, projected(literal(null_value=arrow_type)))
        yield recipe(f"cast_{name}", about, projected({"cast": {"expr": X, "arrow_type": arrow_type}}))
    lists: Mapping[str, Any] = {"INT64": {}}
    for _ in range(25):
        lists = {"LIST": {"field_type": {"name": "i", "arrow_type": lists, "nullable": True}}}
    yield recipe("null_of_lists_in_lists", "types in each other", projected(literal(null_value=lists)))
    structs: Mapping[str, Any] = {"INT64": {}}
    for _ in range(3):
        fields = [{"name": f"f{at}", "arrow_type": structs} for at in range(12)]
        structs = {"STRUCT": {"sub_field_types": fields}}
    yield recipe("null_of_structs_in_structs", "a type of 1,885 fields", projected(literal(null_value=structs)))
    wide = {"columns": [{"name": f"c{at}", "arrow_type": {"NONE": {}}} for at in range(5_000)]}
    yield recipe("placeholder_row_of_5_000_columns", "a wide row", node("placeholder_row", schema=wide, partitions=1))


def _literals() -> Iterator[Recipe]:
    """Values that say one thing and are another."""
    yield recipe("literal_nothing", "a literal without a value", projected({"literal": {}}))
    for name, value in {
        "fixed_size_binary_2_31": {"fixed_size_binary_value": {"values": b"ab", "length": I32}},
        "fixed_size_binary_negative": {"fixed_size_binary_value": {"values": b"ab", "length": -5}},
        "decimal128_of_3_bytes": {"decimal128_value": {"value": b"abc", "p": 10, "s": 2}},
        "decimal128_precision_2_63": {"decimal128_value": {"value": bytes(16), "p": I64, "s": -I64}},
        "decimal256_of_nothing": {"decimal256_value": {"value": b"", "p": 76, "s": 76}},
        "int8_2_31": {"int8_value": I32},
        "time_zone_with_nul": {"timestamp_value": {"time_second_value": 1, "timezone": "a\0b"}},
        "timestamp_2_63": {"timestamp_value": {"time_second_value": I64, "timezone": "Europe/Rome"}},
        "timestamp_nothing": {"timestamp_value": {"timezone": "UTC"}},
        "interval_2_63": {"interval_month_day_nano": {"months": I32, "days": -(1 << 31), "nanos": -(1 << 63)}},
        "dictionary_of_dictionaries": {
            "dictionary_value": {
                "index_type": {"INT8": {}},
                "value": {"dictionary_value": {"index_type": {"INT8": {}}, "value": {"utf8_value": "x"}}},
            }
        },
        "dictionary_keyed_by_lists": {"dictionary_value": {"index_type": {"LIST": {}}, "value": {"utf8_value": "x"}}},
        "union_without_fields": {"union_value": {"value_id": -1, "value": {"int64_value": 1}}},
        "union_with_field_2_31": {
            "union_value": {
                "value_id": I32,
                "value": {"int64_value": 1},
                "fields": [{"field_id": I32, "field": {"name": "u", "arrow_type": {"INT64": {}}}}],
            }
        },
        "run_ends_of_strings": {
            "run_end_encoded_value": {
                "run_ends_field": {"name": "r", "arrow_type": {"UTF8": {}}},
                "values_field": {"name": "v", "arrow_type": {"INT64": {}}},
                "value": {"utf8_value": "x"},
            }
        },
        "list_of_nothing": {"list_value": {}},
        "list_of_garbage": {
            "list_value": {"ipc_message": b"garbage" * 9, "arrow_data": b"garbage" * 9, "schema": schema(pa.int64())}
        },
        "list_with_another_schema": {
            "list_value": {"ipc_message": b"", "arrow_data": b"", "schema": typed_schema({"LIST": {}})}
        },
    }.items():
        yield recipe(f"literal_{name}", "a value that its type does not have", projected({"literal": value}))
