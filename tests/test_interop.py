"""Flight clients that nobody here wrote read what the worker sends: ``interop/README.md`` says what they check."""

import asyncio
import os
import re
from asyncio.subprocess import PIPE
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
from datafusion import SessionContext
from exact import assert_exact
from strategies import generated_streams
from support import do_get, fetch_one
from type_cases import CASES, PARTS, Stream, in_process

from worker.config import Compression
from worker.output import COMPRESSION
from worker.testing import running_worker

# The executables of the checkers, which ``.ci/interop`` builds.
CHECKERS = {"rust": "FLIGHT_CHECK_RUST", "go": "FLIGHT_CHECK_GO"}

GENERATED = 200

# Lists of size 0: arrow-go takes none, and arrow-rs forgets how many there are. So it does with binaries of size 0,
# which is seen in sparse unions, whose children have to be as many. Of dictionaries with nested values, arrow-go does
# not read the file that is expected, and arrow-rs panics where a body is not aligned in its memory.
UNREAD = re.compile(
    r"fixed_size_list<.*>\[0\]|sparse_union<.*fixed_size_binary\[0\]|dictionary<values=(?:\w*list|\w*union|struct|map)"
)


def _generated() -> dict[str, Stream]:
    """Streams that are the same each time, as long as ``hypothesis`` is.

    It takes values from the modules of a program too: in a process of its own, there are none.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = [pa.ipc.open_stream(data) for data in process.submit(generated_streams, GENERATED).result()]
    plans = {}
    for number, reader in enumerate(found):
        schema, batches = reader.schema, list(reader)
        if len({*schema.names}) == len(schema.names) and not UNREAD.search(str(schema.types)):
            plan = SessionContext().create_dataframe([batches]).execution_plan().to_bytes()
            # DataFusion does not read all that it writes into plans: run ends of no rows, some sparse unions and nulls.
            with suppress(Exception):
                in_process(plan)
                plans[f"generated-{number}"] = Stream(plan, schema, batches)
    assert len(plans) > GENERATED / 2
    return plans


def ipc(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


async def check_folder(client: str, url: str, folder: Path, *pems: Path) -> list[str]:
    """What a checker says of each ticket in a folder; the test is skipped where there is no such checker."""
    checker = os.environ.get(CHECKERS[client])
    if checker is None:
        pytest.skip(f"{CHECKERS[client]} does not say where the {client} checker is: see interop/README.md")
    process = await asyncio.create_subprocess_exec(checker, url, folder, *pems, stdout=PIPE)
    output, _ = await process.communicate()
    return output.decode().splitlines()[:-1]


@pytest.fixture(scope="module")
def generated() -> dict[str, Stream]:
    return _generated()


async def test_pyarrow_reads_what_was_generated(generated: dict[str, Stream]) -> None:
    async with running_worker() as worker:
        for stream in generated.values():
            assert_exact(await fetch_one(worker, do_get(stream.plan)), stream.schema, stream.batches)


@pytest.mark.parametrize("compression", get_args(Compression))
@pytest.mark.parametrize("client", CHECKERS)
async def test_a_checker_reads_all(client: str, compression: str, generated: dict[str, Stream], tmp_path: Path) -> None:
    saved = {f"{name}-{part}": case.stream(part) for name, case in CASES.items() for part in PARTS} | generated
    for name, stream in saved.items():
        (tmp_path / f"{name}.ticket").write_bytes(do_get(stream.plan))
        (tmp_path / f"{name}.headers").write_text(f"{COMPRESSION}: {compression}\n")
        # As DataFusion makes it: pyarrow writes lists of no rows in a way that arrow-rs refuses.
        (tmp_path / f"{name}.arrow").write_bytes(ipc(stream.schema, in_process(stream.plan)))
    async with running_worker() as worker:
        lines = await check_folder(client, worker.url, tmp_path)
    assert len(lines) == len(saved)
    failed = {line.removeprefix("FAIL ").partition(":")[0]: line for line in lines if not line.startswith("ok ")}
    unread = {f"{name}-{part}" for name, case in CASES.items() for part in PARTS if client in case.unread_by}
    assert failed.keys() == unread, "\n".join(failed.values())
