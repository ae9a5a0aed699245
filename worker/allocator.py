"""What becomes of freed memory, and the variables that DataFusion and gRPC look at when they are loaded."""

import ctypes
import os
import sys
from collections.abc import Mapping

# Messages are freed as soon as they are sent, and the next is as large. glibc would give each back to the system, and
# then wait for its pages to be zeroed again: that halves the throughput from half a megabyte a message on. The first is
# the most that is kept at the end of the heap, the second the largest block (and what glibc allows at most) that is.
KEPT_BYTES = 64 << 20
LARGEST_KEPT_BLOCK = 32 << 20

# After which DataFusion gives back what it has freed: its package has mimalloc inside. The default is 10 ms, and in a
# cluster a seventh of all time went into zeroed pages.
PURGE_DELAY = ("MIMALLOC_PURGE_DELAY", "200")

# Where there is less, what is kept would be missed.
PLENTY = 4 << 30

# The stack of DataFusion's threads. Of 2 MiB, the default, a filter of 3,000 alternatives needs more, which ends the
# process; what is not used costs nothing.
THREAD_STACK = ("RUST_MIN_STACK", str(128 << 20))

# What gRPC writes to standard error itself. At its default, whoever connects to a port of TLS without it writes a line.
GRPC_LINES = ("GRPC_VERBOSITY", "ERROR")

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Lets this process reuse the memory of messages that were sent. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)


def give_back_freed_memory() -> None:
    """Gives memory that was freed back to the system. Blocks; does nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def engine_environment(memory: int) -> dict[str, str]:
    """The variables that DataFusion and gRPC are to find where there is so much memory, when they are loaded."""
    return dict((THREAD_STACK, GRPC_LINES, *((PURGE_DELAY,) if memory >= PLENTY else ())))


def restart_with(variables: Mapping[str, str]) -> None:
    """Starts this program anew with variables, unless it has them, or others of their names."""
    if not variables.keys() <= os.environ.keys():
        os.environ.update({**variables, **os.environ})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # it is this very program
