"""What an object store refuses for the moment is asked for again, with longer and longer pauses.

Answers such as 500 and 503, connections that are refused or reset, and answers that do not come
are retried for a minute. Then an `UnreachableError` says so: it is no statement about what is
stored there, so nobody may take it for a checkpoint that is damaged or missing.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ostro.core.errors import CheckpointError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds after the first failure during which an operation is retried."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0
_PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE, errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
# Clients let errors of their own out that are no OSError: of these all but what must be mended.
_CLIENTS = {"aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "gcsfs", "google", "urllib3"}
_TO_MEND = ("Credential", "NoRegion", "ParamValidation", "ProfileNotFound", "Token")


class UnreachableError(CheckpointError):
    """An object store did not answer in time: what it holds is not known."""


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno in _PASSING
    kind = type(error)
    of_client = kind.__module__.partition(".")[0] in _CLIENTS
    return of_client and not any(word in kind.__name__ for word in _TO_MEND)


def patiently(url: str, work: Callable[[], Result], patience: float | None = None) -> Result:
    """What `work` returns, tried again while it fails for a reason that may pass."""
    end, pause, attempts = None, FIRST_PAUSE, 0
    while True:
        try:
            return work()
        except Exception as error:
            attempts += 1
            if not is_passing(error):
                raise
            now = time.monotonic()
            allowed = PATIENCE if patience is None else patience
            end = now + allowed if end is None else end
            if now + pause > end:
                raise UnreachableError(
                    f"{url} - the object store does not answer ({attempts} attempts):"
                    f" {type(error).__name__}: {error} - nothing is lost there: see whether it"
                    " can be reached, and run the same command again"
                ) from error
            if attempts == 1:
                _log.debug("%s: %s: %s; trying again", url, type(error).__name__, error)
            if attempts == 3:
                _log.warning("%s: %s: %s; still trying", url, type(error).__name__, error)
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)
