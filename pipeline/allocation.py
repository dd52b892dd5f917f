"""How processes that handle images ask the kernel for memory: seldom.

Owns the settings of the C library's allocator. Every image's bytes and pixels are
allocated and freed; by default glibc maps fresh pages for each of them and gives them
back at once, and clearing new ones takes as long as decoding a small photo.
"""

from __future__ import annotations

import ctypes
import functools

_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 64 << 20
# Numbers of `mallopt`'s parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# For a process that is to be started. numpy's threads are of no use to it, and take
# memory.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(_TRIM_THRESHOLD),
    "OPENBLAS_NUM_THREADS": "1",
}


@functools.cache
def keep_pages() -> None:
    """Have this process keep up to 64 MB of pages that it has freed. Does nothing where
    the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
