"""Random-access shuffling: a keyed bijection of `range(n)` that needs no memory."""

import hashlib

import numpy as np

_ROUNDS = 8


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; equal parts give equal keys everywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Hash uint64 values with a key (the finaliser of SplitMix64); a bijection of 64 bits."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Permutation:
    """A bijection of `range(n)`, different for every key.

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of two; values that leave
    the range are sent through it again until they are back (Black and Rogaway, 2002).
    """

    def __init__(self, n: int, key: int):
        assert n >= 1, "a permutation needs at least one element"
        self.n = n
        bits = max((n - 1).bit_length(), 2)
        self._low_bits = np.uint64(bits // 2)
        self._masks = (np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1))
        self._keys = [derive_key(key, round_) for round_ in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray | int) -> np.ndarray:
        """Where the indices (any shape, each in [0, n)) go; int64 of the same shape."""
        values = np.asarray(indices, dtype=np.int64)
        assert ((values >= 0) & (values < self.n)).all(), "index out of range"
        result = self._network(values.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(result >= self.n)
        while outside.size:
            result[outside] = self._network(result[outside])
            outside = outside[result[outside] >= self.n]
        return result.astype(np.int64).reshape(values.shape)

    def _network(self, values: np.ndarray) -> np.ndarray:
        low, high = values & self._masks[0], values >> self._low_bits
        for round_, key in enumerate(self._keys):
            if round_ % 2:
                low = low ^ (mix(high, key) & self._masks[0])
            else:
                high = high ^ (mix(low, key) & self._masks[1])
        return (high << self._low_bits) | low


def shuffled(indices: np.ndarray, n: int, shuffle: bool | int, key: int) -> np.ndarray:
    """Which of `n` items stands at each index of an endless sequence of passes over them.

    `shuffle` true: every pass has its own permutation. An integer L (not a bool): era shuffle,
    items move only inside their own run of L, the last run of a pass being shorter. False or 0:
    the items' own order.
    """
    passes, position = np.divmod(np.asarray(indices, dtype=np.int64), n)
    if shuffle is False or shuffle == 0:
        return position
    length = n if shuffle is True else min(int(shuffle), n)
    eras_per_pass = -(-n // length)
    eras = passes * eras_per_pass + position // length
    result = np.empty_like(position)
    for era in np.unique(eras):
        chosen = eras == era
        pass_, start = int(era) // eras_per_pass, int(era) % eras_per_pass * length
        permutation = Permutation(min(length, n - start), derive_key(key, pass_, start))
        result[chosen] = start + permutation(position[chosen] - start)
    return result
