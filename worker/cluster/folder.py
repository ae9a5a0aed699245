"""Where input is kept that is too large for memory: a folder for each process, gone when that ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from threading import Lock

from worker.errors import ResourcesExhausted

PREFIX = "worker-exchange-"
LOCK = "lock"


class ExchangeFolder:
    """A temporary folder, made when it is first needed.

    Those of workers that were killed are deleted then: nobody holds their locks.
    """

    def __init__(self, parent: Path | None, limit: int | None = None) -> None:
        """
        Args:
            parent: where it is to be; the system's temporary folder if None.
            limit: how many bytes may be in it; None for as many as there is room for.
        """
        self._limit = limit
        self._used = 0
        self._parent = Path(parent or tempfile.gettempdir())
        self._folder: Path | None = None
        self._making = Lock()
        self._lock = -1

    @property
    def is_made(self) -> bool:
        """Whether it is there."""
        return self._folder is not None

    def new(self) -> Path:
        """A path in it that nothing has. Blocks where it is not there yet, also for what others have left."""
        with self._making:
            if self._folder is None:
                self._delete_abandoned()
                self._folder, self._lock = self._make()
            return self._folder / uuid.uuid4().hex

    def take(self, size: int) -> None:
        """Counts what is written, to be given back when it is deleted, with a negative size.

        Raises:
            ResourcesExhausted: it is more than there may be. It is counted all the same.
        """
        self._used += size
        if self._limit is not None and size > 0 and self._used > self._limit:
            raise ResourcesExhausted(
                f"{self._used} bytes of other workers' rows are on this worker's disk, of which max_spill allows "
                f"{self._limit}"
            )

    def close(self) -> None:
        """Deletes it. Blocks."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = None

    def _make(self) -> tuple[Path, int]:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._parent))
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another worker that starts may have taken it for abandoned, before this one had the lock.
            if (folder / LOCK).exists():
                return folder, lock
            os.close(lock)

    def _delete_abandoned(self) -> None:
        for folder in self._parent.glob(PREFIX + "*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)
