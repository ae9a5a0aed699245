"""What the C library does with freed memory."""

import ctypes

# Messages are freed as soon as they are sent, and the next is as large. glibc would give each back to the system, and
# then wait for its pages to be zeroed again: that halves the throughput from half a megabyte a message on. The first is
# the most that is kept at the end of the heap, the second the largest block (and what glibc allows at most) that is.
KEPT_BYTES = 64 << 20
LARGEST_KEPT_BLOCK = 32 << 20

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Lets this process reuse the memory of messages that were sent. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
