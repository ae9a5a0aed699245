"""Which plan ended a worker, told from what ran at its deaths; and for how long such a plan is refused."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.supervision.board import Running

# A plan is refused for so long, and deaths that are longer ago do not count.
SECONDS = 600.0

# A plan that ran at two deaths is refused, if of all that ran it is the likeliest cause; one that ran at so many in any
# case: it may take long to kill, beside others that take less.
LIKELY_DEATHS = 2
CERTAIN_DEATHS = 4


@dataclass(slots=True)
class _Suspect:
    deaths: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """The longest that it had run for when a worker died."""
    only_decoding: bool = True
    ended_well: bool = False

    @property
    def innocence(self) -> tuple[bool, bool, float]:
        """The less, the likelier it is the cause.

        What has ended well before hardly is. What is decoded is there for a moment, so that it is no accident if it is
        when the worker dies. And what kills mostly does so soon, each time, while what ran beside it may have for long.
        """
        return self.ended_well, not self.only_decoding, self.seconds


class Quarantine:
    """Remembers who ran when a worker died. A plan that is read to its end is no suspect any more."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """
        Args:
            seconds: for how long a plan is refused and a death remembered.
        """
        self._seconds = seconds
        self._suspects: dict[bytes, _Suspect] = {}
        self._refused: dict[bytes, float] = {}

    def died(self, running: Sequence[Running], now: float) -> bytes | None:
        """Takes note of a death; returns the plan that is refused from now on, if any: one at most.

        Args:
            running: all that ran then.
            now: by the monotonic clock, as in all calls.
        """
        self._forget(now)
        suspects = {digest: self._suspect(digest, running, now) for digest in {plan.digest for plan in running}}
        if not suspects:
            return None
        likeliest = min(suspects, key=lambda digest: (suspects[digest].innocence, digest))
        deaths = Counter({digest: len(suspect.deaths) for digest, suspect in suspects.items()})
        most, count = deaths.most_common(1)[0]
        guilty = likeliest if deaths[likeliest] >= LIKELY_DEATHS else most if count >= CERTAIN_DEATHS else None
        if guilty is not None:
            self._refused = {**self.refused(now), guilty: now + self._seconds}
            del self._suspects[guilty]
        return guilty

    def refused(self, now: float) -> dict[bytes, float]:
        """The plans that are refused, and until when. May be called in any thread."""
        return {digest: until for digest, until in self._refused.items() if until > now}

    def _suspect(self, digest: bytes, running: Sequence[Running], now: float) -> _Suspect:
        plans = [plan for plan in running if plan.digest == digest]
        suspect = self._suspects.setdefault(digest, _Suspect())
        if any(plan.ended_well for plan in plans):
            suspect = self._suspects[digest] = _Suspect(ended_well=True)
        suspect.deaths.append(now)
        suspect.seconds = max(suspect.seconds, min(plan.seconds for plan in plans))
        suspect.only_decoding = suspect.only_decoding and any(plan.is_decoding for plan in plans)
        return suspect

    def _forget(self, now: float) -> None:
        self._suspects = {
            digest: suspect for digest, suspect in self._suspects.items() if suspect.deaths[-1] + self._seconds > now
        }
