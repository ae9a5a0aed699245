"""``python -m fuzz``: sends mutated plans to a worker, and says what hurt it."""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from fuzz import seeds
from fuzz.cases import Case
from fuzz.minimize import minimized
from fuzz.mutate import Mutator
from fuzz.target import Answer, Target, Usage, target

MEBIBYTE = 1 << 20

# What a worker may have more than at first, while it holds nothing for anybody.
GROWTH = 600 * MEBIBYTE
MORE_DESCRIPTORS = 40
# Pools fill up, those of the engine for files too, each to its own bound.
MORE_THREADS = 150

# So often it is looked at in between, which takes a while: it has to come to rest.
LOOK_EVERY = 500
REST_SECONDS = 15.0

# In which a worker recovers, and answers others, on a machine that is busy.
PATIENCE = 60.0

TRIALS = 80

# What a worker does not go on after.
ENDS = frozenset({"died", "hung"})

# What is kept to be looked at, and does not make a run fail: a supervisor replaces a worker that died, as it is to.
BORNE = frozenset({"died", "slow"})


@dataclass(frozen=True, slots=True)
class Finding:
    """What should not have happened."""

    what: str
    """One of ``died``, ``hung``, ``unforeseen``; ``slow`` where others were served all the while."""
    case: Case
    number: int
    details: str


def main() -> None:
    """Parses the command line, and ends with 1 if anything was found that is not to be borne."""
    arguments = _parser().parse_args()
    seconds = arguments.seconds + 60 * arguments.minutes + 3600 * arguments.hours or 120
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        found = asyncio.run(_Fuzzing(arguments, Path(folder)).run(seconds))
    sys.stdout.flush()
    # DataFusion's threads may crash an interpreter that finalizes.
    os._exit(1 if found else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0, help="how long; 120 unless minutes or hours are given")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--hours", type=float, default=0)
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers: the same cases come of the same")
    parser.add_argument("--skip", type=int, default=0, help="so many cases are made, and not sent")
    parser.add_argument("--url", help="a worker that runs already, grpc://host:port; one is started without it")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="a folder for what is found")
    parser.add_argument("--trials", type=int, default=TRIALS, help="how often a finding is tried when it is minimized")
    return parser


class _Fuzzing:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._log = folder / "worker.log"
        self._findings: list[Finding] = []
        self._problems: list[str] = []
        self._statuses: Counter[str] = Counter()
        self._before: Usage | None = None

    async def run(self, seconds: float) -> int:
        """Sends cases for so long; returns how much was found."""
        seeds.write_tables(self._folder)
        mutator = Mutator(list(seeds.plans(self._folder)), seeds.requests(self._folder), self._arguments.seed)
        for _ in range(self._arguments.skip):
            mutator.case()
        number, end = self._arguments.skip, time.monotonic() + seconds
        while time.monotonic() < end:
            async with self._attacked() as attacked:
                while time.monotonic() < end:
                    case = mutator.case()
                    number += 1
                    answer = await attacked.client.send(case)
                    self._statuses[answer.status.name] += 1
                    if what := await self._verdict(attacked, answer):
                        self._note(Finding(what, case, number, f"{answer.status.name}: {answer.text[:300]}"))
                    if attacked.bystander.slowest > PATIENCE:
                        self._problems.append(
                            f"the bystander waited {attacked.bystander.slowest:.1f} s by case {number}"
                        )
                        attacked.bystander.slowest = 0
                    if what in ENDS:
                        break
                    if number % LOOK_EVERY == 0:
                        await self._look(attacked, number)
                        print(f"{number} cases, {len(self._findings)} findings, {dict(self._statuses)}", flush=True)
                else:
                    await self._look(attacked, number)
        print(f"{number} cases with seed {self._arguments.seed}: {dict(self._statuses)}")
        await self._minimize_all()
        for problem in self._problems:
            print(f"PROBLEM {problem}")
        return sum(finding.what not in BORNE for finding in self._findings) + len(self._problems)

    @asynccontextmanager
    async def _attacked(self) -> AsyncIterator[Target]:
        """A worker with a bystander."""
        async with self._worker() as attacked:
            for _ in range(20):
                await attacked.bystander.ask()
            if attacked.is_ours and self._before is None:
                self._before = attacked.usage()
            try:
                async with attacked.bystander.asking():
                    yield attacked
            finally:
                self._problems += attacked.bystander.problems

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[Target]:
        if self._arguments.url:
            async with Target(None, self._arguments.url, None) as running:
                yield running
        else:
            async with target("--idle-time", "1", "--log-level", "error", errors=self._log) as running:
                yield running

    async def _verdict(self, attacked: Target, answer: Answer) -> str | None:
        if await attacked.died_over(answer):
            return "died"
        if answer.status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "slow" if await attacked.bystander.ask() else "hung"
        return "unforeseen" if answer.is_unforeseen else None

    async def _look(self, attacked: Target, number: int) -> None:
        """Whether the worker is as it was before, now that nothing is asked of it but what the bystander asks."""
        held = await attacked.comes_to_rest(REST_SECONDS)
        # The bystander's own request may be under way.
        if held and (held.get("tasks", 0) > 1 or held.get("streams", 0) > 1):
            self._problems.append(f"after {number} cases the worker holds {held}")
        end = time.monotonic() + REST_SECONDS
        while attacked.is_ours and (grown := self._grown(attacked.usage())):
            if time.monotonic() > end:
                self._problems.append(f"after {number} cases the worker has {grown}, at first {self._before}")
                break
            await asyncio.sleep(0.5)

    def _grown(self, usage: Usage) -> Usage | None:
        """What the worker has, if that is much more than at first."""
        before = self._before
        if before is not None and (
            usage.resident > before.resident + GROWTH
            or usage.descriptors > before.descriptors + MORE_DESCRIPTORS
            or usage.threads > before.threads + MORE_THREADS
        ):
            return usage
        return None

    def _note(self, finding: Finding) -> None:
        print(f"FOUND {finding.what} over case {finding.number}, {finding.case}: {finding.details}", flush=True)
        self._findings.append(finding)
        self._save(finding, finding.case, "")

    def _save(self, finding: Finding, case: Case, suffix: str) -> None:
        folder = self._arguments.findings
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(finding.case.data, digest_size=4).hexdigest()
        name = f"{finding.what}_{case.kind}_{digest}{suffix}"
        (folder / f"{name}.binpb").write_bytes(case.data)
        about = {
            "kind": case.kind,
            "what": finding.what,
            "seed": self._arguments.seed,
            "number": finding.number,
            "details": finding.details,
        }
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")

    async def _minimize_all(self) -> None:
        for finding in self._findings:
            if self._arguments.trials and finding.what in ENDS:
                async with contextlib.AsyncExitStack() as stack:
                    smaller = await minimized(finding.case, _Same(self, stack, finding.what), self._arguments.trials)
                if len(smaller.data) < len(finding.case.data):
                    print(f"case {finding.number}: {len(finding.case.data)} bytes, {len(smaller.data)} when minimized")
                    self._save(finding, smaller, "_min")

    async def verdict(self, attacked: Target, case: Case) -> str | None:
        """What a worker does over a case."""
        return await self._verdict(attacked, await attacked.client.send(case))

    def worker(self) -> contextlib.AbstractAsyncContextManager[Target]:
        """A worker without a bystander."""
        return self._worker()


class _Same:
    """Whether a case still does what it was found for; a worker that has died makes room for another."""

    def __init__(self, fuzzing: _Fuzzing, stack: contextlib.AsyncExitStack, what: str) -> None:
        self._fuzzing = fuzzing
        self._stack = stack
        self._what = what
        self._running: Target | None = None

    async def __call__(self, case: Case) -> bool:
        if self._running is None:
            self._running = await self._stack.enter_async_context(self._fuzzing.worker())
        what = await self._fuzzing.verdict(self._running, case)
        if what in ENDS:
            await self._stack.aclose()
            self._running = None
        return what == self._what


main()
