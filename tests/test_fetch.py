"""The answers of other workers, and what is left of them when nobody wants them any more."""

import asyncio
import gc
from typing import Any

import grpc

from worker.allocator import give_back_freed_memory
from worker.cluster.fetch import Answering, read_answer
from worker.config import MEBIBYTE
from worker.execution.watchdog import resident_bytes

MESSAGE = bytes(4 * MEBIBYTE)
READERS = 60
METHOD = "/test.Endless/Send"


async def send(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    while True:
        await context.write(MESSAGE)


async def test_messages_of_reads_that_are_cancelled_are_freed() -> None:
    """Each is cancelled when a message has come and the next is on its way."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler: Any = grpc.unary_stream_rpc_method_handler(send)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Endless", {"Send": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = [("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:

            async def read_and_cancel() -> None:
                came = asyncio.Event()

                async def take(_: bytes) -> None:
                    came.set()

                send_endlessly: Answering = channel.unary_stream(METHOD)
                call = send_endlessly(b"")
                reading = asyncio.ensure_future(read_answer("http://test", call, take))
                await came.wait()
                reading.cancel()
                await asyncio.wait((reading,))
                assert reading.cancelled()
                assert call.done()

            for _ in range(10):
                await read_and_cancel()
            before = settled()
            for _ in range(READERS):
                await read_and_cancel()
            assert settled() - before < READERS * len(MESSAGE) / 4
    finally:
        await server.stop(None)


def settled() -> int:
    """Resident bytes without what has been freed."""
    gc.collect()
    give_back_freed_memory()
    return resident_bytes()
