"""What the C library does with memory that is free: how much it keeps, and when it gives it back.

Left alone, glibc hands large free pieces back to the system at once and asks for them anew in the
next layer, page by page: a pass that reads 8 x 128 tokens took 176000 page faults and 2.06 s, with
64 MB kept for the next layer no fault and 1.79 s. Under a codec the opposite counts. Coded blocks
are small and stay; what one layer is decoded into is large and goes, and leaves holes: the process
of a 3000-token prompt under KVComp grew by 84 to 104 MB, with its free memory given back after each
pass by 44 to 53 MB, in 0.3 % more time.
"""

import ctypes
import os
from functools import cache

# The numbers of mallopt: the least bytes of a piece that is asked of the system by itself, which is
# the most that glibc adapts to, and how many free bytes at the end of the heap stay.
_MMAP_THRESHOLD, _MMAP_BYTES = -3, 32 * 2**20
_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 * 2**20


@cache
def keep_free_memory() -> None:
    """Once in a process, unless its environment settles that (MALLOC_..., GLIBC_TUNABLES)."""
    settled = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None or settled:
        return
    mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)


def give_back_free_memory() -> None:
    """Does nothing where the C library is not glibc."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
