"""Handlers as they are added to servers: such that refuse what is no protobuf, and such that send bytes."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """What a handler gets in place of a request."""

    why: str


def adding(server: grpc.aio.Server, service: str, ready: dict[str, Any]) -> grpc.aio.Server:
    """A server as it is for generated code that adds handlers to it: those answer INVALID_ARGUMENT to rubbish.

    That is the client's mistake, for which gRPC by itself says UNKNOWN. RPCs whose requests are streams get the
    ``DecodeError`` when they read, and see to it themselves.

    Args:
        server: what they are added to.
        service: the full name of theirs.
        ready: handlers by the names of their RPCs, in place of those of generated code.
    """
    return cast(grpc.aio.Server, _Adding(server, service, ready))


def sending_bytes(answer: Callable[[Any, Any], Awaitable[None]], request: Any) -> Any:
    """A handler that writes messages which are serialized already.

    Args:
        answer: writes them.
        request: the class of what it is given.
    """
    return grpc.unary_stream_rpc_method_handler(
        answer, request_deserializer=request.FromString, response_serializer=None
    )


class _Adding:
    def __init__(self, server: grpc.aio.Server, service: str, ready: dict[str, Any]) -> None:
        self._server = server
        self._service = service
        self._ready = ready

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        # An old grpcio (1.72) uses these alone, and takes the first.
        ready = grpc.method_handlers_generic_handler(self._service, self._ready)
        self._server.add_generic_rpc_handlers((ready, *handlers))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        reading = {name: _readable(handler) for name, handler in {**handlers, **self._ready}.items()}
        self._server.add_registered_method_handlers(service, reading)


def _readable(handler: Any) -> Any:
    if handler.request_streaming:
        return handler
    deserialize = handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Unreadable(str(error))

    if not handler.response_streaming:
        answer = handler.unary_unary

        async def one(request: Any, context: Any) -> Any:
            await _refuse(request, context)
            return await answer(request, context)

        return handler._replace(request_deserializer=read, unary_unary=one)

    stream = handler.unary_stream
    if inspect.isasyncgenfunction(stream):

        async def many(request: Any, context: Any) -> AsyncIterator[Any]:
            await _refuse(request, context)
            async with aclosing(stream(request, context)) as messages:
                async for message in messages:
                    yield message

        return handler._replace(request_deserializer=read, unary_stream=many)

    async def writing(request: Any, context: Any) -> None:
        await _refuse(request, context)
        await stream(request, context)

    return handler._replace(request_deserializer=read, unary_stream=writing)


async def _refuse(request: Any, context: Any) -> None:
    """Ends the RPC if its request could not be read."""
    if isinstance(request, _Unreadable):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request cannot be read: {request.why}")
