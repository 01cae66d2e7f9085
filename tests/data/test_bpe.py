"""Learning a BPE: long texts are handed over in parts, and nothing shows it."""

import random

import pytest
import tokenizers

from ostro.data import bpe
from ostro.data.cuts import never_within, next_cut
from ostro.data.tokenizer import END_OF_TEXT

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdefgh'é1", k=DRAW.randrange(1, 7))) for _ in range(300)]
TEXTS = {
    "one line": " ".join(DRAW.choices(WORDS, k=3000)),
    "lines": "\n".join(" ".join(DRAW.choices(WORDS, k=9)) for _ in range(400)),
    "odd spaces": "".join(w + DRAW.choice(["  ", " \n", "\t", " ", "\n\n "]) for w in WORDS * 5),
    "no spaces": "，".join(DRAW.choices(["你好", "世界", "再见2", "今天", "很 好"], k=4000)),
}


def learned(texts, monkeypatch, part):
    monkeypatch.setattr(bpe, "PART_CHARS", part)
    return bpe.learn_bpe([lambda: iter(texts)], 10**6, 330, END_OF_TEXT).to_str()


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_in_parts_gives_the_same_tokenizer(name, monkeypatch):
    text = TEXTS[name]
    whole = learned([text], monkeypatch, 10**6)
    for part in (80, 777):
        monkeypatch.setattr(bpe, "PART_CHARS", part)
        parts = list(bpe.in_parts(text))
        assert "".join(parts) == text and max(map(len, parts)) <= 2 * part + 1
        assert len(parts) > len(text) // (2 * part + 1)
        assert learned([text], monkeypatch, part) == whole


def test_a_word_longer_than_a_part_is_cut(monkeypatch):
    monkeypatch.setattr(bpe, "PART_CHARS", 100)
    parts = list(bpe.in_parts("x" * 1000))
    assert "".join(parts) == "x" * 1000 and max(map(len, parts)) <= 200


@pytest.mark.parametrize("name", TEXTS)
def test_every_cut_leaves_the_words_as_they_are(name):
    text = TEXTS[name] + " 's it 's. don't ，a 'll"
    before = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = [word for word, _ in before.pre_tokenize_str(text)]
    at, found = next_cut(text, 0), 0
    while at is not None:
        cut = [w for part in (text[:at], text[at:]) for w, _ in before.pre_tokenize_str(part)]
        assert cut == whole, text[at - 5 : at + 5]
        found, at = found + 1, next_cut(text, at + 1)
        if found > 60:
            break
    assert found > 10


def test_tokens_that_a_cut_could_go_through():
    assert never_within(["<|endoftext|>", "  ", "\n"])
    for crossed in ("<|end of text|>", "a\nb", "好，我"):
        assert not never_within([crossed])
