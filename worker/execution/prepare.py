"""Plans prepared to be executed: checked, rewritten, and decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from datafusion import ExecutionPlan, SessionContext

from worker import plan
from worker.config import PlanLimits
from worker.partitionwise import make_partitions_independent
from worker.plan_proto import Message


class Input(Protocol):
    """What a plan has to be given before it can be executed."""

    @property
    def is_empty(self) -> bool:
        """Whether it needs none."""
        ...

    async def fetch(self) -> Message:
        """The plan with everything that it reads; called again after it has failed or was cancelled.

        Raises:
            WorkerError: it is not to be had.
        """
        ...

    async def close(self) -> None:
        """Deletes what is kept for it."""
        ...


# Rewrites a plan with nodes that DataFusion does not know, for some milliseconds at most. The message is changed; until
# the input has come, it has the plan's partitions and schema, and no rows.
Rewrite: TypeAlias = Callable[[SessionContext, Message], Input]


@dataclass(frozen=True, slots=True)
class Decoded:
    """A plan and a first instance of it."""

    before: bytes
    """The plan before its partitions were made independent of each other."""
    plan: bytes
    instance: ExecutionPlan


def prepare(
    session: SessionContext,
    plan_bytes: bytes,
    limits: PlanLimits,
    python_udf_inlining: bool,
    rewrite: Rewrite | None,
) -> tuple[Decoded, Input | None]:
    """A first instance of a plan, and the input that it waits for. Blocks for as long as ``plan.decode``.

    Args:
        session: what it is decoded in.
        plan_bytes: as it was received.
        limits: what it may hold.
        python_udf_inlining: whether Python functions that come inside of it are unpickled.
        rewrite: is called if it has nodes that only a codec knows.

    Raises:
        InvalidPlan, PlanTooLarge, EnginePanicked: as ``plan.parse`` and ``plan.decode``, or as ``rewrite``.
    """
    # Dropping the pickles makes the names be looked up; the session makes sure that none is unpickled.
    if not python_udf_inlining:
        plan_bytes = plan.without_python_udfs(plan_bytes)
    parsed = plan.parse(plan_bytes, limits)
    plan_input = rewrite(session, parsed.message) if parsed.has_extensions and rewrite else None
    if parsed.is_old:
        plan.upgrade_filters(session, parsed.message)
    if plan_input is not None and not plan_input.is_empty:
        without_rows = parsed.message.SerializeToString()
        return Decoded(without_rows, without_rows, plan.decode(session, without_rows)), plan_input
    is_changed = parsed.is_old or plan_input is not None
    return decode_independent(session, parsed.message, None if is_changed else parsed.data), plan_input


def decode_independent(session: SessionContext, message: Message, plan_bytes: bytes | None = None) -> Decoded:
    """The plan as it is executed here, and an instance of it; ``plan_bytes`` are the message's, if they are there."""
    before = message.SerializeToString() if plan_bytes is None else plan_bytes
    after = message.SerializeToString() if make_partitions_independent(session, message) else before
    return Decoded(before, after, plan.decode(session, after))
