"""The index of documents: every one is found by its tokens, and found again in its file."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ostro.data.cache.build import CacheRequest, open_cache
from ostro.data.cache.documents import TokenFiles
from ostro.data.cache.encode import PIECE_CHARS
from ostro.data.cache.store import CacheDir, TokenStore
from ostro.data.sources.source import UrlsSource
from ostro.data.tokenizer_config import BytesTokenizer

BYTES = BytesTokenizer().build()
LONG = "".join(f"line {i} of a long document\n" for i in range(4 * PIECE_CHARS // 20))


@pytest.fixture
def files(tmp_path):
    """Five files whose documents are all different, with records between that are none."""
    lines = [json.dumps({"text": text}) for text in ("first", LONG, "", "ünï", "last of a")]
    a = "\n\n".join(lines) + "\n"  # every second line is blank
    (tmp_path / "a.jsonl").write_text(a)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(a.replace("last of a", "b").encode()))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + LONG[5:].encode())
    (tmp_path / "d.jsonl").write_text('{"text": 1}\n{"text": "after a bad one"}\n')
    column = pyarrow.table({"text": ["row one", "row two"]})
    pyarrow.parquet.write_table(column, str(tmp_path / "e.parquet"))
    return sorted(str(path) for path in tmp_path.iterdir())


def request_for(files, **options):
    return CacheRequest("train", UrlsSource(files), "train", BYTES, on_bad_record="skip", **options)


def in_file(path, record, byte):
    """The document at that place, read without the index."""
    if path.endswith(".parquet"):
        assert byte is None
        return pyarrow.parquet.read_table(path).column(0)[record - 1].as_py()
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if path.endswith(".gz") else data
    if path.endswith(".txt"):
        assert (record, byte) == (1, 0)
        return data.decode("utf-8-sig")
    assert data.splitlines()[record - 1] == data[byte:].splitlines()[0]
    return json.loads(data.splitlines()[record - 1])["text"]


@pytest.mark.parametrize("enforce_eos", [True, False])
def test_every_document_is_found_in_its_file(files, tmp_path, enforce_eos):
    request = request_for(files, enforce_eos=enforce_eos)
    cache = open_cache(request, CacheDir(str(tmp_path / "cache")))
    size = cache.store.num_tokens
    parts = list(cache.documents.parts(0, size))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == size and len(parts) == cache.num_documents == 12
    for part in parts:
        tokens = cache.store.read(part.start, part.stop)
        assert BYTES.decode(tokens.tolist()) == in_file(part.file, part.record, part.byte)
        assert part.token == 0
    places = [(part.file[-9:].lstrip("/"), part.record) for part in parts]
    assert len(set(places)) == 12
    assert [record for name, record in places if name.endswith("a.jsonl")] == [1, 3, 7, 9]


def test_stretches_at_every_place_are_made_of_the_same_documents(files, tmp_path):
    cache = open_cache(request_for(files[3:]), CacheDir(str(tmp_path / "cache")))
    whole = list(cache.documents.parts(0, cache.store.num_tokens))
    owner = [part for part in whole for _ in range(part.stop - part.start)]
    for start in range(cache.store.num_tokens):
        for stop in range(start, cache.store.num_tokens + 1):
            found = []
            for part in cache.documents.parts(start, stop):
                assert part.start - part.token == part.begin == owner[part.start].start
                assert part.end == owner[part.start].stop
                found += [(part.file, part.record)] * (part.stop - part.start)
            assert found == [(part.file, part.record) for part in owner[start:stop]]


def test_a_cache_without_an_index_still_opens(files, tmp_path):
    where = CacheDir(str(tmp_path / "cache"))
    first = open_cache(request_for(files), where)
    ledger = json.loads((first.folder / "ledger.json").read_text())
    del ledger["index"], ledger["checksums"]
    (first.folder / "ledger.json").write_text(json.dumps(ledger))
    (first.folder / "documents.bin").unlink()
    cache = open_cache(request_for(files), where)
    assert cache.fingerprint == first.fingerprint
    spans = [(part.start, part.stop) for part in cache.documents.parts(0, cache.store.num_tokens)]
    with_index = list(first.documents.parts(0, cache.store.num_tokens))
    assert spans == [(part.start, part.stop) for part in with_index]
    part = next(cache.documents.parts(7, 9))
    assert part.file == str(cache.folder / "tokens-00000.bin")
    assert (part.record, part.token) == (None, 7)


def test_an_index_of_the_wrong_size_is_damage(files, tmp_path):
    where = CacheDir(str(tmp_path / "cache"))
    path = open_cache(request_for(files), where).folder / "documents.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"documents\.bin - is missing or has the wrong size"):
        open_cache(request_for(files), where)


def test_an_unfinished_cache_without_an_index_is_begun_anew(files, tmp_path, caplog):
    where = CacheDir(str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        open_cache(request_for(files), where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    notes = where.local / "train/progress.jsonl"
    note = json.loads(notes.read_text().splitlines()[-1])
    del note["files"]["documents.bin"]
    notes.write_text(json.dumps(note) + "\n")
    cache = open_cache(request_for(files), where)
    assert "thrown away" in caplog.text
    assert cache.num_documents == 12


def test_token_files_are_cut_at_the_end_of_document():
    arrays = [np.array([1, 9, 2, 3], "<u2"), np.array([4, 9, 9, 5], "<u2")]
    store = TokenStore(arrays)
    documents = TokenFiles(store, [("a.bin", 4), ("b.bin", 4)], 9)
    edges = [0, 2, 4, 6, 7, 8]  # of files and documents
    for start in range(9):
        for stop in range(start, 9):
            parts = list(documents.parts(start, stop))
            inner = [edge for edge in edges if start < edge < stop]
            cuts = [start, *inner, stop] if start < stop else []
            assert [(part.start, part.stop) for part in parts] == list(pairwise(cuts))
            starts = {"a.bin": 0, "b.bin": 4}
            assert all(starts[part.file] + part.token == part.start for part in parts)
    assert [part.file for part in TokenFiles(store, [("c", 8)], None).parts(0, 8)] == ["c"]
