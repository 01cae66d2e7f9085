"""Sources that change behind a finished cache, and caches that change behind their ledger."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ostro.core.errors import DataError
from ostro.data.cache.build import CacheRequest, checksums, open_cache
from ostro.data.cache.identity import Stamps, hash_of
from ostro.data.cache.store import CacheDir
from ostro.data.sources.source import UrlsSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer_config import BytesTokenizer

BYTES = BytesTokenizer().build()


@pytest.fixture
def where(tmp_path):
    return CacheDir(str(tmp_path / "cache"))


def request_for(*paths, **options):
    source = UrlsSource([str(path) for path in paths])
    return CacheRequest("train", source, "train", BYTES, num_workers=1, **options)


def settled(path, data):
    """Write a file, and make its stamp an old one."""
    path.write_bytes(data)
    os.utime(path, (10**9, 10**9))
    return path


@pytest.fixture
def hashed(monkeypatch):
    """The paths of files that are read once more to compare them."""
    paths = []
    count = lambda path, **k: paths.append(os.path.basename(path)) or hash_of(path, **k)  # noqa: E731
    monkeypatch.setattr("ostro.data.sources.files.hash_of", count)
    monkeypatch.setattr("ostro.data.cache.identity._TICK", -(10**18))
    monkeypatch.setattr("ostro.data.cache.identity._COARSE_TICK", -(10**18))
    return paths


def test_files_are_read_once_while_nothing_about_them_changes(tmp_path, where, hashed):
    files = [settled(tmp_path / f"{i}.txt", b"document %d" % i) for i in range(3)]
    first = open_cache(request_for(*files), where)
    assert open_cache(request_for(*files), where).fingerprint == first.fingerprint
    assert hashed == [], "hashed while they were tokenised, and known by their stamps"
    os.utime(files[1], (10**9, 10**9 + 1))
    assert open_cache(request_for(*files), where).fingerprint == first.fingerprint
    assert hashed == ["1.txt"]
    open_cache(request_for(*files), where)
    assert hashed == ["1.txt"]
    for name in (".stamps.json", ".listing"):
        (where.local / "train" / name).write_text("damaged")
    open_cache(request_for(*files), where)
    assert hashed == ["1.txt", "0.txt", "1.txt", "2.txt"]


def test_a_listing_that_was_found_unchanged_is_known_as_a_whole(
    tmp_path, where, hashed, monkeypatch
):
    asked = []
    get = Stamps.get
    monkeypatch.setattr(Stamps, "get", lambda s, stamps: asked.append(stamps) or get(s, stamps))
    files = [settled(tmp_path / f"{i}.txt", b"document %d" % i) for i in range(3)]
    first = open_cache(request_for(*files), where)
    assert open_cache(request_for(*files), where).fingerprint == first.fingerprint
    assert len(asked) == 3, "one by one, once"
    assert open_cache(request_for(*files), where).files == first.files
    assert len(asked) == 3
    settled(files[2], b"document X")
    with pytest.raises(DataError, match=r"files: changed .*2\.txt"):
        open_cache(request_for(*files), where)
    settled(files[2], b"document 2")
    open_cache(request_for(*files), where)  # it is hashed again
    asked.clear()
    with pytest.raises(DataError, match=r"files: "):
        open_cache(request_for(*files[:2]), where)
    ledger = where.local / "train" / "ledger.json"
    ledger.write_text(ledger.read_text().replace('.txt", 10, "', '.txt", 10, "0', 1))
    with pytest.raises(DataError, match=r"files: changed .*0\.txt"):
        open_cache(request_for(*files), where)
    assert asked


def test_an_edit_that_keeps_size_and_modification_time_is_seen(tmp_path, where, hashed):
    path = settled(tmp_path / "a.txt", b"some text")
    open_cache(request_for(path), where)
    settled(path, b"same size")
    with pytest.raises(DataError, match=r"files: changed .*a\.txt"):
        open_cache(request_for(path), where)


def test_a_large_file_is_known_by_all_of_its_bytes(tmp_path, where, hashed):
    data = bytearray(b"0123456789abcde\n" * ((17 << 20) // 16))
    path = settled(tmp_path / "big.txt", data)
    open_cache(request_for(path), where)
    data[100_000] = ord("X")  # between the blocks that earlier versions looked at
    settled(path, data)
    with pytest.raises(DataError, match=r"files: changed .*big\.txt"):
        open_cache(request_for(path), where)
    # A cache of an earlier version knows the samples only: it stays usable, with a word of caution.
    ledger = where.local / "train" / "ledger.json"
    content = json.loads(ledger.read_text())
    content["key"]["files"][0][2] = hash_of(str(path), sampled=True)
    del content["checksums"]
    ledger.write_text(json.dumps(content))
    assert open_cache(request_for(path), where).num_documents == 1


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet", "zip", "json"])
def test_what_is_hashed_on_the_way_is_the_hash_of_the_file(tmp_path, where, suffix):
    path = tmp_path / f"a.{suffix}"
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    if suffix == "parquet":
        table = pyarrow.table({"text": ["one", "two"]})
        pyarrow.parquet.write_table(table, str(path))
    elif suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", lines)
    else:
        pack = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.rpartition(".")[2], bytes)
        path.write_bytes(pack(lines))
    source = UrlsSource([str(path)])
    (shard,) = source.list_shards("train")
    reading = source.read_shard(shard)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            assert end.value == hash_of(str(path)) == shard.hash_files()
            break


def test_a_file_that_changes_while_it_is_read_stops_the_build(tmp_path, where):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 100)

    shards = UrlsSource([str(path)]).list_shards("train")
    path.write_text('{"text": "z"}\n' * 101)

    class Listed(UrlsSource):
        def list_shards(self, split):
            return shards

    request = CacheRequest("train", Listed([str(path)]), "train", BYTES, num_workers=1)
    with pytest.raises(DataError, match=r"a\.jsonl - changed while it was read"):
        open_cache(request, where)
    assert not (where.local / "train" / "ledger.json").exists()


def test_a_build_that_was_killed_knows_the_files_by_the_same_hashes(tmp_path, where):
    files = [tmp_path / f"{i}.txt" for i in range(40)]
    for index, path in enumerate(files):
        path.write_text(f"document {index} " * 500)
    code = f"""
import os, signal, test_stale_data as t
def progress(name, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
t.open_cache(t.request_for(*{[*map(str, files)]!r}), t.CacheDir({str(where.local)!r}), progress)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, timeout=120)
    assert killed.returncode == -9 and not (where.local / "train" / "ledger.json").exists()
    resumed = open_cache(request_for(*files), where)
    assert [row[2] for row in resumed.files] == [hash_of(str(path)) for path in files]
    other = open_cache(request_for(*files), CacheDir(str(tmp_path / "other")))
    assert resumed.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin", "checksums.bin"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_byte_of_a_small_cache_is_found_at_the_start(tmp_path, where, name, at):
    path = settled(tmp_path / "a.txt", b"some text")
    folder = open_cache(request_for(path), where).folder
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 64
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} - .*the cache is damaged - delete"):
        open_cache(request_for(path), where)


def test_a_large_cache_is_sampled_at_a_start_and_verified_whole_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK", 16)
    (tmp_path / "a.bin").write_bytes(bytes(16 * 1000 + 3))
    ledger = {"checksums": checksums.write(tmp_path, ["a.bin"])}
    assert checksums.verify(tmp_path, ledger, whole=True)
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(16 * 500 + 1)
        file.write(b"\1")
    with pytest.raises(DataError, match=r"a\.bin - bytes 8000 to 8016"):
        checksums.verify(tmp_path, ledger, whole=True)
    found = 0
    for _ in range(200):  # each looks at 30 of the 999 blocks within
        try:
            checksums.verify(tmp_path, ledger)
        except DataError:
            found += 1
    assert 0 < found < 50


def test_verifying_builds_nothing_and_tells_of_ids_out_of_range(tmp_path, where, caplog):
    caplog.set_level("INFO", "ostro.data")
    path = settled(tmp_path / "a.txt", b"some text")
    with pytest.raises(DataError, match="holds no finished cache"):
        open_cache(request_for(path, must_exist=True, verify=True), where)
    folder = open_cache(request_for(path), where).folder
    open_cache(request_for(path, must_exist=True, verify=True), where)
    assert "train: intact" in caplog.text
    ledger = json.loads((folder / "ledger.json").read_text())
    del ledger["checksums"]
    (folder / "ledger.json").write_text(json.dumps(ledger))
    open_cache(request_for(path, must_exist=True, verify=True), where)
    assert "without checksums" in caplog.text
    data = bytearray((folder / "tokens-00000.bin").read_bytes())
    data[5] |= 64
    (folder / "tokens-00000.bin").write_bytes(data)
    store = open_cache(request_for(path), where).store
    damaged = r"tokens-00000\.bin - id \d+ at token 2 is outside the vocabulary of 257"
    with pytest.raises(DataError, match=damaged):
        store.read(0, store.num_tokens)
    with pytest.raises(DataError, match=damaged):
        open_cache(request_for(path, must_exist=True, verify=True), where)


@pytest.mark.parametrize("twin", ["same", "copy", "link", "other"])
def test_training_and_evaluating_on_one_text_is_said_once(tmp_path, caplog, twin):
    train, other = tmp_path / "a.txt", tmp_path / f"{twin}.txt"
    train.write_text("the same text, again and again")
    if twin == "same":
        other = train
    elif twin == "link":
        other.symlink_to(train)
    else:
        other.write_text(train.read_text() if twin == "copy" else "some text that is another one")
    config = LMDatasetConfig(
        train_urls=[str(train)],
        validation_urls=[str(other)],
        cache_dir=str(tmp_path / "cache"),
        tokenizer=BytesTokenizer(),
    )
    config.build(BYTES, 8, 0)
    assert caplog.text.count("is trained on, too") == (twin != "other")
