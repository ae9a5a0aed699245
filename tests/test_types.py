"""Every type arrives exactly as DataFusion made it: schema, metadata and values, whole, sliced, and without a batch."""

from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow as pa
import pytest
import pytest_asyncio
from datafusion import SessionContext
from exact import assert_exact
from support import do_get, fetch_one
from type_cases import CASES, CLIENTS, NESTED_DICTIONARY, PARTS, in_process, interval

from worker.testing import RunningWorker, running_worker


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def worker() -> AsyncIterator[RunningWorker]:
    async with running_worker() as running:
        yield running


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CASES)
async def test_what_arrives_is_what_datafusion_makes_in_process(worker: RunningWorker, name: str, part: str) -> None:
    stream = CASES[name].stream(part)
    if made := in_process(stream.plan):
        assert_exact(pa.Table.from_batches(made), stream.schema, stream.batches)
    assert_exact(await fetch_one(worker, do_get(stream.plan)), stream.schema, stream.batches)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "columns",
    [
        "i, arrow_cast(t, 'Utf8View')",
        "i, arrow_cast(t, 'Dictionary(Int32, Utf8)')",
        "named_struct('i', i, 't', arrow_cast(t, 'Utf8View'))",
    ],
)
async def test_intervals_that_pyarrow_does_not_show_go_with_what_is_compacted(
    worker: RunningWorker, columns: str
) -> None:
    plan = interval("YearMonth", columns)(SessionContext()).execution_plan().to_bytes()
    made = in_process(plan)
    assert_exact(await fetch_one(worker, do_get(plan)), made[0].schema, made)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.meant])
def test_what_is_lost_was_there(name: str) -> None:
    """Else it would not be lost, and the case about nothing."""
    case = CASES[name]
    assert case.batches is not None
    for meant, made in zip(case.meant, case.batches, strict=True):
        assert not meant.schema.equals(made.schema, check_metadata=True)
        assert_exact(pa.Table.from_batches([pa.record_batch(meant.columns, made.schema)]), made.schema, [made])


def test_a_dictionary_of_dictionaries_does_not_get_into_a_plan() -> None:
    """So that there is no such case."""
    plan = SessionContext().create_dataframe([[NESTED_DICTIONARY]]).execution_plan()
    with pytest.raises(Exception, match="cannot encode direct dictionary-of-dictionary"):
        plan.to_bytes()


def test_the_table_in_the_documentation_is_of_these_cases() -> None:
    lines = (Path(__file__).parent.parent / "docs" / "types.md").read_text().splitlines()
    _header, _line, *table = [line for line in lines if line.startswith("| ")]
    assert table == [_documented(row) for row in dict.fromkeys(case.row for case in CASES.values())]


def _documented(row: str) -> str:
    cases = [case for case in CASES.values() if case.row == row]
    lost = any(case.meant or case.schema_alone for case in cases)
    unread = {client for case in cases for client in case.unread_by}
    read = ["in part" if lost or client in unread else "exact" for client in CLIENTS]
    notes = "; ".join(dict.fromkeys(case.note for case in cases if case.note))
    return f"| {' | '.join([row, ', '.join(case.variant or 'plain' for case in cases), *read, notes])} |"
