"""Tickets, as bytes and as dataclasses."""

import dataclasses
import uuid

import pytest
from datafusion import SessionContext

from worker import InvalidTicket, PlanTicket, StageKey, plan_ticket
from worker.proto import plan_pb2

QUERY = uuid.UUID(bytes=bytes(range(16)))
LARGEST = 2**64 - 1


@pytest.mark.parametrize(
    "ticket",
    [
        PlanTicket(b"plan"),
        PlanTicket(b"plan", partition=3),
        PlanTicket(b"plan", 3, 1, 2, StageKey(QUERY, 4, 5)),
        PlanTicket(b"plan", stage_key=StageKey(QUERY)),
        PlanTicket(b"\x00" * 3_000_000, LARGEST, LARGEST, LARGEST, StageKey(QUERY, LARGEST, LARGEST)),
    ],
)
def test_a_ticket_comes_back_from_its_bytes(ticket: PlanTicket) -> None:
    assert PlanTicket.from_bytes(ticket.to_bytes()) == ticket


def test_every_field_is_where_the_message_has_it() -> None:
    message = plan_pb2.DoGet.FromString(PlanTicket(b"plan", 1, 2, 3, StageKey(QUERY, 4, 5)).to_bytes())
    assert message == plan_pb2.DoGet(
        plan_proto=b"plan",
        target_partition=1,
        target_task_index=2,
        target_task_count=3,
        stage_key=plan_pb2.StageKey(query_id=bytes(range(16)), stage_id=4, task_number=5),
    )


def test_no_stage_key_is_not_the_stage_key_of_zeros() -> None:
    zeros = StageKey(uuid.UUID(int=0))
    assert PlanTicket.from_bytes(PlanTicket(b"plan").to_bytes()).stage_key is None
    assert PlanTicket.from_bytes(PlanTicket(b"plan", stage_key=zeros).to_bytes()).stage_key == zeros


def test_fields_that_it_does_not_know_are_passed_over() -> None:
    later = PlanTicket(b"plan", 2).to_bytes() + b"\xf2\x3f\x03new"
    assert PlanTicket.from_bytes(later) == PlanTicket(b"plan", 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the ticket is empty"),
        (b"\xff", "the ticket of 1 bytes is not a worker.plan.DoGet"),
        (b"SELECT 1", "not a worker.plan.DoGet"),
        (PlanTicket(b"plan" * 100).to_bytes()[:-1], "not a worker.plan.DoGet"),
        (plan_pb2.DoGet(target_partition=1).SerializeToString(), "has no plan"),
        (plan_pb2.DoGet(plan_proto=b"").SerializeToString() + b"\x0a\x00", "has no plan"),
        (plan_pb2.DoGet(plan_proto=b"p", stage_key=plan_pb2.StageKey()).SerializeToString(), "query_id has 0 bytes"),
        (
            plan_pb2.DoGet(plan_proto=b"p", stage_key=plan_pb2.StageKey(query_id=b"q" * 15)).SerializeToString(),
            "query_id has 15 bytes: a UUID of 16 is right",
        ),
        (
            plan_pb2.DoGet(plan_proto=b"p", stage_key=plan_pb2.StageKey(query_id=b"q" * 17)).SerializeToString(),
            "query_id has 17 bytes",
        ),
    ],
)
def test_what_is_no_ticket_is_refused_by_its_fault(data: bytes, message: str) -> None:
    with pytest.raises(InvalidTicket, match=message):
        PlanTicket.from_bytes(data)


def test_a_unique_key_is_nobody_elses_and_the_first_stage() -> None:
    first, second = StageKey.unique(), StageKey.unique()
    assert first != second
    assert (first.stage_id, first.task_number) == (0, 0)


def test_equal_keys_are_one_key() -> None:
    assert len({StageKey(QUERY, 1, 2), StageKey(uuid.UUID(bytes=QUERY.bytes), 1, 2), StageKey(QUERY, 2, 1)}) == 2


def test_a_key_is_shown_as_query_stage_and_task() -> None:
    assert str(StageKey(QUERY, 4, 5)) == "00010203-0405-0607-0809-0a0b0c0d0e0f/4/5"


def test_a_tickets_repr_shows_nothing_of_the_plan() -> None:
    shown = repr(PlanTicket(b"secret", 1, stage_key=StageKey(QUERY, 4, 5)))
    assert "secret" not in shown
    assert shown == f"PlanTicket(6 bytes, partition 1, stage key {QUERY}/4/5)"


@pytest.mark.parametrize("frozen", [PlanTicket(b"plan"), StageKey(QUERY)])
def test_it_cannot_be_changed(frozen: PlanTicket | StageKey) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(frozen, dataclasses.fields(frozen)[0].name, b"other")


def test_plan_ticket_takes_a_plan_or_its_bytes() -> None:
    plan = SessionContext().sql("SELECT 1 AS one").execution_plan()
    key = StageKey.unique()
    assert PlanTicket.from_bytes(plan_ticket(plan, 0, key)) == PlanTicket(plan.to_bytes(), 0, stage_key=key)
    assert plan_ticket(plan.to_bytes(), 2) == PlanTicket(plan.to_bytes(), 2).to_bytes()
