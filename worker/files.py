"""Files that are read anew when they change."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from worker.config import UnfitSettings

logger = logging.getLogger("worker")

T = TypeVar("T")


class Reloaded(Generic[T]):
    """What is read from files, for as long as they stay the same.

    Files that are of no use when they have changed, because they are half written or gone, leave what was read before
    in force, and the log says so once. Any thread may ask.
    """

    def __init__(self, what: str, files: Sequence[Path], read: Callable[[], T]) -> None:
        """
        Args:
            what: its name in the log, such as "tokens".
            files: all that ``read`` reads.
            read: reads them; it raises ``UnfitSettings`` or ``OSError`` where they are of no use, now too.
        """
        self._what, self._files, self._read = what, files, read
        self._stamps = self._stamps_now()
        self._value = read()

    def current(self) -> T:
        """What the files hold. Takes some microseconds, and longer only when they have changed."""
        stamps = self._stamps_now()
        if stamps != self._stamps:
            try:
                value = self._read()
            except (UnfitSettings, OSError) as error:
                self._stamps = stamps
                logger.warning("the former %s stay in force: %s", self._what, error)
            else:
                # Else they were written to meanwhile, and whoever asks next sees to it.
                if self._stamps_now() == stamps:
                    self._stamps, self._value = stamps, value
                    logger.info("new %s are in force: %s", self._what, ", ".join(map(str, self._files)))
        return self._value

    def _stamps_now(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells a file's content from that before and after it; None if there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
