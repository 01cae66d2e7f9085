"""Which documents a stretch of tokens holds.

A cache keeps an index beside its tokens. It has a row for every document, in their order.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from ostro.core.errors import DataError
from ostro.data.cache.mapped import map_file
from ostro.data.cache.store import TokenStore

UNKNOWN = (1 << 64) - 1
"""Stands in the index for a byte that is not known."""

ROW = np.dtype(
    [
        ("stop", "<u8"),  # the token behind its last one
        ("file", "<u8"),  # place of its file in the ledger's list, from 0
        ("record", "<u8"),  # number of its record in that file, from 1: a line, a row
        ("byte", "<u8"),  # bytes before that record in the decompressed file, or UNKNOWN
    ]
)


@dataclass(frozen=True)
class Part:
    """The tokens of one document in a stretch of tokens."""

    file: str
    record: int | None
    """1-based number of the document's record in the file: a line, a row. None without an index."""
    byte: int | None
    """Bytes before that record in the decompressed file; None where that is not known."""
    token: int
    """Tokens before the part: in its document, or in the file where there is no index."""
    start: int
    stop: int
    """The part is tokens start..stop-1 of the store."""
    begin: int
    end: int
    """The document is tokens begin..end-1; without an index these are the part's."""


class DocumentIndex:
    """The index of a cache."""

    def __init__(self, path: Path, files: Sequence[str]):
        self._rows = map_file(path, ROW)
        self._path, self._files = path, files

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The parts of which tokens start..stop-1 are made."""
        stops = self._rows["stop"]
        number = bisect_right(stops, start)
        begin = int(stops[number - 1]) if number else 0
        while begin < stop:
            end, file, record, byte = (int(value) for value in self._rows[number])
            first, last = max(begin, start), min(end, stop)
            if first < last:
                if file >= len(self._files):
                    raise DataError(f"{self._path} - is damaged - delete its folder, and the cache "
                                    "is built again at the next start")  # fmt: skip
                known = None if byte == UNKNOWN else byte
                yield Part(self._files[file], record, known, first - begin, first, last, begin, end)
            begin, number = end, number + 1


class TokenFiles:
    """Files of tokens without an index: a document goes on to the end-of-document id."""

    def __init__(self, store: TokenStore, files: Sequence[tuple[str, int]], eos_id: int | None):
        """`files`: the files of the store, and how many tokens each has."""
        self._store, self._eos_id = store, eos_id
        self._names = [name for name, _ in files]
        self._starts = list(accumulate((size for _, size in files), initial=0))

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The parts of which tokens start..stop-1 are made."""
        ends = np.flatnonzero(self._store.read(start, stop) == self._eos_id) + start + 1
        inner = {edge for edge in (*ends.tolist(), *self._starts) if start < edge < stop}
        for first, last in pairwise(sorted({start, *inner, stop})):
            file = bisect_right(self._starts, first) - 1
            token = first - self._starts[file]
            yield Part(self._names[file], None, None, token, first, last, first, last)


Documents = DocumentIndex | TokenFiles
