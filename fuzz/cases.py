"""Cases: bytes that a stranger sends to a worker, and what they are sent as."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What the bytes of a case are, and with which RPCs they are sent."""

    PLAN = "plan"
    """A ``datafusion.PhysicalPlanNode``, in the ticket of a ``DoGet`` for its first partition."""
    TASK = "task"
    """A ``datafusion.PhysicalPlanNode``, set by a ``CoordinatorChannel`` and read by an ``ExecuteTask``."""
    TICKET = "ticket"
    """A ``worker.plan.DoGet``, the ticket of a ``DoGet``."""
    DESCRIPTOR = "descriptor"
    """A ``worker.plan.DoGet``, the command of a ``GetFlightInfo`` and a ``GetSchema``."""
    SET_PLAN = "set_plan"
    """A ``worker.SetPlanRequest``, the first message of a ``CoordinatorChannel``; its task is read if it gets one."""
    EXECUTE = "execute"
    """A ``worker.ExecuteTaskRequest``, of a task that has its key and a harmless plan."""


# Stands in paths for the folder whose files a worker may read; it is another one each time.
FOLDER = "/hostile-folder"

EXECUTE_QUERY = bytes(15) + b"\x01"


@dataclass(frozen=True, slots=True)
class Case:
    """What a stranger sends."""

    kind: Kind
    data: bytes

    def __repr__(self) -> str:
        return f"Case({self.kind}, {len(self.data)} bytes)"
