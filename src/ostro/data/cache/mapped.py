"""Files mapped into memory that hold no file descriptor.

Python's `mmap` keeps a descriptor for every mapping, and a process may often have no more than
1,024; a run may read more token files than that. So the C library is called directly.
"""

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path

import numpy as np

LARGE = 1 << 28  # bytes of a file that reading ahead does not bring into memory soon


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def map_file(path: str | Path, dtype: np.dtype) -> np.ndarray:
    """A file that is not empty as a read-only array; `OSError` where it cannot be mapped."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    # The array keeps this object, and with it the mapping, alive.
    memory = (ctypes.c_char * size).from_address(address)
    finalizer = weakref.finalize(memory, _libc().munmap, address, size)
    finalizer.atexit = False  # threads may still read when the process ends
    array = np.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize)
    array.flags.writeable = False
    return array


def expect_random(array: np.ndarray) -> None:
    """Tell the system that a large mapped array is read here and there: nothing is read ahead."""
    if array.nbytes > LARGE:
        _libc().madvise(array.ctypes.data, array.nbytes, mmap.MADV_RANDOM)
