"""The loader: step number -> this rank's rows, read ahead by a thread."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from ostro.data.order.mixture import BatchSchedule
from ostro.data.order.sequences import Batch, TrainData
from ostro.runtime.phase import enter_phase

_AHEAD = 2
"""Batches that the thread has read, or reads, beside the one in use."""

_PATIENCE = 2.0  # seconds that the end of a run waits for the batch that is being read


class Loader:
    """Batches of a training run. It holds no position: a batch depends on its step alone."""

    def __init__(
        self,
        data: TrainData,
        schedule: BatchSchedule,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        interleaved: bool = False,
    ):
        """`interleaved`: this rank has rows rank, rank + num_ranks, ... instead of its block.

        Raises `ConfigError` when the mixture does not fit the schedule.
        """
        assert 0 <= rank < num_ranks, "rank out of range"
        assert all(size % num_ranks == 0 for _, size in schedule.stages), "uneven batches"
        data.mixture(schedule)
        self._data, self._schedule = data, schedule
        self._rank, self._num_ranks, self._interleaved = rank, num_ranks, interleaved
        self._pin = torch.cuda.is_available()

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of a step: the rank-th of `num_ranks` equal parts."""
        enter_phase("load")
        offset, size = self._schedule.offset(step), self._schedule.size(step)
        if self._interleaved:
            whole = self._data.get(offset, size, self._schedule)
            batch = whole.rows(self._rank, size, self._num_ranks)
        else:
            rows = size // self._num_ranks
            batch = self._data.get(offset + self._rank * rows, rows, self._schedule)
        if not self._pin:
            return batch
        segments = None if batch.segments is None else batch.segments.pin_memory()
        return Batch(batch.tokens.pin_memory(), batch.targets.pin_memory(), segments)

    def batches(
        self, steps: Iterable[int], wait: Callable[[Future[Batch]], Batch] = Future.result
    ) -> Generator[Batch, None, None]:
        """The batches of these steps; the thread ends with the iterator.

        `wait` takes a batch that may not have been read yet, and returns it.
        """
        orders: SimpleQueue[tuple[int, Future[Batch]] | None] = SimpleQueue()

        def read() -> None:
            while (order := orders.get()) is not None:
                step, future = order
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self.batch(step))
                    except BaseException as error:
                        future.set_exception(error)

        # A daemon: a read that hangs, on a disk of the network say, must not keep the process.
        reader = threading.Thread(target=read, name="loader", daemon=True)
        reader.start()
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                ahead.append(Future())
                orders.put((step, ahead[-1]))
                if len(ahead) > _AHEAD:
                    yield wait(ahead.popleft())
            while ahead:
                yield wait(ahead.popleft())
        finally:
            for future in ahead:
                future.cancel()
            orders.put(None)
            reader.join(_PATIENCE)
