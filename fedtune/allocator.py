"""The C library's memory allocator, told to keep what it has.

A training step allocates and frees the same activations again and again. glibc maps large blocks
afresh each time and gives the end of the heap back, so that the kernel clears every page of every
step anew.
"""

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
LARGE, PAD = 1 << 30, 64 << 20


def keep_pages() -> None:
    """Have this process and those it forks reuse freed memory; nothing where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # glibc before 2.35 refuses a threshold above half of its largest heap, 32 MiB.
    mallopt(MMAP_THRESHOLD, LARGE) or mallopt(MMAP_THRESHOLD, 32 << 20)
    mallopt(TRIM_THRESHOLD, LARGE)
    mallopt(TOP_PAD, PAD)
