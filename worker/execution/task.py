"""A task: one instance of a plan, whose partitions are executed as they are asked for."""

import asyncio
from typing import Any

import pyarrow as pa
from datafusion import ExecutionPlan, SessionContext

from worker import plan
from worker.errors import PartitionOutOfRange
from worker.execution.abandon import drop_unread, repartitions
from worker.execution.executor import Executor
from worker.execution.prepare import Decoded, Input, decode_independent
from worker.execution.stream import PartitionStream
from worker.partitionwise import counterparts
from worker.supervision.journal import Noted


class Task:
    """One instance of a plan, in the session that decoded it."""

    def __init__(
        self,
        executor: Executor,
        noted: Noted,
        session: SessionContext,
        decoded: Decoded,
        plan_input: Input | None,
    ) -> None:
        """
        Args:
            executor: the worker's.
            noted: the plan as it was received.
            session: what the plan was decoded in.
            decoded: the plan, without rows if it has an input.
            plan_input: what is fetched when a partition is first executed.
        """
        self._executor = executor
        self.noted = noted
        self._session = session
        self._decoded = decoded
        self.input = plan_input
        self.partition_count: int = decoded.instance.partition_count
        self._unasked = set(range(self.partition_count))
        self._unread = set(range(self.partition_count))
        self._executed: set[int] = set()
        self._schema: asyncio.Future[pa.Schema] | None = None
        self._missing = None if plan_input is None or plan_input.is_empty else plan_input
        self._completing: asyncio.Future[None] | None = None
        self._waiting = 0
        self._given_up: set[int] = set()

    @property
    def ended(self) -> bool:
        """Whether every partition was asked for, to be read or in vain."""
        return not self._unasked

    async def schema(self) -> pa.Schema:
        """The exact schema of the plan's batches, also when there are none; found out once.

        Raises:
            InvalidPlan, ExecutionFailed, EnginePanicked: as ``plan.schema_of``.
        """
        if self._schema is None or has_failed(self._schema):
            self._schema = self._executor.in_background(self._executor.in_thread(self._find_schema))
        return await asyncio.shield(self._schema)

    async def execute(self, partition: int, *, alone: bool) -> PartitionStream:
        """Executes one partition: of the task's instance the first time, of a fresh one when it is asked for again.

        Args:
            partition: which one.
            alone: nobody will ask this task for another.

        Raises:
            PartitionOutOfRange: the plan has no such partition.
            ExecutionFailed, EnginePanicked: DataFusion failed.
            Unavailable: the worker was closed.
            WorkerError: the plan's input is not to be had.
        """
        if partition >= self.partition_count:
            raise PartitionOutOfRange(f"partition {partition} not available: the plan has {self.partition_count}")
        self._unasked.discard(partition)
        self._given_up.discard(partition)
        if self._missing is not None:
            await self._complete(self._missing, partition)
        instance = self._decoded.instance
        if partition in self._executed:
            instance, alone = await self._executor.decode(self._session, self._decoded.plan), True
        self._executed.add(partition)
        if alone and self.partition_count > 1:
            self._abandon(instance, set(range(self.partition_count)) - {partition})
        execution = self._executor.in_thread(self._session.execute, instance, partition)
        try:
            with plan.execution_errors():
                return self._executor.stream(await asyncio.shield(execution), instance)
        except asyncio.CancelledError:
            self._executor.in_background(drop_unread([execution]))
            raise

    def give_up(self, partition: int) -> None:
        """Says that who asked for this partition went away before it was executed."""
        if partition in self._unasked:
            self._unasked.discard(partition)
            self._given_up.add(partition)
            if self._missing is None:
                self._abandon_given_up()

    def end(self, partition: int) -> bool:
        """Says that this partition was read to its end; returns whether now all have been."""
        self._unread.discard(partition)
        return not self._unread

    def executed(self) -> list[ExecutionPlan | None]:
        """What is executed for each node of the plan, parents first. Blocks for as long as it takes to decode it."""
        decoded = self._decoded
        if decoded.before == decoded.plan:
            return list(plan.walk(decoded.instance))
        return list(counterparts(plan.decode(self._session, decoded.before), decoded.instance))

    async def close(self) -> None:
        """Ends a task with an input, and lets go of everything: errors keep frames that have this."""
        if self.input is not None:
            self._unasked.clear()
            plan_input, self.input = self.input, None
            del self._session, self._decoded
            await plan_input.close()

    async def _complete(self, missing: Input, partition: int) -> None:
        """Waits for the input, which is fetched for as long as somebody waits for it."""
        if self._completing is None:
            self._completing = self._executor.in_background(self._fetch(missing))
        completing = self._completing
        self._waiting += 1
        try:
            await asyncio.shield(completing)
        except asyncio.CancelledError:
            self._given_up.add(partition)
            raise
        finally:
            self._waiting -= 1
            if not self._waiting:
                completing.cancel()
            # Also when it has failed: its traceback has frames with this task, a circle that would keep the session.
            if self._completing is completing and (completing.done() or not self._waiting):
                self._completing = None

    async def _fetch(self, missing: Input) -> None:
        message = await missing.fetch()
        self._executor.count_decoded()
        self._decoded = await self._executor.in_thread(self._executor.timed, decode_independent, self._session, message)
        self._missing = None
        self._abandon_given_up()

    def _find_schema(self) -> pa.Schema:
        with self._executor.journal.decoding(self.noted):
            return plan.schema_of(self._session, self._decoded.plan)

    def _abandon_given_up(self) -> None:
        self._executed |= self._given_up
        self._abandon(self._decoded.instance, self._given_up)
        self._given_up = set()

    def _abandon(self, instance: ExecutionPlan, partitions: set[int]) -> None:
        executions = [
            self._executor.in_thread(self._session.execute, exchange, partition - first)
            for exchange, first in repartitions(instance)
            for partition in partitions
            if 0 <= partition - first < exchange.partition_count
        ]
        if executions:
            self._executor.in_background(drop_unread(executions))


def has_failed(future: asyncio.Future[Any]) -> bool:
    """Whether there is no result, and will be none."""
    return future.done() and (future.cancelled() or future.exception() is not None)
