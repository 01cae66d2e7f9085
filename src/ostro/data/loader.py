"""The loader: step number -> this rank's rows, read ahead by a thread."""

import queue
import threading
from collections.abc import Iterator

import torch

from ostro.data.mixture import BatchSchedule
from ostro.data.sequences import Batch, TrainData


class Loader:
    """Batches of a training run. It holds no position: a batch depends on its step alone."""

    def __init__(
        self,
        data: TrainData,
        schedule: BatchSchedule,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        prefetch: int = 2,
    ):
        """`prefetch`: batches read ahead by a thread in `batches`; 0 for none.

        Raises `ConfigError` when the mixture does not fit the schedule.
        """
        assert 0 <= rank < num_ranks, "rank out of range"
        assert all(size % num_ranks == 0 for _, size in schedule.stages), "uneven batches"
        data.mixture(schedule)
        self._data, self._schedule = data, schedule
        self._rank, self._num_ranks, self._prefetch = rank, num_ranks, prefetch
        self._pin = torch.cuda.is_available()

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of a step: the rank-th of `num_ranks` equal parts."""
        rows = self._schedule.size(step) // self._num_ranks
        first = self._schedule.offset(step) + self._rank * rows
        batch = self._data.get(first, rows, self._schedule)
        if not self._pin:
            return batch
        segments = None if batch.segments is None else batch.segments.pin_memory()
        return Batch(batch.tokens.pin_memory(), batch.targets.pin_memory(), segments)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start..stop-1; the thread ends with the iterator."""
        if self._prefetch == 0:
            yield from (self.batch(step) for step in range(start, stop))
            return
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self._prefetch)
        closed = threading.Event()

        def read() -> None:
            for step in range(start, stop):
                try:
                    item: Batch | BaseException = self.batch(step)
                except BaseException as error:  # raised again by the consumer
                    item = error
                while not closed.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if closed.is_set() or isinstance(item, BaseException):
                    return

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()
