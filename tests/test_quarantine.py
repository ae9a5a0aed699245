"""Which plan is blamed for the deaths of a worker, and what both processes know of the plans that run."""

import asyncio
import time
import uuid

import pytest

from worker import PlanQuarantined
from worker.supervision.board import ENDED_SECONDS, ENTRIES, Board, Running
from worker.supervision.journal import Journal
from worker.supervision.quarantine import CERTAIN_DEATHS, Quarantine
from worker.ticket import StageKey


def running(name: str, seconds: float = 0.01, *, decoding: bool = False, ended_well: bool = False) -> Running:
    return Running(name.encode(), name, seconds, decoding, ended_well)


def test_a_plan_that_ran_at_two_deaths_is_refused_for_a_while() -> None:
    quarantine = Quarantine(seconds=600)
    assert quarantine.died([running("killer")], 100) is None
    assert quarantine.refused(101) == {}
    assert quarantine.died([running("killer")], 102) == b"killer"
    assert quarantine.refused(103) == {b"killer": 702}
    assert quarantine.refused(701) == {b"killer": 702}
    assert quarantine.refused(702) == {}


def test_deaths_that_are_long_ago_do_not_count() -> None:
    quarantine = Quarantine(seconds=600)
    assert quarantine.died([running("killer")], 100) is None
    assert quarantine.died([running("killer")], 701) is None
    assert quarantine.died([running("killer")], 702) == b"killer"


def test_what_ran_for_longer_beside_the_killer_is_not_refused() -> None:
    quarantine = Quarantine()
    assert quarantine.died([running("long", 5), running("killer", 0.1)], 0) is None
    # Sent again at about the same time: it is the younger this time, and was not before.
    assert quarantine.died([running("killer", 0.2), running("long", 0.1)], 1) == b"killer"


def test_what_ran_beside_different_killers_is_not_refused() -> None:
    quarantine = Quarantine()
    for number in range(CERTAIN_DEATHS - 1):
        assert quarantine.died([running("long", 5), running(f"killer {number}", 0.1)], number) is None


def test_what_ran_at_many_deaths_is_refused_even_if_others_are_younger_each_time() -> None:
    quarantine = Quarantine()
    blamed = [
        quarantine.died([running("slow killer", 5), running(f"victim {number}", 0.1)], number)
        for number in range(CERTAIN_DEATHS)
    ]
    assert blamed == [None] * (CERTAIN_DEATHS - 1) + [b"slow killer"]


def test_what_is_decoded_is_blamed_before_what_is_executed() -> None:
    quarantine = Quarantine()
    for blamed in (None, b"killer"):
        assert quarantine.died([running("short", 0.001), running("killer", 3, decoding=True)], 0) == blamed


def test_what_ends_well_between_two_deaths_is_not_refused_however_young_it_is() -> None:
    quarantine = Quarantine()
    for blamed in (None, b"killer"):
        plans = [running("short", 0.001, ended_well=True), running("killer", 3)]
        assert quarantine.died(plans, 0) == blamed


def test_what_ended_well_once_and_kills_twice_since_is_refused() -> None:
    quarantine = Quarantine()
    assert quarantine.died([running("killer", ended_well=True)], 0) is None
    assert quarantine.died([running("killer")], 1) == b"killer"


def test_partitions_of_one_plan_count_as_one() -> None:
    quarantine = Quarantine()
    assert quarantine.died([running("killer")] * 3, 0) is None
    assert quarantine.died([running("killer")] * 3, 1) == b"killer"


def test_nobody_is_blamed_where_nothing_ran() -> None:
    quarantine = Quarantine()
    assert quarantine.died([], 0) is None
    assert quarantine.died([], 0) is None


KEY = StageKey(uuid.UUID(int=7), 3, 5)


def test_the_supervisor_sees_what_runs_and_no_more_once_it_has_ended() -> None:
    board = Board.shared()
    seen = Board(board.descriptor)
    journal = Journal(board)
    first, second = journal.admit(b"one", KEY), journal.admit(b"two", None)
    with journal.decoding(first), journal.executing(second, 4):
        decoded, executed = seen.running()
        assert (decoded.digest, decoded.text) == (first.digest, f"plan of {KEY}")
        assert (executed.digest, executed.text) == (second.digest, "plan without a stage key, partition 4")
        assert (decoded.is_decoding, executed.is_decoding) == (True, False)
        assert 0 <= executed.seconds <= time.monotonic() - journal.oldest()
    assert seen.running() == []
    assert journal.oldest() == float("inf")


def test_what_was_cancelled_stays_noted_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go on. Others that begin and end meanwhile do not take its place."""
    board = Board()
    journal = Journal(board)
    cancelled, failed = journal.admit(b"cancelled", KEY), journal.admit(b"failed", KEY)
    for plan, error in ((cancelled, asyncio.CancelledError), (cancelled, GeneratorExit), (failed, ValueError)):
        with pytest.raises(error), journal.executing(plan, 0):
            raise error
    for _ in range(ENTRIES):
        with journal.executing(failed, 0):
            pass
    assert [running.digest for running in board.running()] == [cancelled.digest] * 2
    assert journal.oldest() == float("inf")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + ENDED_SECONDS + 1)
    assert board.running() == []


def test_more_than_can_be_noted_runs_all_the_same() -> None:
    board = Board()
    journal = Journal(board)
    plan = journal.admit(b"plan", None)
    for _ in range(2):
        blocks = [journal.executing(plan, number) for number in range(ENTRIES + 2)]
        for block in blocks:
            block.__enter__()
        assert len(board.running()) == ENTRIES
        for block in blocks:
            block.__exit__(None, None, None)
        assert board.running() == []


def test_a_plan_is_the_same_in_another_query() -> None:
    journal = Journal()
    other = StageKey(uuid.uuid4(), 3, 5)
    plans = [journal.admit(b"reads " + key.query_id.bytes + b" of", key).digest for key in (KEY, other)]
    assert plans[0] == plans[1] != journal.admit(b"another", KEY).digest


def test_a_plan_that_is_refused_says_for_how_long() -> None:
    board = Board()
    journal = Journal(board)
    plan = journal.admit(b"plan", None)
    board.refuse({plan.digest: time.monotonic() + 100})
    with pytest.raises(PlanQuarantined, match=r"^this plan ended the worker more than once.* another (100|99) s"):
        journal.admit(b"plan", None)
    assert journal.admit(b"another plan", None)
    board.refuse({plan.digest: time.monotonic() - 1})
    assert journal.admit(b"plan", None)


def test_a_plan_has_ended_well_once_all_its_partitions_were_read_and_not_if_it_runs_when_the_worker_dies() -> None:
    board = Board()
    journal = Journal(board)
    plan = journal.admit(b"plan", None)

    def ended_well(board: Board) -> bool:
        with Journal(board).executing(plan, 0):
            return board.running()[0].ended_well

    journal.read_to_the_end(plan, 0, 2)
    journal.read_to_the_end(plan, 0, 2)
    assert not ended_well(board)
    journal.read_to_the_end(plan, 1, 2)
    assert ended_well(board)

    idle = Board()
    idle.follow(board)
    assert ended_well(idle)
    with journal.executing(plan, 0):
        died = Board()
        died.follow(board)
    assert not ended_well(died)
