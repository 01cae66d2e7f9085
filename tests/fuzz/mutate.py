"""Mutations of a case: of its bytes, and of its words, so that a damaged file still parses."""

import re
from collections.abc import Sequence
from random import Random

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)
_VALUES = (
    b"0", b"-1", b"1", b"2", b"1.5", b"1e999", b"NaN", b"null", b"true", b'""', b'"x"', b"[]",
    b"{}", b"[1]", b'{"x": 1}', b"4294967296", b"9223372036854775808", b"1" * 30, b'"../x"',
    b'"\\ud800"', b"\xff", b"\x00", b"\n",
)  # fmt: skip


def mutate(case: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    """The case with one to three changes; its first byte, which chooses the reader, stays."""
    content = case[1:]
    for _ in range(random.randint(1, 3)):
        change = random.choice((_in_words, _in_words, _in_bytes))
        content = change(content, random, words)
    return case[:1] + content


def _in_words(content: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    tokens = _TOKEN.findall(content)
    places = [index for index, token in enumerate(tokens) if token.strip()] or [0]
    at, other = random.choice(places), random.choice(places)
    kind = random.randint(0, 4)
    if kind == 0:  # another value
        tokens[at : at + 1] = [random.choice(_VALUES)]
    elif kind == 1:  # a value or word more
        tokens[at:at] = [random.choice([*_VALUES, *words])]
    elif kind == 2:  # a stretch less
        del tokens[at : at + random.choice((1, 1, 2, 4, 8))]
    elif kind == 3:  # a stretch twice, or elsewhere
        tokens[other:other] = tokens[at : at + random.choice((1, 2, 4, 8))]
    elif tokens:  # two words change places
        tokens[at], tokens[other] = tokens[other], tokens[at]
    return b"".join(tokens)


def _in_bytes(content: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    at, kind = random.randint(0, len(content)), random.randint(0, 4)
    if kind == 0:  # cut off
        return content[:at]
    if kind == 1:  # one bit
        flipped = bytes(byte ^ 1 << random.randint(0, 7) for byte in content[at : at + 1])
        return content[:at] + flipped + content[at + 1 :]
    if kind == 2:  # a stretch less
        return content[:at] + content[at + random.choice((1, 2, 4, 64)) :]
    if kind == 3:  # bytes that are no small number
        noise = bytes(random.choice((0, 1, 127, 128, 255)) for _ in range(random.choice((1, 4, 8))))
        return content[:at] + noise + content[at + len(noise) :]
    return content[:at] + random.choice([*_VALUES, *words]) + content[at:]
