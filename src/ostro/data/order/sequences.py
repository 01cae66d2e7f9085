"""Training and evaluation windows over token stores: example index -> tokens and targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ostro.core.errors import DataError
from ostro.data.cache.store import TokenStore
from ostro.data.order.mixture import BatchSchedule, Mixture
from ostro.data.order.permutation import derive_key, mix, shuffled

IGNORE = -100
"""Target of a position at which there is nothing to predict."""

_BLOCK = 1024  # examples whose places are computed together


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with what follows each of them."""

    tokens: torch.Tensor
    """(batch, position) int64."""
    targets: torch.Tensor
    """(batch, position) int64; `IGNORE` where there is nothing to predict."""
    segments: torch.Tensor | None = None
    """(batch, position) int32, one value a document; None when attention crosses documents."""

    def rows(self, start: int, stop: int, step: int = 1) -> "Batch":
        """The batch of every `step`-th of the rows start..stop-1."""
        part = slice(start, stop, step)
        segments = None if self.segments is None else self.segments[part]
        return Batch(self.tokens[part], self.targets[part], segments)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; a copy from pinned memory does not make the host wait."""
        segments = None if self.segments is None else self.segments.to(device, non_blocking=True)
        tokens = self.tokens.to(device, non_blocking=True)
        return Batch(tokens, self.targets.to(device, non_blocking=True), segments)


@dataclass(frozen=True)
class Windows:
    """A stretch of a store cut into windows of `seq_len` tokens; the tail is left out."""

    store: TokenStore
    seq_len: int
    start: int
    """First token."""
    stop: int
    """End of the stretch: no token from here on is ever a target."""
    segment_id: int | None = None
    """The id after which a new document begins, when attention is to stay within documents."""

    @property
    def num_windows(self) -> int:
        return (self.stop - self.start) // self.seq_len

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def gather(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, int64 (len(offsets), seq_len), of windows at token offsets."""
        tokens = np.empty((len(offsets), self.seq_len), dtype=np.int64)
        targets = np.full((len(offsets), self.seq_len), IGNORE, dtype=np.int64)
        for row, offset in enumerate(offsets.tolist()):
            first = self.start + offset
            read = self.store.read(first, min(first + self.seq_len + 1, self.stop))
            tokens[row] = read[: self.seq_len]
            targets[row, : len(read) - 1] = read[1:]
        return tokens, targets

    def segments(self, tokens: np.ndarray) -> np.ndarray | None:
        """Number of documents that ended before each position, int32 (rows, seq_len)."""
        if self.segment_id is None:
            return None
        ended = np.cumsum(tokens == self.segment_id, axis=1)
        return (ended - (tokens == self.segment_id)).astype(np.int32)

    def split(self, num_last: int) -> tuple["Windows", "Windows"]:
        """All windows but the last `num_last`, and those."""
        end = self.start + self.num_windows * self.seq_len
        middle = end - num_last * self.seq_len
        first = Windows(self.store, self.seq_len, self.start, middle, self.segment_id)
        return first, Windows(self.store, self.seq_len, middle, self.stop, self.segment_id)


def make_batch(tokens: np.ndarray, targets: np.ndarray, segments: np.ndarray | None) -> Batch:
    """Wrap arrays in tensors without a copy."""
    wrapped = None if segments is None else torch.from_numpy(segments)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), wrapped)


@dataclass(frozen=True)
class TrainData:
    """The endless sequence of training examples, a pure function of (seed, index)."""

    sources: Mapping[str, Windows]
    """What is trained on, by name; one entry without a mixture."""
    seed: int
    shuffle: bool | int = True
    sampling: Literal["permutation", "windows"] = "permutation"
    stages: Sequence[tuple[int, Mapping[str, float]]] = ()
    """Mixture weights from a training step on; empty for one source."""
    block_size: int = 2048
    _mixtures: dict[BatchSchedule | None, Mixture] = field(default_factory=dict, repr=False)
    _blocks: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def seq_len(self) -> int:
        return next(iter(self.sources.values())).seq_len

    @property
    def num_windows(self) -> int:
        """Windows of all sources together: the examples of one pass when there is one source."""
        return sum(windows.num_windows for windows in self.sources.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(windows.num_tokens for windows in self.sources.values())

    def mixture(self, schedule: BatchSchedule | None = None) -> Mixture | None:
        """The mixture under a batch schedule; None for one source.

        Raises `ConfigError` when a stage does not begin with a block.
        """
        if len(self.sources) == 1:
            return None
        if schedule not in self._mixtures:
            self._mixtures[schedule] = Mixture(
                self.stages, list(self.sources), self.block_size, self.seed, schedule
            )
        return self._mixtures[schedule]

    def get(self, first: int, count: int, schedule: BatchSchedule | None = None) -> Batch:
        """Examples first..first+count-1 of the global order.

        `schedule` is needed when the mixture changes at given steps.
        """
        source, offsets = self.offsets(first, count, schedule)
        shape = (count, self.seq_len)
        tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        segments: np.ndarray | None = None
        for number, windows in enumerate(self.sources.values()):
            chosen = source == number
            if not chosen.any():
                continue
            tokens[chosen], targets[chosen] = windows.gather(offsets[chosen])
            found = windows.segments(tokens[chosen])
            if found is not None:
                segments = np.zeros(shape, dtype=np.int32) if segments is None else segments
                segments[chosen] = found
        return make_batch(tokens, targets, segments)

    def offsets(
        self, first: int, count: int, schedule: BatchSchedule | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the same examples the numbers of their sources, and their token offsets there."""
        indices = np.arange(first, first + count, dtype=np.int64)
        mixture = self.mixture(schedule)
        if mixture is None:
            source, within = np.zeros_like(indices), indices
        else:
            source, within = mixture(indices)
        offsets = np.empty_like(within)
        for number, (name, windows) in enumerate(self.sources.items()):
            chosen = source == number
            offsets[chosen] = self._offsets(name, windows, within[chosen])
        return source, offsets

    def _offsets(self, name: str, windows: Windows, indices: np.ndarray) -> np.ndarray:
        """Token offsets of a source's examples. The arithmetic is as dear for one as for a block of
        them, so the last few blocks are kept."""
        blocks, position = np.divmod(indices, _BLOCK)
        offsets = np.empty_like(indices)
        for block in np.unique(blocks).tolist():
            if (name, block) not in self._blocks:
                while len(self._blocks) >= 2 * len(self.sources):
                    del self._blocks[next(iter(self._blocks))]
                of_block = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
                self._blocks[name, block] = self._compute(name, windows, of_block)
            chosen = blocks == block
            offsets[chosen] = self._blocks[name, block][position[chosen]]
        return offsets

    def _compute(self, name: str, windows: Windows, indices: np.ndarray) -> np.ndarray:
        key = derive_key(self.seed, name)
        if self.sampling == "windows":
            return random_offsets(windows, indices, key)
        order = shuffled(indices, windows.num_windows, self.shuffle, key)
        return order * windows.seq_len


def random_offsets(windows: Windows, indices: np.ndarray, key: int) -> np.ndarray:
    """Token offsets anywhere, with replacement, as long as a target follows; by (key, index)."""
    choices = max(windows.num_tokens - windows.seq_len, 1)
    drawn = mix(mix(indices.astype(np.uint64), key), derive_key(key, "draw"))
    return (drawn % np.uint64(choices)).astype(np.int64)


@dataclass(frozen=True)
class EvalData:
    """An evaluation set: its windows in their own order, each once, or as many random ones."""

    name: str
    tags: tuple[str, ...]
    windows: Windows
    held_out: bool = True
    """False for text that is trained on: it has metrics of its own and no part in the averages."""
    key: int | None = None
    """Draw windows at random places by this key, the same in every evaluation."""

    @property
    def num_windows(self) -> int:
        return self.windows.num_windows

    def offsets(self, first: int, stop: int) -> np.ndarray:
        """Token offsets of windows first..stop-1."""
        indices = np.arange(first, stop, dtype=np.int64)
        if self.key is None:
            return indices * self.windows.seq_len
        return random_offsets(self.windows, indices, self.key)

    def batches(
        self, batch_size: int, max_batches: int | None = None, *, rank: int = 0, num_ranks: int = 1
    ) -> Iterator[Batch]:
        """This rank's rows of the batches of `batch_size` windows, the last one shorter.

        A batch that the ranks cannot share evenly is filled up with rows without targets, so
        that every rank gets as many batches and rows as the others.
        """
        assert batch_size % num_ranks == 0, "the evaluation batch is shared evenly"
        total = self.num_windows
        if self.key is not None and max_batches is not None:  # with replacement: any number
            total = batch_size * max_batches
        for number, first in enumerate(range(0, total, batch_size)):
            if max_batches is not None and number >= max_batches:
                return
            count = min(batch_size, total - first)
            rows = -(-count // num_ranks)
            start = first + min(rank * rows, count)
            offsets = self.offsets(start, first + min((rank + 1) * rows, count))
            tokens, targets = self.windows.gather(offsets)
            fill = ((0, rows - len(offsets)), (0, 0))
            tokens, targets = np.pad(tokens, fill), np.pad(targets, fill, constant_values=IGNORE)
            yield make_batch(tokens, targets, self.windows.segments(tokens))


def cut(store: TokenStore, seq_len: int, name: str, segment_id: int | None = None) -> Windows:
    """All of a store as windows; a `DataError` when it does not fill one."""
    if store.num_tokens < seq_len:
        raise DataError(
            f"{name} - the corpus has {store.num_tokens} tokens, fewer than one window of "
            f"seq_len = {seq_len} - add text or make model.seq_len smaller"
        )
    return Windows(store, seq_len, 0, store.num_tokens, segment_id)
