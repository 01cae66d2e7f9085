"""Texts too long to be held decoded."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from ostro.core.errors import DataError
from ostro.data.cache.build import open_cache
from ostro.data.cache.request import CacheRequest
from ostro.data.cache.store import CacheDir
from ostro.data.sources import long_text, reading
from ostro.data.sources.long_text import LongText
from ostro.data.sources.source import UrlsSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer_config import BpeTokenizer, BytesTokenizer, CharsTokenizer

TEXTS = {
    "lines": "\N{GRINNING FACE} So many words, \u00e9t\u00e9!\n  And lines\u3002\uff1fYes.\n" * 300,
    "one line": "a word after a word " * 900,
    "no place to cut": "x" * 20_000 + " y",
    "empty lines": "\n" * 20_000,
    "with a mark": "\ufeffA text " * 900,
}


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(long_text, "_PART", 257)
    monkeypatch.setattr(reading, "LONG", 1000)


def cache_of(path, cache_dir, tokenizer):
    request = CacheRequest("train", UrlsSource([str(path)]), "train", tokenizer, num_workers=1)
    return open_cache(request, CacheDir(str(cache_dir)))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_parts_are_the_text(short_parts, text):
    long = LongText(text.encode())
    parts = list(long.parts())
    assert "".join(parts) == str(long) == text.removeprefix("\ufeff")
    assert all(parts)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", [BpeTokenizer(300), CharsTokenizer(), BytesTokenizer()])
def test_long_texts_give_the_same_tokenizer_and_tokens(tmp_path, monkeypatch, text, kind):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    found = []
    for name, length in (("whole", 1 << 30), ("parts", 1000)):
        monkeypatch.setattr(long_text, "_PART", 257)
        monkeypatch.setattr(reading, "LONG", length)
        config = LMDatasetConfig([str(path)], tokenizer=kind, cache_dir=str(tmp_path / name))
        tokenizer = config.build_tokenizer()
        cache = cache_of(path, tmp_path / name, tokenizer)
        (part,) = cache.documents.parts(0, cache.store.num_tokens)
        found.append((tokenizer.to_text(), cache.store.read(0, cache.store.num_tokens), part))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert (found[0][2].record, found[0][2].byte) == (1, 0)


def test_what_is_no_text_is_named_by_its_line(short_parts, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        "a line \N{GRINNING FACE}\n".encode() * 500 + b"bad \xff here\n" + b"x\n" * 900
    )
    with pytest.raises(DataError, match="line 501 - is not UTF-8"):
        cache_of(path, tmp_path / "cache", BytesTokenizer().build())


def test_members_of_archives_may_be_long(short_parts, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.txt", TEXTS["lines"])
        archive.writestr("2.txt", TEXTS["one line"])
    cache = cache_of(tmp_path / "a.zip", tmp_path / "cache", BytesTokenizer().build())
    assert cache.num_documents == 2
    assert [part.byte for part in cache.documents.parts(0, cache.store.num_tokens)] == [None, None]


@pytest.mark.parametrize("end", ["\n", " "])
def test_memory_stays_near_the_size_of_the_file(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reading, "LONG", 1 << 18)
    monkeypatch.setattr(long_text, "_PART", 1 << 16)
    path = tmp_path / "a.txt"
    path.write_text("\N{GRINNING FACE} " + f"a line of words{end}" * 600_000, encoding="utf-8")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        cache_of(path, tmp_path / "cache", BytesTokenizer().build())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.8 * size
