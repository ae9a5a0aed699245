"""The session of a request: what the user's builder gets, what it may be, and what the worker needs of it."""

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias
from urllib.parse import urlsplit

from datafusion import AggregateUDF, RuntimeEnvBuilder, ScalarUDF, SessionConfig, SessionContext, WindowUDF
from datafusion.extensions import SessionComponentsExportable, SessionPlannerExportable
from datafusion.user_defined import PhysicalExtensionCodecExportable

from worker.errors import SessionBuilderFailed, WorkerError
from worker.headers import Headers
from worker.output import EXPAND_VIEWS_OPTION
from worker.ticket import StageKey

# Each with the wrong answer that DataFusion's default gives to somebody who executes one partition at a time.
PARTITION_WISE_OPTIONS: Mapping[str, str] = {
    # One queue of files for all partitions of a scan: whichever runs first returns the rows of the others too.
    "datafusion.execution.enable_file_stream_work_stealing": "false",
    # A CollectLeft join waits until every partition has reported its filter: reading only some of them hangs.
    "datafusion.optimizer.enable_dynamic_filter_pushdown": "false",
}

# Synchronous session builders may wait for other services; those of so many requests do so at the same time.
BUILDER_THREADS = 64


class SessionStateBuilder:
    """Builds the ``SessionContext`` of one request, fluently; the worker hands it out with its settings filled in.

    Each ``with_…`` changes this builder and returns it. ``build`` makes a runtime environment of its own, so that
    nothing (object stores, memory) is shared with the session of another request.
    """

    def __init__(
        self,
        memory_limit: int | None = None,
        spill_folder: str | Path | None = None,
        *,
        max_spill: int | None = None,
    ) -> None:
        """
        Args:
            memory_limit: bytes of the session's memory pool; without it, memory is not limited.
            spill_folder: where DataFusion spills to; without it, the system's temporary folder.
            max_spill: bytes that it may spill, rounded down to KiB; without it, DataFusion's 100 GB.
        """
        self._options: dict[str, str] = dict(PARTITION_WISE_OPTIONS)
        self._memory_limit = memory_limit
        self._spill_folder = spill_folder
        self._max_spill = max_spill
        self._scalar_functions: list[ScalarUDF] = []
        self._aggregate_functions: list[AggregateUDF] = []
        self._window_functions: list[WindowUDF] = []
        self._object_stores: list[tuple[str, str | None, Any]] = []
        self._physical_codecs: list[tuple[PhysicalExtensionCodecExportable, str | None]] = []
        self._extensions: list[SessionComponentsExportable | SessionPlannerExportable] = []
        self._python_udf_inlining = False
        self._finished: tuple[SessionContext, bool] | None = None

    @property
    def expands_views(self) -> bool:
        """Whether views of text and bytes are to leave as plain ones, by the DataFusion option of that meaning."""
        return self._options.get(EXPAND_VIEWS_OPTION, "").strip().lower() == "true"

    @property
    def memory_limit(self) -> int | None:
        """Bytes of the session's memory pool, which its task holds of the worker's ``memory`` while it runs.

        None for no limit: such a task runs alone.
        """
        return self._memory_limit

    @property
    def python_udf_inlining(self) -> bool:
        """Whether Python functions that come inside a plan are unpickled, that is, run."""
        return self._python_udf_inlining

    @property
    def object_stores(self) -> frozenset[str]:
        """Scheme and host of each object store that was added, such as ``s3://bucket``."""
        return frozenset(f"{scheme}{host or ''}" for scheme, host, _ in self._object_stores)

    def with_config_option(self, name: str, value: str | int | float | bool) -> Self:
        """Sets a DataFusion option, such as ``datafusion.execution.batch_size``; ``build`` refuses unknown ones."""
        self._options[name] = str(value).lower() if isinstance(value, bool) else str(value)
        return self

    def with_config_options(self, options: Mapping[str, str | int | float | bool]) -> Self:
        """Sets DataFusion options."""
        for name, value in options.items():
            self.with_config_option(name, value)
        return self

    def with_memory_limit(self, limit: int | None) -> Self:
        """Sets the memory pool, in bytes, shared fairly between operators that can spill; None for no limit."""
        self._memory_limit = limit
        return self

    def with_spill_folder(self, folder: str | Path | None) -> Self:
        """Sets where operators that run out of memory write to; None for the system's temporary folder."""
        self._spill_folder = folder
        return self

    def with_scalar_functions(self, functions: Iterable[ScalarUDF]) -> Self:
        """Adds scalar functions, found by the names they have in plans."""
        self._scalar_functions.extend(functions)
        return self

    def with_aggregate_functions(self, functions: Iterable[AggregateUDF]) -> Self:
        """Adds aggregate functions, found by the names they have in plans."""
        self._aggregate_functions.extend(functions)
        return self

    def with_window_functions(self, functions: Iterable[WindowUDF]) -> Self:
        """Adds window functions, found by the names they have in plans."""
        self._window_functions.extend(functions)
        return self

    def with_object_store(self, url: str, store: Any) -> Self:
        """Adds an object store (of ``datafusion.object_store``) for URLs like ``s3://bucket``.

        Raises:
            ValueError: ``url`` has no scheme.
        """
        parts = urlsplit(url)
        if "://" not in url or not parts.scheme:
            raise ValueError(f"object store URL {url!r} has no scheme: 's3://bucket' is right")
        self._object_stores.append((f"{parts.scheme}://", parts.netloc or None, store))
        return self

    def with_physical_codec(self, codec: PhysicalExtensionCodecExportable, codec_id: str | None = None) -> Self:
        """Adds a compiled codec, an object with ``__datafusion_physical_extension_codec__``, for nodes of your own."""
        self._physical_codecs.append((codec, codec_id))
        return self

    def with_extension(self, extension: SessionComponentsExportable | SessionPlannerExportable) -> Self:
        """Adds an extension bundle, as ``SessionContext.with_extensions`` takes it."""
        self._extensions.append(extension)
        return self

    def with_python_udf_inlining(self, enabled: bool = True) -> Self:
        """Lets Python functions that clients pickled into their plans run here.

        That is code of the client, with all rights of this process. Off unless asked for: the pickles are dropped
        unread, and functions are found by name among those that this builder was given.
        """
        self._python_udf_inlining = enabled
        return self

    def build(self) -> SessionContext:
        """A new session with a runtime environment of its own.

        It has what executing one partition needs. Return it as it is: a ``SET`` of ``PARTITION_WISE_OPTIONS`` on it
        would not be noticed.

        Raises:
            ValueError: DataFusion does not know an option, or refuses its value.
        """
        runtime = RuntimeEnvBuilder()
        if self._memory_limit is not None:
            runtime = runtime.with_fair_spill_pool(self._memory_limit)
        if self._spill_folder is not None:
            runtime = runtime.with_temp_file_path(self._spill_folder)
        session = SessionContext(SessionConfig(self._options), runtime)
        if self._max_spill is not None:
            # There is no other way to set it; it takes longer than all the rest, 0.2 ms.
            session.sql(f"SET datafusion.runtime.max_temp_directory_size = '{self._max_spill // 1024}K'")
        for scalar in self._scalar_functions:
            session.register_udf(scalar)
        for aggregate in self._aggregate_functions:
            session.register_udaf(aggregate)
        for window in self._window_functions:
            session.register_udwf(window)
        for scheme, host, store in self._object_stores:
            session.register_object_store(scheme, store, host)
        for codec, codec_id in self._physical_codecs:
            session = session.with_physical_extension_codec(codec, codec_id)
        if self._extensions:
            session = session.with_extensions(*self._extensions)
        session = session.with_python_udf_inlining(enabled=self._python_udf_inlining)
        if PARTITION_WISE_OPTIONS.items() <= self._options.items():
            self._finished = session, self._python_udf_inlining
        return session

    def finish(self, session: SessionContext) -> SessionContext:
        """The session that plans are decoded and executed in, of one that anybody made for this builder's request.

        Where ``build`` did not make it, or was told otherwise, it is given what executing one partition needs. That
        blocks for 0.1 ms, as long as to build it.
        """
        finished, self._finished = self._finished, None
        if finished != (session, self._python_udf_inlining):
            apply_partition_wise_options(session)
            session = session.with_python_udf_inlining(enabled=self._python_udf_inlining)
        return session


@dataclass
class WorkerQueryContext:
    """One request, as a session builder sees it."""

    builder: SessionStateBuilder
    """Pre-populated with the worker's settings; add to it and return ``ctx.builder.build()``."""
    headers: Headers
    task_index: int = 0
    """Which task of the stage this request belongs to."""
    task_count: int = 0
    """How many tasks the stage has; 0 where the client does not say."""
    stage_key: StageKey | None = None
    principal: str = field(default="", repr=False)
    """Who asks; tasks are shared between requests of one principal only. A digest of the ``authorization`` values and
    of the TLS peer, unless the builder sets it: to a user's name, say, so that a renewed token changes nothing."""


class WorkerSessionBuilder(Protocol):
    """What makes the session of every request. Await what you like; raise ``worker.Unauthenticated`` and its like."""

    async def build_session_state(self, ctx: WorkerQueryContext) -> SessionContext:
        """The session that the request's plan is decoded and executed in."""
        ...


SessionBuilderFunction: TypeAlias = Callable[[WorkerQueryContext], SessionContext | Awaitable[SessionContext]]
SessionBuilderLike: TypeAlias = WorkerSessionBuilder | SessionBuilderFunction


class SessionBuilder:
    """A session builder out of anything that may be one: an object with ``build_session_state``, or a function.

    A synchronous function runs in a thread, so that it may block.
    """

    def __init__(self, builder: SessionBuilderLike) -> None:
        """
        Raises:
            TypeError: ``builder`` is neither a function nor an object with ``build_session_state``.
        """
        build = getattr(builder, "build_session_state", builder)
        if not callable(build) or isinstance(builder, type):
            raise TypeError(
                f"{builder!r} is no session builder: a function of a WorkerQueryContext, "
                "or an object with build_session_state, is right"
            )
        try:
            inspect.signature(build).bind(None)
        except ValueError:
            pass  # a callable of compiled code may not say what it takes
        except TypeError as error:
            raise TypeError(
                f"{builder!r} is no session builder: it must take a WorkerQueryContext, and that alone"
            ) from error
        self._build: SessionBuilderFunction = build
        # Threads start when they are needed, and only synchronous functions need any.
        self._threads = ThreadPoolExecutor(BUILDER_THREADS, thread_name_prefix="worker-session")

    async def build_session_state(self, ctx: WorkerQueryContext) -> SessionContext:
        """Awaits the builder, and finishes what it made.

        Raises:
            WorkerError: whatever the builder raised of these.
            SessionBuilderFailed: it raised anything else, or did not return a session.
        """
        try:
            session = await self._call(self._build, ctx)
        except WorkerError:
            raise
        except BaseException as error:
            # Not even an exit leaves here: whoever asks has an answer coming, and others are being served.
            if is_cancellation(error):
                raise
            if isinstance(only := _only_error(error), WorkerError):
                raise only from error
            raise SessionBuilderFailed("the session builder failed: the worker's log says why") from error
        if not isinstance(session, SessionContext):
            raise SessionBuilderFailed("the session builder failed: the worker's log says why") from TypeError(
                f"the session builder returned {type(session).__name__}, a datafusion.SessionContext is right: "
                "does it end in 'return ctx.builder.build()'?"
            )
        return ctx.builder.finish(session)

    async def admit(self, ctx: WorkerQueryContext) -> None:
        """Awaits the builder for a request that needs no session of its own: only whether it may be served.

        Raises:
            WorkerError, SessionBuilderFailed: as ``build_session_state``.
        """
        await self.build_session_state(ctx)

    def map(self, change: Callable[[SessionContext], SessionContext | Awaitable[SessionContext]]) -> "SessionBuilder":
        """A builder that hands the session of this one to ``change`` and answers with what comes back."""

        async def build_and_change(ctx: WorkerQueryContext) -> SessionContext:
            changed: SessionContext = await self._call(change, await self.build_session_state(ctx))
            return changed

        return SessionBuilder(build_and_change)

    async def _call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """The result of a function that may be asynchronous; a synchronous one runs in a thread."""
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(argument)
        call = functools.partial(contextvars.copy_context().run, _without_stop_iteration, function, argument)
        result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return await result if inspect.isawaitable(result) else result


class DefaultSessionBuilder(SessionBuilder):
    """Builds what the context's builder holds, with nothing added."""

    def __init__(self) -> None:
        super().__init__(_build_default)

    async def admit(self, ctx: WorkerQueryContext) -> None:
        """Lets everybody in."""


def is_cancellation(error: BaseException) -> bool:
    """Whether the running task is being cancelled, and this is how it learns of it."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _only_error(error: BaseException) -> BaseException:
    """What a builder meant that awaited several things at once in a ``TaskGroup``."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _build_default(ctx: WorkerQueryContext) -> SessionContext:
    return ctx.builder.build()


def _without_stop_iteration(function: Callable[[Any], Any], argument: Any) -> Any:
    """Calls a function; a ``StopIteration``, which no future can hold, would leave who awaits it waiting for ever."""
    try:
        return function(argument)
    except StopIteration as error:
        raise RuntimeError(f"{function!r} raised StopIteration") from error


def apply_partition_wise_options(session: SessionContext) -> None:
    """Sets what partition-wise execution needs, on a session that anybody made. Blocks for about 0.1 ms."""
    for name, value in PARTITION_WISE_OPTIONS.items():
        session.sql(f"SET {name} = {value}")
