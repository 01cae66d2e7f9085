"""Encoding on a Ray cluster: this process reads and writes, the cluster's workers encode.

The texts travel to the workers. So these need neither the files nor the cache folder, only ostro,
and every document is read, cut and written as it is without Ray.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ostro.core.errors import ConfigError, DataError, OstroError, Problem

logger = logging.getLogger("ostro.data")

_RETRIES = 5  # of a batch whose worker or machine died
_TIMEOUT = 5.0  # seconds, for the cluster to answer


@contextmanager
def ray_workers(address: str, encode: Callable, setup: tuple) -> Iterator[tuple[int, Callable]]:
    """The number of workers of a cluster, and `submit(texts)` for `encode(*setup, texts)` there.

    Raises `ConfigError` if the cluster cannot be reached, `DataError` if it fails for good.
    """
    with _connected(address) as ray:

        @ray.remote(num_cpus=1, max_retries=_RETRIES)
        def task(shared: list[Any], texts: Sequence) -> tuple:
            return encode(*_fetched(shared[0]), texts)

        shared = [ray.put(setup)]  # in a list it is fetched once a worker, not once a task
        count = int(ray.cluster_resources().get("CPU", 1))
        logger.info("tokenising on the Ray cluster at %s, %d workers", address, count)

        def submit(texts: Sequence) -> Future:
            return task.remote(shared, texts).future()

        yield count, submit


@lru_cache(maxsize=1)
def _fetched(reference: Any) -> tuple:
    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one of the cluster's cores
    return ray.get(reference)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    def wrong(rule: str, advice: str) -> ConfigError:
        return ConfigError(Problem("trainer.ray.address", rule, advice, address))

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise wrong("needs Ray", 'pip install "ostro[ray]", or remove the setting') from error
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address != "auto":  # Ray itself waits for over a minute, then kills the process
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), _TIMEOUT).close()
        ray.init(address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError, SystemExit) as error:
        reason = str(error).strip().partition("\n")[0]
        advice = "correct it, start a cluster with: ray start --head, or remove the setting"
        raise wrong(f"no Ray cluster answers there ({reason})", advice) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own
    try:
        yield ray
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), OstroError):
            raise cause from None
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"trainer.ray.address = {address} - the cluster failed: {reason} - mend it, and start "
            "again: the cache goes on from where it was"
        ) from error
    finally:
        ray.shutdown()
