"""A worker's process as the child of a supervisor: what it is given, and what it tells."""

import asyncio
import contextlib
import faulthandler
import json
import math
import os
import select
import shutil
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

from worker.supervision.board import SHOW_STACKS, VARIABLE, Board
from worker.supervision.engine_threads import EngineThreads
from worker.supervision.journal import Journal

BEAT_SECONDS = 1.0

# Of a machine that is out of memory, the kernel takes the process with the most: that is to be the worker, and neither
# its supervisor nor another program. This is added to what the supervisor has; 1000 is the most.
OUT_OF_MEMORY_SCORE = 500

# So often a thread is looked at before it counts as stuck.
LOOKS = 10


class Supervised:
    """The connection to the supervisor."""

    def __init__(self, news: socket.socket, board: Board, folder: str, stuck_seconds: float) -> None:
        """
        Args:
            news: what the supervisor reads, and closes when it ends.
            board: shared with it.
            folder: for temporary files, the process's own.
            stuck_seconds: for how long a thread may work for nobody.
        """
        self._news = news
        self._board = board
        self._folder = folder
        self._stuck_seconds = stuck_seconds
        self.journal = Journal(board, partial(self.tell, outgrown=True))

    @classmethod
    def from_environment(cls) -> Self | None:
        """What a supervisor has put there for this process, and no process that this one starts; None if none has."""
        given = os.environ.pop(VARIABLE, None)
        if given is None:
            return None
        values = json.loads(given)
        for descriptor in (values["news"], values["board"]):
            os.set_inheritable(descriptor, False)
        news = socket.socket(fileno=values["news"])
        return cls(news, Board(values["board"]), values["folder"], values["stuck_seconds"])

    def tell(self, **news: Any) -> None:
        """Tells the supervisor something, such as ``listening="grpc://127.0.0.1:8000"`` or ``metrics_port=9000``."""
        self._news.sendall(json.dumps(news).encode() + b"\n")

    def watch(self, seconds: float) -> None:
        """From now on, a thread sees to it that this process ends with its supervisor, and tells of stuck threads.

        Args:
            seconds: in which the process has to have ended when the supervisor is no more: it ends as on SIGTERM, and
                if that takes longer, the kernel ends it, whatever it hangs in.
        """
        faulthandler.register(SHOW_STACKS, all_threads=True)
        _be_the_first_to_go()
        threading.Thread(target=self._watch, args=(seconds,), name="worker-supervised", daemon=True).start()

    def clean_up(self) -> None:
        """Deletes the temporary folder, at the end: there may be no supervisor any more to do it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def beat(self) -> None:
        """Shows the supervisor that the event loop comes round, for as long as it does."""
        while True:
            self._board.beat()
            await asyncio.sleep(BEAT_SECONDS)

    def _watch(self, seconds: float) -> None:
        threads = EngineThreads()
        # What is to be read is the end: the supervisor writes nothing.
        ended = select.poll()
        ended.register(self._news, select.POLLIN)
        while not ended.poll(1000 * self._stuck_seconds / LOOKS):
            if threads.look(time.monotonic(), self.journal.oldest()) >= self._stuck_seconds:
                with contextlib.suppress(OSError):
                    self.tell(stuck=True)
                # It is told once: what it does about it takes a while.
                ended.poll()
        signal.alarm(math.ceil(seconds))
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            # It is not serving yet, and is gone in a moment.
            self.clean_up()
        os.kill(os.getpid(), signal.SIGTERM)


def _be_the_first_to_go() -> None:
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        score.write_text(str(min(1000, int(score.read_text()) + OUT_OF_MEMORY_SCORE)))
