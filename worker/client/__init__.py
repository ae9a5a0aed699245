"""An asyncio client: a plan in, its record batches out."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeAlias

import grpc
import pyarrow as pa
from datafusion import ExecutionPlan

from worker.decode import Decoder
from worker.proto import Flight_pb2, Flight_pb2_grpc
from worker.ticket import StageKey, plan_ticket

__all__ = ["WorkerClient"]

HeadersLike: TypeAlias = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]

_SCHEMES = ("grpc://", "grpc+tcp://")
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class WorkerClient:
    """A client of one worker, over one connection, which opens when it is needed.

        async with WorkerClient("grpc://127.0.0.1:8000") as client:
            async for batch in client.execute(plan):
                ...

    Errors are ``grpc.aio.AioRpcError``, with the worker's status and text in ``code()`` and ``details()``.
    """

    def __init__(self, url: str, *, headers: HeadersLike = ()) -> None:
        """
        Args:
            url: ``grpc://host:port``.
            headers: sent with every request, such as ``{"authorization": "Bearer …"}``.

        Raises:
            ValueError: ``url`` is of another kind.
        """
        scheme = next((scheme for scheme in _SCHEMES if url.startswith(scheme)), None)
        if scheme is None:
            raise ValueError(f"{url!r} is no worker's address: 'grpc://host:port' is right (there is no TLS here yet)")
        self._headers = _pairs(headers)
        self._channel = grpc.aio.insecure_channel(url.removeprefix(scheme).rstrip("/"), options=_OPTIONS)
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
