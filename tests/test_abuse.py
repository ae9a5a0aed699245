"""Abuse of all kinds at the same time leaves nothing behind; ``python -m fuzz.abuse`` is the same for ten minutes."""

from pathlib import Path

import pytest

from fuzz.abuse import abused

# DataFusion's threads come and go, and allocators keep what was needed at the same time, which chance decides: a leak
# of them is seen by a longer run.
THREADS_SLACK = 64
MEMORY_SLACK = 2 << 30


@pytest.mark.slow
async def test_abuse_leaves_nothing_behind(tmp_path: Path) -> None:
    outcome = await abused(tmp_path / "log", scale=0.05, minutes=0.05, is_patient=False)
    assert outcome.problems(threads=THREADS_SLACK, memory=MEMORY_SLACK) == [], "\n".join(outcome.report())
