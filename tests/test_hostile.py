"""The corpus of hostile plans against a worker in a process of its own, with a client that means no harm beside them.

Each case has its expected answer in ``data/hostile/index.json``; ``python -m fuzz.corpus`` writes that.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from fuzz.corpus import CORPUS, Entry, How, entries, options, prepare
from fuzz.recipes import recipes
from fuzz.target import RECOVERY_SECONDS, Target, target

ENTRIES = entries()
REPLACED = [entry for entry in ENTRIES if entry.how is How.REPLACED]

# On machines that have other things to do, and start a worker in several seconds.
PATIENCE = 30.0

# The corpus is small, so that it can grow.
MAX_BYTES = 3 << 20


@asynccontextmanager
async def attacked(folder: Path) -> AsyncIterator[Target]:
    """A worker and its bystander, who got right answers and no others when the block has ended."""
    prepare(folder)
    async with target(*options(folder)) as running:
        assert await running.bystander.ask()
        async with running.bystander.asking():
            yield running
        assert running.bystander.problems == []
        assert running.bystander.answers > 1


def test_the_corpus_is_complete() -> None:
    assert len(ENTRIES) >= 120
    assert {entry.name for entry in ENTRIES} >= {name for name, _, _ in recipes()}
    files = {file.stem: file.stat().st_size for file in CORPUS.glob("*.binpb")}
    assert set(files) <= {entry.name for entry in ENTRIES}
    assert sum(files.values()) < MAX_BYTES
    assert all(entry.how for entry in ENTRIES)


@pytest.mark.slow
async def test_every_case_is_answered_as_expected_and_nobody_else_notices(tmp_path: Path) -> None:
    """By one and the same process, which holds nothing afterwards."""
    unexpected = []
    async with attacked(tmp_path) as running:
        for entry in ENTRIES:
            if entry.how is not How.REPLACED:
                # Once more, if need be: where others are busy too, some take longer than they have.
                for _ in range(2):
                    answer = await running.client.send(entry.case(tmp_path))
                    assert not await running.died_over(answer), entry.name
                    assert not answer.is_unforeseen, (entry.name, answer)
                    if entry.is_answered_by(answer, tmp_path):
                        break
                else:
                    unexpected.append((entry.name, answer))
        assert unexpected == []
        assert await running.comes_to_rest(PATIENCE) == {}
        assert running.bystander.retries == 0


@pytest.mark.slow
@pytest.mark.parametrize("entry", REPLACED, ids=[entry.name for entry in REPLACED])
async def test_what_ends_the_process_is_refused_the_third_time(
    entry: Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    1. The case ends the worker, twice; whoever sent it is told that the worker is not there.
    2. Each time another worker takes its place, and answers whoever asks again.
    3. The third time the case is refused, and the worker lives on.
    """
    case = entry.case(tmp_path)
    async with attacked(tmp_path) as running:
        for _ in range(2):
            answer = await running.client.send(case)
            assert answer.status is grpc.StatusCode.UNAVAILABLE
            assert await running.died_over(answer)
            seconds = await running.recovered(PATIENCE)
            with capsys.disabled():
                sys.stdout.write(f" back after {seconds:.1f} s; {RECOVERY_SECONDS} s where nothing else runs")
        answer = await running.client.send(case)
        assert answer.status is grpc.StatusCode.FAILED_PRECONDITION
        assert "ended the worker" in answer.text
        assert not running.has_died()
