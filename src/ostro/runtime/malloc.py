"""Memory of the CPU: keep what is freed instead of handing it back to the kernel.

glibc gives every block above 32 MB pages of its own and returns them when it is freed. A training
step frees and asks for the same large tensors again and again, so the kernel zeroes the same
pages every step. Keeping them costs some memory to fragmentation and saves that work.
"""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from malloc.h


def keep_freed_memory() -> bool:
    """Make this process keep its freed memory; False where the C library is not glibc."""
    # Large pages, where the kernel gives them, make what is still paged in cheap.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block gets a mapping of its own, and the heap is never trimmed.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    accepted = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)
