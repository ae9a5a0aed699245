"""What the C library does with freed memory."""

import ctypes
import os
import sys

# Messages are freed as soon as they are sent, and the next is as large. glibc would give each back to the system, and
# then wait for its pages to be zeroed again: that halves the throughput from half a megabyte a message on. The first is
# the most that is kept at the end of the heap, the second the largest block (and what glibc allows at most) that is.
KEPT_BYTES = 64 << 20
LARGEST_KEPT_BLOCK = 32 << 20

# After which DataFusion gives back what it has freed.
PURGE_MILLISECONDS = 200
_PURGE_DELAY = "MIMALLOC_PURGE_DELAY"

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


def restart_keeping_engine_memory() -> None:
    """Starts this program anew with the environment that DataFusion's allocator is to have, unless it has it.

    DataFusion's Python package has mimalloc inside, which looks at its variables when it is loaded. Its default is to
    give freed memory back after 10 ms: in a cluster a seventh of all time went into zeroed pages.
    """
    if _PURGE_DELAY not in os.environ:
        os.environ[_PURGE_DELAY] = str(PURGE_MILLISECONDS)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # it is this very program
