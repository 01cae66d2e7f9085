"""Lists of very many files, made without Python's garbage collector in the way."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Make objects that live on; a context or a decorator.

    The collector looks through all of them each time their number has grown by a quarter, and for
    100,000 files that takes as long as all else.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections need not walk what is there by now
        if was_enabled:
            gc.enable()
