"""An asyncio client: a plan in, its record batches out."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeAlias

import grpc
import pyarrow as pa
from datafusion import ExecutionPlan

from worker.encoding.decode import Decoder
from worker.proto import Flight_pb2, Flight_pb2_grpc
from worker.ticket import StageKey, plan_ticket

__all__ = ["WorkerClient"]

HeadersLike: TypeAlias = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]

_TLS = "grpc+tls://"
_SCHEMES = ("grpc://", "grpc+tcp://", _TLS)
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A worker whose machine is gone says nothing, and is not to be waited for until TCP gives up.
    ("grpc.keepalive_time_ms", 60_000),
)


class WorkerClient:
    """A client of one worker, over one connection, which opens when it is needed.

        async with WorkerClient("grpc://127.0.0.1:8000") as client:
            async for batch in client.execute(plan):
                ...

    Errors are ``grpc.aio.AioRpcError``, with the worker's status and text in ``code()`` and ``details()``.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: HeadersLike = (),
        tls_root_certs: bytes | None = None,
        cert_chain: bytes | None = None,
        private_key: bytes | None = None,
    ) -> None:
        """
        Args:
            url: ``grpc://host:port``, or ``grpc+tls://host:port``.
            headers: sent with every request, such as ``{"authorization": "Bearer …"}``.
            tls_root_certs: who vouches for the worker, in PEM; the system's certificates where there are none.
            cert_chain: what is shown to the worker, in PEM, where it asks clients for a certificate.
            private_key: the certificate's key, in PEM.

        Raises:
            ValueError: ``url`` is of another kind; or it is not of TLS, and there are certificates; or there is a
                certificate without its key, or a key without its certificate.
        """
        scheme = next((scheme for scheme in _SCHEMES if url.startswith(scheme)), None)
        if scheme is None:
            raise ValueError(f"{url!r} is no worker's address: 'grpc://host:port' is right, or 'grpc+tls://host:port'")
        if (cert_chain is None) != (private_key is None):
            raise ValueError("a certificate and its key go together, and one of them is missing")
        self._headers = _pairs(headers)
        address = url.removeprefix(scheme).rstrip("/")
        if scheme == _TLS:
            credentials = grpc.ssl_channel_credentials(tls_root_certs, private_key, cert_chain)
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        elif tls_root_certs or cert_chain:
            raise ValueError(f"{url!r} is not of TLS, which the certificates are for: 'grpc+tls://host:port' is right")
        else:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = Flight_pb2_grpc.FlightServiceStub(self._channel)

    async def execute(
        self,
        plan: ExecutionPlan | bytes,
        partition: int | None = None,
        *,
        headers: HeadersLike = (),
        timeout: float | None = None,
    ) -> AsyncGenerator[pa.RecordBatch, None]:
        """The record batches of one partition of a plan; of all of them at once, as they come, when none is named.

        When the loop over it ends early, the requests are cancelled; put ``contextlib.aclosing`` around it where that
        must have happened before anything else does.

        Args:
            plan: a plan, or its bytes.
            partition: which partition.
            headers: sent along, beside the client's own.
            timeout: seconds that each request may take.

        Raises:
            grpc.aio.AioRpcError: a request failed, or took too long; the others are cancelled.
        """
        metadata = (*self._headers, *_pairs(headers))
        if partition is not None:
            tickets = [plan_ticket(plan, partition)]
        elif isinstance(plan, bytes):
            info = await self._stub.GetFlightInfo(_command(plan), metadata=metadata, timeout=timeout)
            tickets = [endpoint.ticket.ticket for endpoint in info.endpoint]
        else:
            key, serialized = StageKey.unique(), plan.to_bytes()
            tickets = [plan_ticket(serialized, partition, key) for partition in range(plan.partition_count)]
        async with aclosing(_merged([self._batches(ticket, metadata, timeout) for ticket in tickets])) as batches:
            async for batch in batches:
                yield batch

    async def schema(
        self, plan: ExecutionPlan | bytes, *, headers: HeadersLike = (), timeout: float | None = None
    ) -> pa.Schema:
        """The exact schema of a plan's batches.

        Raises:
            grpc.aio.AioRpcError: the request failed, or took more than ``timeout`` seconds.
        """
        metadata = (*self._headers, *_pairs(headers))
        result = await self._stub.GetSchema(_command(plan), metadata=metadata, timeout=timeout)
        return pa.ipc.read_schema(pa.py_buffer(result.schema))

    async def close(self) -> None:
        """Closes the connection, and cancels what is under way on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _batches(
        self, ticket: bytes, metadata: Sequence[tuple[str, str | bytes]], timeout: float | None
    ) -> AsyncGenerator[pa.RecordBatch, None]:
        call = self._stub.DoGet(Flight_pb2.Ticket(ticket=ticket), metadata=metadata, timeout=timeout)
        decoder = Decoder()
        try:
            async for message in call:
                batch = decoder.decode(message.data_header, message.data_body)
                if batch is not None:
                    yield batch
        finally:
            call.cancel()


async def _merged(streams: Sequence[AsyncGenerator[pa.RecordBatch, None]]) -> AsyncGenerator[pa.RecordBatch, None]:
    """The batches of several streams as they come, one of each read ahead."""
    reads = {asyncio.ensure_future(anext(stream, None)): stream for stream in streams}
    try:
        while reads:
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            for read in done:
                batch = read.result()
                stream = reads.pop(read)
                if batch is not None:
                    reads[asyncio.ensure_future(anext(stream, None))] = stream
                    yield batch
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _pairs(headers: HeadersLike) -> tuple[tuple[str, str | bytes], ...]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return tuple((name.lower(), value) for name, value in pairs)


def _command(plan: ExecutionPlan | bytes) -> Flight_pb2.FlightDescriptor:
    return Flight_pb2.FlightDescriptor(type=Flight_pb2.FlightDescriptor.CMD, cmd=plan_ticket(plan))
