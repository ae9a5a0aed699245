"""The corpus of hostile plans, and how each of them has to be answered.

``python -m fuzz.corpus`` writes the files of what is made by hand, and notes in the index how a worker answers what is
new there; ``--again`` does so for all. Look at what has changed before you commit it: it is what will be expected.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from fuzz.cases import FOLDER, Case, Kind
from fuzz.mutate import messages
from fuzz.recipes import recipes
from fuzz.target import Answer, Target, target
from worker import plan_proto

CORPUS = Path(__file__).parent.parent / "tests" / "data" / "hostile"
INDEX = CORPUS / "index.json"

# Larger cases are made when they are needed.
MAX_FILE = 100_000

# So much of a refusal's text is expected.
FRAGMENT = 70

# The source of what no mutation has made.
BY_HAND = "fuzz/recipes"


def options(folder: Path) -> tuple[str, ...]:
    """How a worker is started that the corpus is sent to."""
    return ("--idle-time", "1", "--log-level", "error", "--allow-path", str(folder))


def prepare(folder: Path) -> None:
    """Makes the files that a worker may read, and a link to one that it may not."""
    numbers = pa.table({"x": ["a", "b"]})
    pq.write_table(numbers, folder / "x.parquet")
    csv.write_csv(numbers, folder / "x.csv")
    (folder / "x.json").write_text('{"x": "a"}\n')
    (folder / "link").symlink_to("/etc/passwd")


class How(StrEnum):
    """How a case is answered."""

    REFUSED = "refused"
    """Before DataFusion sees it."""
    STATUS = "status"
    """By DataFusion, or after it has decoded the plan; also with rows."""
    REPLACED = "replaced"
    """Not: it ends the process, and another takes its place."""


# How texts begin that tell of what happened in or after decoding.
_BY_THE_ENGINE = re.compile(
    r"DataFusion|the plan does not decode|the session has no|partition \d+ not available|a row takes"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A case of the corpus."""

    name: str
    kind: Kind
    about: str
    """What is wrong with it."""
    source: str
    """What it was made by."""
    how: How | None
    """None while nobody has said."""
    status: str
    text: str
    """What the refusal begins with."""

    def case(self, folder: Path) -> Case:
        """What is sent to a worker that may read the files of a folder, those of ``prepare``."""
        file = CORPUS / f"{self.name}.binpb"
        case = Case(self.kind, file.read_bytes()) if file.exists() else _by_hand()[self.name][1]
        return _placed(case, folder)

    def is_answered_by(self, answer: Answer, folder: Path) -> bool:
        """Whether this is the expected answer, of a process that has lived on and may read the files of a folder."""
        return self.status == answer.status.name and _displaced(answer, folder).startswith(self.text)


def entries() -> list[Entry]:
    """The corpus, by name."""
    index: dict[str, dict[str, Any]] = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    return [
        Entry(
            name,
            Kind(each["kind"]),
            each["about"],
            each["source"],
            How(each["how"]) if each["how"] else None,
            each["status"],
            each["text"],
        )
        for name, each in sorted(index.items())
    ]


def _placed(case: Case, folder: Path) -> Case:
    if case.kind not in {Kind.PLAN, Kind.TASK} or FOLDER.encode() not in case.data:
        return case
    plan = plan_proto.parse(case.data)
    for message in messages(plan):
        if message.DESCRIPTOR.full_name == "datafusion.PartitionedFile" and FOLDER in message.path:
            message.path = message.path.replace(FOLDER, str(folder))
            message.size = message.size or Path(message.path).stat().st_size
    return Case(case.kind, plan.SerializeToString())


def _displaced(answer: Answer, folder: Path) -> str:
    return answer.text.replace(str(folder), FOLDER)


@cache
def _by_hand() -> dict[str, tuple[str, Case]]:
    return {name: (about, case) for name, about, case in recipes()}


def main() -> None:
    """Writes the corpus."""
    parser = argparse.ArgumentParser("python -m fuzz.corpus", description=__doc__)
    parser.add_argument("--again", action="store_true", help="note anew how all are answered")
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], help="findings, each a .binpb with a .json beside it"
    )
    arguments = parser.parse_args()
    known = {entry.name: entry for entry in entries()}
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name in [name for name, entry in known.items() if entry.source == BY_HAND and name not in _by_hand()]:
        del known[name]
        (CORPUS / f"{name}.binpb").unlink(missing_ok=True)
    for name, (about, case) in _by_hand().items():
        if len(case.data) <= MAX_FILE:
            (CORPUS / f"{name}.binpb").write_bytes(case.data)
        old = known.get(name)
        how, status, text = (old.how, old.status, old.text) if old else (None, "", "")
        known[name] = Entry(name, case.kind, about, BY_HAND, how, status, text)
    for file in arguments.add:
        told = json.loads(file.with_suffix(".json").read_text())
        (CORPUS / file.name).write_bytes(file.read_bytes())
        source = f"python -m fuzz --seed {told['seed']}, case {told['number']}"
        known[file.stem] = Entry(file.stem, Kind(told["kind"]), told["details"], source, None, "", "")
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        prepare(Path(folder))
        asyncio.run(_note(known, Path(folder), again=arguments.again))
    _write(known)
    sys.stdout.flush()
    os._exit(0)


async def _note(known: dict[str, Entry], folder: Path, *, again: bool) -> None:
    waiting = [entry for entry in known.values() if again or entry.how is None]
    while waiting:
        async with target(*options(folder)) as attacked:
            while waiting:
                entry = waiting.pop(0)
                answer = await attacked.client.send(entry.case(folder))
                noted = await _noted(entry, answer, attacked, folder)
                if (noted.how, noted.status, noted.text) != (entry.how, entry.status, entry.text):
                    print(
                        f"{noted.name}: {noted.how} {noted.status} {answer.text[:200]!r} {answer.seconds:.2f} s",
                        flush=True,
                    )
                known[entry.name] = noted
                if noted.how is How.REPLACED or not await attacked.bystander.ask():
                    break


async def _noted(entry: Entry, answer: Answer, attacked: Target, folder: Path) -> Entry:
    how, status, text = How.STATUS, answer.status.name, ""
    if await attacked.died_over(answer):
        how, status = How.REPLACED, grpc.StatusCode.UNAVAILABLE.name
    elif answer.status not in {
        grpc.StatusCode.OK,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    } and not _BY_THE_ENGINE.match(answer.text):
        how, text = How.REFUSED, _displaced(answer, folder)[:FRAGMENT]
    return Entry(entry.name, entry.kind, entry.about, entry.source, how, status, text)


def _write(known: dict[str, Entry]) -> None:
    index = {
        entry.name: {
            "kind": entry.kind,
            "about": entry.about,
            "source": entry.source,
            "how": entry.how,
            "status": entry.status,
            "text": entry.text,
        }
        for entry in sorted(known.values(), key=lambda entry: entry.name)
    }
    INDEX.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
