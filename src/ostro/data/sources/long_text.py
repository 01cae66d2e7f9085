"""Texts that are long: kept as UTF-8 and decoded in parts.

Decoded as a whole, an English text with a single emoji takes four times its size in memory.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from ostro.data.cuts import next_cut

LONG = 1 << 24
"""Bytes of a text above which it is one."""
_PART = 1 << 20


@dataclass(frozen=True)
class LongText:
    """The text of one record; `UnicodeDecodeError` where it is none."""

    data: bytes
    byte: int | None = 0
    """Bytes before it in its file, decompressed; None where that is not known."""

    def __post_init__(self):
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at, block, is_last in self._blocks(_PART):
            start = at - len(decoder.getstate()[0])  # of a character that began in the last block
            try:
                decoder.decode(block, is_last)
            except UnicodeDecodeError as error:
                place = start + error.start, start + error.end
                raise UnicodeDecodeError("utf-8", self.data, *place, error.reason) from None

    def __str__(self) -> str:
        return self.data.decode("utf-8-sig")

    def parts(self) -> Iterator[str]:
        """The text in parts, cut where the ids of most tokenizers stay the same: see `cuts`."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        rest: list[str] = []
        wanted = _PART  # characters; more where there is no place to cut
        for _, block, is_last in self._blocks(_PART):
            rest.append(decoder.decode(block, is_last))
            if not is_last and sum(map(len, rest)) < wanted:
                continue
            text = "".join(rest)
            cut = None if is_last else next_cut(text, len(text) // 2)
            if is_last or cut is not None:
                yield text[:cut]
            rest, wanted = ([text], 2 * len(text)) if cut is None else ([text[cut:]], _PART)

    def _blocks(self, size: int) -> Iterator[tuple[int, memoryview, bool]]:
        """Where each block starts, the block, and whether it is the last one."""
        view = memoryview(self.data)
        for at in range(0, len(view), size):
            yield at, view[at : at + size], at + size >= len(view)
