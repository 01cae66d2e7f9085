"""Where a long text may be cut without a change in its ids.

Byte-level tokenizers cut a text into words first and join letters within words only. Bytes and
characters can be cut anywhere. So the words decide: a word takes the one space before it, and
letters never share a word with the punctuation before them.
"""

import re
from collections.abc import Iterable

_CUT = re.compile(
    r"(?= \S)"  # before the space of a word
    r"|(?<=\S)\n(?=[A-Za-z0-9])"  # behind a line
    r"|[\u3002\uff0c\uff01\uff1f](?=[^\W_])"  # behind the punctuation of texts without spaces
)

_CROSSED = re.compile(r"\S\s|\s\S|[\u3002\uff0c\uff01\uff1f]")


def next_cut(text: str, start: int, stop: int | None = None) -> int | None:
    """The first place at or behind `start`, and before `stop`, where `text` may be cut."""
    found = _CUT.search(text, start, len(text) if stop is None else stop)
    return found.end() if found else None


def never_within(tokens: Iterable[str]) -> bool:
    """Whether no such place can be within one of these, which a tokenizer takes whole."""
    return not any(_CROSSED.search(token) for token in tokens)
