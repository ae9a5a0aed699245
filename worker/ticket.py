"""Tickets: the ``worker.plan.DoGet`` bytes of a Flight ticket or descriptor, into a dataclass and back."""

import uuid
from dataclasses import dataclass

from datafusion import ExecutionPlan
from google.protobuf.message import DecodeError

from worker.errors import InvalidTicket
from worker.proto import plan_pb2

QUERY_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class StageKey:
    """Which task of which query: requests with equal keys are partitions of one instance of a plan."""

    query_id: uuid.UUID
    stage_id: int = 0
    task_number: int = 0

    def __str__(self) -> str:
        return f"{self.query_id}/{self.stage_id}/{self.task_number}"

    def to_proto(self) -> plan_pb2.StageKey:
        """The key as tickets have it."""
        return plan_pb2.StageKey(query_id=self.query_id.bytes, stage_id=self.stage_id, task_number=self.task_number)

    @classmethod
    def unique(cls) -> "StageKey":
        """A key that nobody else has: the first stage of a new query."""
        return cls(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class PlanTicket:
    """What a ticket asks for: one partition of a plan, as one task of a stage."""

    plan: bytes
    """A serialized ``datafusion.PhysicalPlanNode``."""
    partition: int = 0
    task_index: int = 0
    task_count: int = 0
    """How many tasks the stage has; 0 where the client does not say."""
    stage_key: StageKey | None = None

    def __repr__(self) -> str:
        # A plan holds literals and can be megabytes; neither belongs in a log.
        return f"PlanTicket({len(self.plan)} bytes, partition {self.partition}, stage key {self.stage_key})"

    def to_bytes(self) -> bytes:
        """The ``worker.plan.DoGet`` message, to be put into ``Ticket.ticket``."""
        message = plan_pb2.DoGet(
            plan_proto=self.plan,
            target_task_index=self.task_index,
            target_task_count=self.task_count,
            target_partition=self.partition,
        )
        if self.stage_key is not None:
            message.stage_key.CopyFrom(self.stage_key.to_proto())
        return message.SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> "PlanTicket":
        """Reads a ``worker.plan.DoGet`` message.

        Raises:
            InvalidTicket: the bytes are empty, are no such message, hold no plan, or a stage key without a UUID.
        """
        if not data:
            raise InvalidTicket("the ticket is empty: it must be a worker.plan.DoGet message")
        try:
            message = plan_pb2.DoGet.FromString(data)
        except DecodeError as error:
            raise InvalidTicket(f"the ticket of {len(data)} bytes is not a worker.plan.DoGet message") from error
        plan = message.plan_proto  # each access copies it
        if not plan:
            raise InvalidTicket("the ticket has no plan: DoGet.plan_proto must be a datafusion.PhysicalPlanNode")
        return cls(
            plan=plan,
            partition=message.target_partition,
            task_index=message.target_task_index,
            task_count=message.target_task_count,
            stage_key=_stage_key(message.stage_key) if message.HasField("stage_key") else None,
        )


def _stage_key(message: plan_pb2.StageKey) -> StageKey:
    if len(message.query_id) != QUERY_ID_BYTES:
        raise InvalidTicket(
            f"the stage key's query_id has {len(message.query_id)} bytes: a UUID of {QUERY_ID_BYTES} is right"
        )
    return StageKey(uuid.UUID(bytes=message.query_id), message.stage_id, message.task_number)


def plan_ticket(plan: ExecutionPlan | bytes, partition: int = 0, stage_key: StageKey | None = None) -> bytes:
    """The ticket for one partition of a plan, for any Flight client: ``flight.Ticket(plan_ticket(plan, 0))``.

    Give the same ``stage_key`` (``StageKey.unique()``) to all partitions that are read at about the same time: the
    worker then decodes the plan once, and the partitions share what the plan shares.
    """
    serialized = plan if isinstance(plan, bytes) else plan.to_bytes()
    return PlanTicket(serialized, partition, stage_key=stage_key).to_bytes()
