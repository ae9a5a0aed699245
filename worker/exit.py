"""The end of a process."""

import contextlib
import logging
import os
import sys
from typing import NoReturn


def end(code: int) -> NoReturn:
    """Ends the process without finalizing the interpreter, in which threads of DataFusion's runtime may crash it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
