"""Which source the example of a global index comes from, when several are mixed by weight."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ostro.core.errors import ConfigError, Problem
from ostro.data.order.permutation import Permutation, derive_key


@dataclass(frozen=True)
class BatchSchedule:
    """The batch size of every step, and how many examples came before a step."""

    stages: tuple[tuple[int, int], ...]
    """(first step, examples per step), steps increasing from 0."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        assert starts and starts[0] == 0 and starts == sorted(set(starts)), "stages from 0 upwards"
        assert all(size > 0 for _, size in self.stages), "batch sizes are positive"

    def size(self, step: int) -> int:
        """Examples in the batch of a step."""
        return self.stages[bisect_right(self.stages, (step, 1 << 62)) - 1][1]

    def offset(self, step: int) -> int:
        """Examples in all batches before a step."""
        total = 0
        for index, (start, size) in enumerate(self.stages):
            end = self.stages[index + 1][0] if index + 1 < len(self.stages) else step
            total += size * max(0, min(end, step) - start)
        return total

    @property
    def max_size(self) -> int:
        """The largest batch of the run."""
        return max(size for _, size in self.stages)


def block_counts(weights: Mapping[str, float], block_size: int) -> dict[str, int]:
    """Examples of each source in a block: truncated shares, the remainder to the heaviest."""
    total = sum(weights.values())
    counts = {name: int(weight / total * block_size) for name, weight in weights.items()}
    heaviest = max(weights, key=lambda name: weights[name])
    counts[heaviest] += block_size - sum(counts.values())
    return counts


class Mixture:
    """Maps a global example index to (source, index within the source); pure.

    Each block of `block_size` consecutive examples holds a fixed number of examples of every
    source in a keyed random order, and each source is walked through contiguously, so that no
    example comes twice before its source has been used up.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, Mapping[str, float]]],
        names: Sequence[str],
        block_size: int,
        seed: int,
        schedule: BatchSchedule | None = None,
    ):
        """`stages`: (first training step, weights by source name), the first at step 0.

        Raises `ConfigError` when a stage does not begin at a multiple of the block.
        """
        self.names, self.block_size, self._seed = list(names), block_size, seed
        self._starts: list[int] = []  # first block of each stage
        self._counts: list[np.ndarray] = []  # (stage) of (source,)
        self._bases: list[np.ndarray] = []  # examples of each source used before the stage
        base = np.zeros(len(self.names), dtype=np.int64)
        for index, (step, weights) in enumerate(stages):
            start = self._block_of(index, step, schedule)
            if index:
                base = base + (start - self._starts[-1]) * self._counts[-1]
            counts = block_counts(weights, block_size)
            self._starts.append(start)
            self._counts.append(np.array([counts.get(n, 0) for n in self.names], dtype=np.int64))
            self._bases.append(base)
        self._block = lru_cache(maxsize=8)(self._make_block)

    def _block_of(self, index: int, step: int, schedule: BatchSchedule | None) -> int:
        assert step == 0 or schedule is not None, "stages by step need the batch schedule"
        offset = schedule.offset(step) if schedule else 0
        if offset % self.block_size:
            raise ConfigError(
                Problem(
                    f"data.train_weights.{index}.start",
                    f"step {step} is example {offset}, {offset / self.block_size:g} blocks of "
                    f"data.mixture_block_size = {self.block_size}; a stage must begin with a block",
                    "move the step, or change mixture_block_size or train_batch_size",
                    value=str(step),
                )
            )
        return offset // self.block_size

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position in the block, and its index within that source."""
        stage = bisect_right(self._starts, block) - 1
        counts = self._counts[stage]
        order = Permutation(self.block_size, derive_key(self._seed, "mixture", block))
        source = np.repeat(np.arange(len(counts)), counts)[order(np.arange(self.block_size))]
        within = np.empty(self.block_size, dtype=np.int64)
        first = self._bases[stage] + (block - self._starts[stage]) * counts
        for index, count in enumerate(counts):
            within[source == index] = first[index] + np.arange(count)
        return source, within

    def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source numbers and indices within those sources, both int64 shaped like `indices`."""
        blocks, position = np.divmod(np.asarray(indices, dtype=np.int64), self.block_size)
        source, within = np.empty_like(position), np.empty_like(position)
        for block in np.unique(blocks):
            chosen = blocks == block
            of_block = self._block(int(block))
            source[chosen], within[chosen] = (part[position[chosen]] for part in of_block)
        return source, within
