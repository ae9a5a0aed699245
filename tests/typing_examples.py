"""What type checkers must accept as session builders; checked with the rest of the code, and run by a test."""

from functools import partial

from datafusion import SessionContext

from worker import SessionBuilder, Worker, WorkerQueryContext, WorkerSessionBuilder
from worker.session import SessionBuilderLike


async def asynchronous(ctx: WorkerQueryContext) -> SessionContext:
    return ctx.builder.build()


def synchronous(ctx: WorkerQueryContext) -> SessionContext:
    return ctx.builder.build()


def with_options(batch_size: int, ctx: WorkerQueryContext) -> SessionContext:
    return ctx.builder.with_config_option("datafusion.execution.batch_size", batch_size).build()


class WithMethod:
    async def build_session_state(self, ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.build()


class Callable:
    def __call__(self, ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.build()


class AsynchronousCallable:
    async def __call__(self, ctx: WorkerQueryContext) -> SessionContext:
        return ctx.builder.build()


def changed(session: SessionContext) -> SessionContext:
    return session


PROTOCOL: WorkerSessionBuilder = WithMethod()
BUILDER: WorkerSessionBuilder = SessionBuilder(asynchronous)

BUILDERS: list[SessionBuilderLike] = [
    asynchronous,
    synchronous,
    lambda ctx: ctx.builder.build(),
    partial(with_options, 1024),
    WithMethod(),
    WithMethod().build_session_state,
    Callable(),
    AsynchronousCallable(),
    SessionBuilder(synchronous),
    SessionBuilder(asynchronous).map(changed),
]


def workers() -> list[Worker]:
    """A worker of each kind of builder."""
    return [
        Worker.from_session_builder(asynchronous),
        Worker.from_session_builder(synchronous),
        Worker.from_session_builder(lambda ctx: ctx.builder.build()),
        Worker.from_session_builder(partial(with_options, 1024)),
        Worker.from_session_builder(WithMethod()),
        Worker.from_session_builder(Callable()),
        Worker.from_session_builder(AsynchronousCallable()),
        Worker.from_session_builder(PROTOCOL),
        Worker.from_session_builder(BUILDER),
        Worker(),
    ]
