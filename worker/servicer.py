"""What all servicers of a worker share: its settings, session builder, tasks and counts, and the one error boundary."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

from worker.auth import caller
from worker.config import Settings
from worker.durations import Histogram
from worker.encoding import flight_data
from worker.ending import end, ended_with, this_request
from worker.errors import (
    DurationExceeded,
    EnginePanicked,
    SessionBuilderFailed,
    Unavailable,
    UpstreamFailed,
    WorkerError,
)
from worker.execution.admission import Admission
from worker.execution.executor import SMALL_PLAN, Executor
from worker.execution.tasks import Tasks
from worker.headers import Headers
from worker.message import Message
from worker.policy import DefaultPolicy, PlanPolicyLike, access_of, check_of
from worker.requests import Request, Requests
from worker.session import (
    DefaultSessionBuilder,
    SessionBuilder,
    SessionBuilderLike,
    SessionStateBuilder,
    WorkerQueryContext,
    is_cancellation,
)
from worker.supervision.journal import Journal
from worker.ticket import StageKey

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# Clients refuse metadata beyond 8 KiB (or 16, by their version), in which there is more than the text.
MAX_DETAILS = 6 * 1024

# Where a status has a protobuf of the error beside its text (the convention of google.rpc.Status).
STATUS_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a worker holds now, and what it has done since it started."""

    requests: int
    """Requests under way."""
    streams: int
    """Partitions being streamed."""
    tasks: int
    """Plans held, for streams under way and for partitions yet to be asked for."""
    plans_decoded: int
    partitions_executed: int
    rows_sent: int
    bytes_sent: int
    """Bytes of IPC messages, metadata and bodies."""
    requests_ended: Mapping[tuple[str, str], int]
    """How many, by the RPC's name and the name of their status, such as ``("DoGet", "OK")``."""
    errors: Mapping[str, int]
    """How many requests were refused or have failed, by the name of the error's class."""
    decoding: Histogram
    """How long it took to make an instance of a plan, what goes before its decoding included."""
    first_byte: Mapping[str, Histogram]
    """How long it took from a request to the first message of its answer, by the RPC's name."""
    waiting: int
    """Tasks that wait until there is memory for them."""
    memory_claimed: int
    """Bytes of the memory pools of the tasks that run."""


class Servicer:
    """A worker without any RPC."""

    def __init__(
        self,
        session_builder: SessionBuilderLike | None = None,
        *,
        settings: Settings | None = None,
        plan_policy: PlanPolicyLike | None = None,
        journal: Journal | None = None,
    ) -> None:
        """
        Args:
            session_builder: makes the session of every request; ``DefaultSessionBuilder`` where there is none.
            settings: of which ``port`` and what else is about a server have no meaning here; but certificates are shown
                to other workers, and ``host`` is for the policy: where it is not this machine's own, plans may name no
                files but those of ``allow_path``.
            plan_policy: decides what the plan of each request may touch; ``DefaultPolicy`` where there is none.
            journal: where it is noted which plans run, for a supervisor.

        Raises:
            UnfitSettings, OSError: the files of certificates are of no use.
        """
        self._settings = settings if settings is not None else Settings()
        builder = session_builder or DefaultSessionBuilder()
        self._session_builder = builder if isinstance(builder, SessionBuilder) else SessionBuilder(builder)
        policy = plan_policy or DefaultPolicy(self._settings)
        self._check_policy = check_of(policy)
        self._policy_is_default = type(policy) is DefaultPolicy
        self._admission = Admission(
            self._settings.memory,
            max_tasks=self._settings.max_tasks,
            max_waiting=self._settings.max_waiting,
            max_wait=self._settings.max_wait,
        )
        self._executor = Executor(self._settings, max_streams=self._settings.max_streams, journal=journal)
        self._tasks = Tasks(self._settings.idle_time, self._admission, self._executor)
        self._principal_key = secrets.token_bytes(32)
        self._requests = Requests()

    @classmethod
    def from_session_builder(
        cls,
        session_builder: SessionBuilderLike,
        *,
        settings: Settings | None = None,
        plan_policy: PlanPolicyLike | None = None,
    ) -> Self:
        """A worker whose sessions are made by a function of a ``WorkerQueryContext``, or an object with such a method.

        The method's name is ``build_session_state``, as ``WorkerSessionBuilder`` says.
        """
        return cls(session_builder, settings=settings, plan_policy=plan_policy)

    def with_max_message_size(self, size: int) -> Self:
        """Sets the largest message that is sent, in bytes, framing included; the setting's default is 4 MiB.

        Raises:
            pydantic.ValidationError: it is not between 64 KiB and 2047 MiB.
        """
        values = self._settings.model_dump(exclude_unset=True) | {"max_message_size": size}
        self._settings = Settings(**values)
        return self

    def statistics(self) -> Statistics:
        """What is held now and was done so far; from any thread."""
        executor, requests = self._executor, self._requests.statistics()
        return Statistics(
            requests=requests.active,
            streams=executor.streams,
            tasks=len(self._tasks),
            plans_decoded=executor.plans_decoded,
            partitions_executed=executor.partitions_executed,
            rows_sent=requests.rows_sent,
            bytes_sent=requests.bytes_sent,
            requests_ended=requests.ended,
            errors=requests.errors,
            decoding=executor.decoding.histogram(),
            first_byte=requests.first_byte,
            waiting=self._admission.waiting,
            memory_claimed=self._admission.claimed,
        )

    def refused(self, method: str, error: WorkerError) -> None:
        """Counts and logs a request that an interceptor has refused, by the RPC's name.

        The name is a label of metrics, so that it must be one of few.
        """
        self._requests.refused(method, error)

    async def close(self) -> None:
        """Drops all tasks. Stop the server first."""
        await self._tasks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def _answering(self, context: Context, method: str) -> AsyncIterator[Request]:
        """Counts a request, and turns whatever it raises into its status.

        Also what is no ``Exception``: a Rust panic that left a handler would leave the client without an answer.
        """
        request, running, started = self._requests.begin(method), this_request(), time.monotonic()
        timer = self._end_in_time(running)
        try:
            yield request
        except WorkerError as error:
            self._requests.end(request, error.status, error)
            text = str(error)
            if isinstance(error, EnginePanicked) and (panic := await self._executor.journal.last_panic(started)):
                text = f"{text} (panicked at {panic})"
            _fail(context, error.status, _details(text))
            if isinstance(error, UpstreamFailed) and error.details:
                context.set_trailing_metadata(((STATUS_DETAILS, error.details),))
        except grpc.aio.AbortError:
            self._requests.end(request, _code(context))
            raise
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            ended = ended_with(running)
            self._requests.end(request, ended.status if ended else grpc.StatusCode.CANCELLED, ended)
            # gRPC, which sends what the handler yields, was ended in the midst of that, and gives no answer then.
            if ended:
                self._executor.in_background(_abort(context, ended))
            raise
        except BaseException as error:
            if is_cancellation(error):
                ended = ended_with(running)
                self._requests.end(request, ended.status if ended else grpc.StatusCode.CANCELLED, ended)
                if not ended:
                    raise
                running.uncancel()
                _fail(context, ended.status, _details(str(ended)))
            elif isinstance(error, asyncio.CancelledError):
                # Nobody cancels what a request waits for but the worker, when it is closed.
                closed = Unavailable("the worker was closed")
                self._requests.end(request, closed.status, closed)
                _fail(context, closed.status, str(closed))
            else:
                self._requests.end(request, grpc.StatusCode.INTERNAL, error)
                _fail(context, grpc.StatusCode.INTERNAL, "internal error: the worker's log says why")
        else:
            self._requests.end(request, grpc.StatusCode.OK)
        finally:
            if timer is not None:
                timer.cancel()

    async def _send(
        self,
        context: Context,
        method: str,
        answer: Callable[[Request], AsyncGenerator[tuple[Message, bytes], None]],
    ) -> None:
        """Answers with messages, each with its ``app_metadata``, as the bytes of a ``FlightData``.

        For handlers without a serializer. Those of generated code get objects, which their generators yield.
        """
        async with (
            self._answering(context, method) as answered,
            aclosing(answer(answered)) as messages,
        ):
            async for message, metadata in messages:
                try:
                    await context.write(flight_data.serialize(message, metadata))
                except grpc.aio.InternalError:
                    # The caller has gone: the RPC is cancelled, its handler not yet.
                    return

    def _end_in_time(self, running: asyncio.Task[Any]) -> asyncio.TimerHandle | None:
        """Ends a request after ``max_duration``."""
        seconds = self._settings.max_duration
        if seconds is None:
            return None
        error = DurationExceeded(f"the request took longer than {seconds:g} s, which is this worker's max_duration")
        return asyncio.get_running_loop().call_later(seconds, end, running, error)

    async def _permit(
        self, query: WorkerQueryContext, plan_bytes: bytes, *, is_known: bool = False
    ) -> frozenset[str] | None:
        """Has the policy look at what a plan touches, before anything of it is decoded.

        Args:
            query: the request, whose session has been built.
            plan_bytes: the plan.
            is_known: whether the same principal has a task with this plan. Only a policy of the user's own, which may
                look at headers, could say something else then.

        Returns:
            The kinds of its nodes, by ``PlanAccess.nodes``; None if nothing had to be looked at.

        Raises:
            InvalidPlan: the bytes are no plan, or it names a store by what is no URL.
            WorkerError: whatever the policy raised of these, ``PermissionDenied`` above all.
            SessionBuilderFailed: it raised anything else.
        """
        if is_known and self._policy_is_default:
            return None
        find = partial(access_of, plan_bytes, with_functions=not self._policy_is_default)
        access = await self._executor.in_thread_if(len(plan_bytes) > SMALL_PLAN, find)
        try:
            await self._check_policy(query, access)
        except WorkerError:
            raise
        except BaseException as error:
            if is_cancellation(error):
                raise
            raise SessionBuilderFailed("the plan policy failed: the worker's log says why") from error
        return access.nodes

    def _query_context(
        self, request: Request, context: Context, *, task_index: int, task_count: int, stage_key: StageKey | None
    ) -> WorkerQueryContext:
        headers = Headers(context.invocation_metadata() or ())
        request.query = WorkerQueryContext(
            builder=SessionStateBuilder(
                self._settings.pool_size, self._settings.spill_folder, max_spill=self._settings.max_spill
            ),
            headers=headers,
            task_index=task_index,
            task_count=task_count,
            stage_key=stage_key,
            principal=self._principal(headers, context),
        )
        return request.query

    def _principal(self, headers: Headers, context: Context) -> str:
        if name := caller.get():
            return name
        # Keyed, so that nobody who sees the digest can try tokens against it.
        digest = hashlib.blake2b(key=self._principal_key, digest_size=16)
        tokens = [token.encode("utf-8", "surrogateescape") for token in headers.get_all("authorization")]
        # A worker that reads on behalf of a caller sends the caller's token, beside a certificate of its own.
        for parts in (tokens, [] if tokens else list(context.peer_identities() or ())):
            # With numbers and lengths, so that no two callers' values come to the same bytes.
            digest.update(b"%d " % len(parts) + b"".join(b"%d %b" % (len(part), part) for part in parts))
        return digest.hexdigest()


async def _abort(context: Context, error: WorkerError) -> None:
    """Ends an RPC with a status, from outside of its handler."""
    with contextlib.suppress(grpc.aio.AbortError):
        await context.abort(error.status, _details(str(error)))


def _fail(context: Context, code: grpc.StatusCode, details: str) -> None:
    """Has the RPC end with a status when its handler returns.

    ``context.abort`` raises, and gRPC keeps what it raises in a circle: the sessions in the frames that the traceback
    names would be kept until Python looks for circles.
    """
    context.set_code(code)
    context.set_details(details)


def _details(text: str) -> str:
    """A text as gRPC can carry it: percent-encoded, in a trailer that clients take only if it is short."""
    kept: list[str] = []
    size = 0
    for character in text.encode("utf-8", "replace").decode():
        size += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if size > MAX_DETAILS:
            return "".join(kept) + " ..."
        kept.append(character)
    return "".join(kept)


def _code(context: Context) -> grpc.StatusCode:
    """The status that a handler has set."""
    code = context.code()
    return next((status for status in grpc.StatusCode if code in (status, status.value[0])), grpc.StatusCode.UNKNOWN)
