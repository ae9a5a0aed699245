"""Bearer tokens from a file, checked for every request, whatever service it is of."""

import hashlib
import hmac
import inspect
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc

from worker.config import UnfitSettings
from worker.errors import Unauthenticated, WorkerError
from worker.files import Reloaded
from worker.headers import Headers

# The name of the token that the running request came with, where it has one: the request's principal.
caller: ContextVar[str | None] = ContextVar("caller", default=None)

# How often the file is looked at, at most.
CHECK_SECONDS = 1.0

# Each is compared with what comes, in 0.3 µs.
MAX_TOKENS = 1000

# Fewer characters can be guessed.
MIN_LENGTH = 16

# RFC 6750: what may stand behind "Bearer".
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

# The name of RPCs that there are not.
UNKNOWN = "unknown"

# Probes of containers have no token, and health tells nothing but that the worker serves.
OPEN = "/grpc.health.v1.Health/"


class TokenAuth(grpc.aio.ServerInterceptor):
    """Refuses requests without one of a file's tokens, for ``grpc.aio.server(interceptors=[TokenAuth(file)])``.

    A line of the file is ``token`` or ``name:token``; empty ones and those that begin with ``#`` do not count. A
    token's name is the principal of its requests, so that it can be changed for another token. A file that has changed
    is read anew within a second; one that is of no use then leaves the former tokens in force, and the log says so.

    Requests of ``grpc.health.v1.Health`` need no token, and are not read, as if they were for no service by name:
    whoever has no token could fill the memory with large ones that do not end.
    """

    def __init__(self, file: Path | str, refused: Callable[[str, WorkerError], None] | None = None) -> None:
        """
        Args:
            file: of tokens.
            refused: is told of every refusal, with the RPC's name: ``Worker.refused``.

        Raises:
            UnfitSettings: the file has no token, or a line that is none; the text has its number, never what it says.
            OSError: it cannot be read.
        """
        self._file = Path(file)
        self._refused = refused
        # Digests of one length, which nobody outside can make.
        self._key = secrets.token_bytes(32)
        self._file_names = Reloaded("tokens", [self._file], self._read)
        self._names = self._file_names.current()
        self._next_check = time.monotonic() + CHECK_SECONDS

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The request's own handler, or one that says what was wrong before it reads anything."""
        if handler_call_details.method.startswith(OPEN):
            handler = await continuation(handler_call_details)
            return handler and _unread(handler)
        try:
            caller.set(self._name_of(Headers(handler_call_details.invocation_metadata or ())))
        except Unauthenticated as error:
            if self._refused is not None:
                # A name that nobody serves is the caller's own, and they may have any number of them.
                is_served = await continuation(handler_call_details) is not None
                self._refused(handler_call_details.method.rpartition("/")[2] if is_served else UNKNOWN, error)
            return _refusing(error)
        return await continuation(handler_call_details)

    def _name_of(self, headers: Headers) -> str | None:
        """The name of the token that came, if it has one.

        Raises:
            Unauthenticated: none of the tokens came, or more than one value.
        """
        values = headers.get_all("authorization")
        if len(values) != 1:
            was = f"was sent {len(values)} times, once is right" if values else "is missing"
            raise Unauthenticated(f"the header authorization {was}: send 'authorization: Bearer' with a token")
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the header authorization is not of the form 'Bearer' and a token")
        presented = self._digest(token)
        now = time.monotonic()
        if now >= self._next_check:
            self._names, self._next_check = self._file_names.current(), now + CHECK_SECONDS
        # All of them, so that the time it takes does not tell which one came close.
        found = [digest for digest in self._names if hmac.compare_digest(digest, presented)]
        if not found:
            raise Unauthenticated("the token in the header authorization is none of this worker's")
        return self._names[found[0]]

    def _read(self) -> Mapping[bytes, str | None]:
        """The names of the file's tokens, by the tokens' digests."""
        names: dict[bytes, str | None] = {}
        for number, line in enumerate(self._file.read_bytes().decode("utf-8-sig", "replace").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, colon, token = (part.strip() for part in line.rpartition(":"))
            if not TOKEN.fullmatch(token) or len(token) < MIN_LENGTH or (colon and not name):
                raise UnfitSettings(
                    f"line {number} of {self._file} is not 'token' or 'name:token', the token of at least {MIN_LENGTH} "
                    "letters, digits, and -._~+/ or = at its end"
                )
            digest = self._digest(token)
            if digest in names:
                raise UnfitSettings(f"line {number} of {self._file} has a token that is there already")
            names[digest] = name or None
        if not names:
            raise UnfitSettings(f"{self._file} has no token")
        if len(names) > MAX_TOKENS:
            raise UnfitSettings(f"{self._file} has {len(names)} tokens, {MAX_TOKENS} are the most")
        return names

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode("utf-8", "surrogateescape"), key=self._key, digest_size=32).digest()


def _unread(handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler of single requests as one that answers to an empty request, whatever the caller sends."""
    answer = handler.unary_stream if handler.response_streaming else handler.unary_unary
    if handler.request_deserializer is None or not inspect.iscoroutinefunction(answer):
        return handler
    request = handler.request_deserializer(b"")

    async def answer_unread(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        answered = await answer(request, context)
        if not handler.response_streaming:
            await context.write(answered)

    return grpc.stream_stream_rpc_method_handler(answer_unread, response_serializer=handler.response_serializer)


def _refusing(error: Unauthenticated) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        context.set_code(error.status)
        context.set_details(str(error))

    # Of streams, whatever the method is of: the handler of a single message would be given that first.
    return grpc.stream_stream_rpc_method_handler(refuse)
