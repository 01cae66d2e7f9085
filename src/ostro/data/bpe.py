"""Learning a byte-level BPE from a sample of the training text.

The library takes about a hundred times a text's size in memory while it cuts it into words, all of
a text at once. It only counts the words, so texts are handed over in parts, cut between words: the
result is that of the whole text.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import tokenizers

from ostro.data.cuts import next_cut

logger = logging.getLogger("ostro.data")

PART_CHARS = 1 << 16
"""Texts are handed over in parts of about this many characters."""


def byte_level(model: tokenizers.models.Model, end: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with a token `end`."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([end])
    return inner


def learn_bpe(
    shards: Sequence[Callable[[], Iterator[str]]], limit: int, vocab_size: int, end: str
) -> tokenizers.Tokenizer:
    """A byte-level BPE of `vocab_size` tokens from about `limit` characters of the shards."""
    inner = byte_level(tokenizers.models.BPE(), end)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part for text in sample(shards, limit) for part in in_parts(text))
    inner.train_from_iterator(parts, trainer)
    if inner.get_vocab_size() < vocab_size:
        logger.warning(
            "the text yields a BPE of %d tokens only, not of %d", inner.get_vocab_size(), vocab_size
        )
    return inner


def sample(shards: Sequence[Callable[[], Iterator[str]]], limit: int) -> Iterator[str]:
    """Texts from the start of every shard, about `limit` characters; unused shares go on."""
    left = limit
    for index, shard in enumerate(shards):
        share = left / (len(shards) - index)
        for text in shard():
            if share <= 0:
                break
            text = text[: int(share) + 1]
            yield text
            share, left = share - len(text), left - len(text)


def in_parts(text: str) -> Iterator[str]:
    """A text in parts, cut between words, or within a word that is as long as a part."""
    start = 0
    while len(text) - start > 2 * PART_CHARS:
        at = start + PART_CHARS
        cut = next_cut(text, at, at + PART_CHARS) or at
        yield text[start:cut]
        start = cut
    yield text[start:]
