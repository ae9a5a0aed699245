"""Memory that a supervisor shares with its child: what runs in there is known when the child is no more."""

import math
import mmap
import os
import signal
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

# How a child knows that it is one: JSON of what ``Supervised`` takes.
VARIABLE = "DATAFUSION_WORKER_SUPERVISED"

# Makes a child write to its standard error what its threads are at, even if they hang.
SHOW_STACKS = signal.SIGUSR2

DIGEST_BYTES = 16

# So many plans are noted at a time; what runs beside them is not.
ENTRIES = 1024

# Plans that ended well, and plans that are refused, have one place each, by their digest: of two that share one, the
# later is known. That takes no search, so that it costs next to nothing for each request.
PLACES = 4096

_BEATS = struct.Struct("<Q")
_ENTRY = struct.Struct(f"<B7xd{DIGEST_BYTES}s96sd")
_TIME = struct.Struct("<d")
_REFUSED = struct.Struct(f"<{DIGEST_BYTES}sd")
_TEXT_BYTES = 96
_PANIC = struct.Struct("<d504s")

_ENTRIES_AT = 64
_ENDED_WELL_AT = _ENTRIES_AT + ENTRIES * _ENTRY.size
_REFUSED_AT = _ENDED_WELL_AT + PLACES * DIGEST_BYTES
_PANIC_AT = _REFUSED_AT + PLACES * _REFUSED.size
_SIZE = _PANIC_AT + _PANIC.size

_DECODING, _EXECUTING = 1, 2

# What was ended in the midst of it may go on: a function that DataFusion calls does not notice. For so many seconds it
# may still be what ends the process.
ENDED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Running:
    """A plan that is decoded or executed, or was until a moment ago and did not come to its end."""

    digest: bytes
    text: str
    """Which query, stage, task and partition it is, for people."""
    seconds: float
    """For how long."""
    is_decoding: bool
    ended_well: bool
    """Whether it has been read to its end before, since a supervisor last forgot that."""


class Board:
    """The memory, as it is laid out. One process beats and notes what it does, the other reads."""

    def __init__(self, descriptor: int = -1) -> None:
        """
        Args:
            descriptor: of another process's board; without it, this is a new one that nobody else sees.
        """
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)

    @classmethod
    def shared(cls) -> Self:
        """A new one, for a process that is given its descriptor."""
        descriptor = os.memfd_create("worker-board")
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def close(self) -> None:
        """Lets go of it."""
        self._memory.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @property
    def beats(self) -> int:
        """How often the child's event loop has come round."""
        beats: int = _BEATS.unpack_from(self._memory)[0]
        return beats

    def beat(self) -> None:
        """Says that the event loop has come round."""
        _BEATS.pack_into(self._memory, 0, self.beats + 1)

    def note(self, entry: int, digest: bytes, text: str, started: float, *, is_decoding: bool) -> None:
        """Notes a plan, in one of ``ENTRIES``; ``started`` is of the monotonic clock, which all processes share."""
        at = _ENTRIES_AT + entry * _ENTRY.size
        kept = text.encode("utf-8", "replace")[:_TEXT_BYTES]
        state = _DECODING if is_decoding else _EXECUTING
        _ENTRY.pack_into(self._memory, at, state, started, digest, kept, math.inf)

    def clear(self, entry: int) -> None:
        """Takes a plan off."""
        self._memory[_ENTRIES_AT + entry * _ENTRY.size] = 0

    def note_ended(self, entry: int) -> None:
        """Notes that a plan was ended in the midst of it; it is taken off when another takes its place."""
        at = _ENTRIES_AT + (entry + 1) * _ENTRY.size - _TIME.size
        _TIME.pack_into(self._memory, at, time.monotonic())

    def running(self) -> list[Running]:
        """All plans that are noted, those too that were ended a moment ago."""
        now = time.monotonic()
        found = []
        for at in range(_ENTRIES_AT, _ENDED_WELL_AT, _ENTRY.size):
            if self._memory[at]:
                state, started, digest, text, ended = _ENTRY.unpack_from(self._memory, at)
                if now > ended + ENDED_SECONDS:
                    continue
                place = _ended_well_at(digest)
                ended_well = self._memory[place : place + DIGEST_BYTES] == digest
                shown = text.rstrip(b"\0").decode("utf-8", "replace")
                found.append(Running(digest, shown, now - started, state == _DECODING, ended_well))
        return found

    def note_ended_well(self, digest: bytes) -> None:
        """Notes that a plan was read to its end."""
        at = _ended_well_at(digest)
        self._memory[at : at + DIGEST_BYTES] = digest

    def follow(self, other: "Board") -> None:
        """Takes over which plans ended well, but for those that are noted as running: these have to do so anew."""
        self._memory[_ENDED_WELL_AT:_REFUSED_AT] = other._memory[_ENDED_WELL_AT:_REFUSED_AT]
        for plan in other.running():
            if plan.ended_well:
                at = _ended_well_at(plan.digest)
                self._memory[at : at + DIGEST_BYTES] = bytes(DIGEST_BYTES)

    def note_panic(self, text: str) -> None:
        """Notes where and why the child's engine panicked just now. The child cannot see that itself."""
        _PANIC.pack_into(self._memory, _PANIC_AT, time.monotonic(), text.encode("utf-8", "replace")[:504])

    def last_panic(self) -> tuple[float, str]:
        """When the last panic was noted, and its text."""
        noted, text = _PANIC.unpack_from(self._memory, _PANIC_AT)
        return noted, text.rstrip(b"\0").decode("utf-8", "replace")

    def refuse(self, refused: Mapping[bytes, float]) -> None:
        """Has plans refused, each until a time of the monotonic clock."""
        for digest, until in refused.items():
            _REFUSED.pack_into(self._memory, _refused_at(digest), digest, until)

    def refused_until(self, digest: bytes) -> float | None:
        """Until when a plan is refused; None if it is not."""
        refused, until = _REFUSED.unpack_from(self._memory, _refused_at(digest))
        return until if refused == digest and until > time.monotonic() else None


def _place(digest: bytes) -> int:
    return int.from_bytes(digest[:2]) % PLACES


def _ended_well_at(digest: bytes) -> int:
    return _ENDED_WELL_AT + _place(digest) * DIGEST_BYTES


def _refused_at(digest: bytes) -> int:
    return _REFUSED_AT + _place(digest) * _REFUSED.size
